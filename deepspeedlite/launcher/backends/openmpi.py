"""Open MPI's mpirun. Binding is left to the ranks: mpirun would put an agent, and all it starts, on one core."""

from deepspeedlite.launcher.backends import Launch, Reach, mpirun

PROGRAMS = ("mpirun.openmpi", "mpirun")


def launches(reach: Reach) -> list[Launch]:
    """One agent per node, in the hosts' order."""
    hosts = ",".join(f"{host}:1" for host in reach.hosts)
    options = ["-n", str(len(reach.hosts)), "--host", hosts, "--map-by", "node", "--bind-to", "none"]
    options += [word for name in reach.key for word in ("-x", name)]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # containers run as root
    if reach.ssh_port is not None:
        options += ["--mca", "plm_rsh_args", f"-p {reach.ssh_port}"]
    return mpirun(reach, PROGRAMS, options, **as_root)
