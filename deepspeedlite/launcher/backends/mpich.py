"""MPICH's mpirun (hydra)."""

from deepspeedlite.launcher.backends import Launch, Reach, hydra

PROGRAMS = ("mpirun.mpich", "mpiexec.hydra", "mpirun")


def launches(reach: Reach) -> list[Launch]:
    """One agent per node, in the hosts' order."""
    return hydra(reach, PROGRAMS)
