"""Where MPI's launchers and Slurm say that a process stands in its world: a plug-in of `runtime.env`, without torch.

Open MPI (with Azure ML and SageMaker on top), MVAPICH, MPICH and Intel MPI (PMI), and a Slurm job step.
"""

from __future__ import annotations

import json
import re
import socket
import zlib
from dataclasses import dataclass

from deepspeedlite.runtime.env import LOCALHOST, World, number_in, port_in
from deepspeedlite.runtime.errors import DistributedError

# Ports below Linux's ephemeral range (32768 up), so that no outgoing connection sits on one by chance.
_DERIVED_PORTS = range(10000, 30000)
# Slurm's reserved step ids start here: interactive, batch script, extern. None of them was started by srun's tasks.
_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFFA
# What Azure ML's own recipes use, as DeepSpeed does.
_AZUREML_ONE_HOST_PORT = 54965
_AZUREML_MANY_HOSTS_PORT = 6105
_SLURM_JOB_KEYS = ("SLURM_JOB_ID", "SLURM_JOBID")


@dataclass(frozen=True)
class _MpiNames:
    """The variables of one MPI family, and those that tell its jobs on a host apart."""

    source: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]


_MPI_FAMILIES = (
    _MpiNames(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid", *_SLURM_JOB_KEYS),
    ),
    _MpiNames(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        _SLURM_JOB_KEYS,
    ),
    _MpiNames(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        ("PMI_JOBID", *_SLURM_JOB_KEYS),
    ),
)


def world_of(env: dict[str, str]) -> World | None:
    """What the variables of MPI or Slurm say; None where neither started this process."""
    for names in _MPI_FAMILIES:
        if names.rank in env or names.size in env:
            # srun --mpi=pmi2 sets PMI_RANK too, but tells the local rank only by Slurm's own variables.
            if names.rank == "PMI_RANK" and names.local_rank not in env and _in_slurm_step(env):
                continue
            return _from_mpi(env, names)
    return _from_slurm(env) if _in_slurm_step(env) else None


def _from_mpi(env: dict[str, str], names: _MpiNames) -> World:
    _require_all(env, (names.rank, names.size, names.local_rank), names.source)
    world_size = number_in(env, names.size, least=1)
    local_size = number_in(env, names.local_size, least=1) if names.local_size in env else None
    source, addr, port = names.source, env.get("MASTER_ADDR"), port_in(env)
    one_host = local_size == world_size
    if "AZUREML_EXPERIMENT_ID" in env and "DLTS_JOB_ID" not in env:
        source = "Azure ML"
        addr = addr or _azureml_master(env, one_host)
        port = port or (_AZUREML_ONE_HOST_PORT if one_host else _AZUREML_MANY_HOSTS_PORT)
    elif "SM_TRAINING_ENV" in env:
        source = "SageMaker"
        addr = addr or _sagemaker_master(env)
    if addr is None and one_host:
        addr = LOCALHOST
    if port is None:
        port = _derived_port(env, names.job)
    return World(
        number_in(env, names.rank), world_size, number_in(env, names.local_rank), local_size, addr, port, source
    )


def _azureml_master(env: dict[str, str], one_host: bool) -> str:
    name = "AZ_BATCHAI_MPI_MASTER_NODE" if one_host else "AZ_BATCH_MASTER_NODE"
    if name not in env:
        raise DistributedError(
            f"this looks like Azure ML (AZUREML_EXPERIMENT_ID is set), but neither {name} nor MASTER_ADDR is; "
            "set MASTER_ADDR to the host of rank 0"
        )
    return env[name].split(":")[0]  # the port after the colon is Azure Batch's own


def _sagemaker_master(env: dict[str, str]) -> str | None:
    try:
        hosts = json.loads(env.get("SM_HOSTS", "[]"))
    except ValueError as error:
        raise DistributedError(f"SM_HOSTS={env['SM_HOSTS']!r} is not JSON; set MASTER_ADDR instead") from error
    return str(hosts[0]) if isinstance(hosts, list) and hosts else None


def _in_slurm_step(env: dict[str, str]) -> bool:
    """Whether srun started this process. In a batch script or an salloc shell SLURM_NTASKS is set all the same."""
    if "SLURM_STEP_ID" in env:
        return "SLURM_PROCID" in env and number_in(env, "SLURM_STEP_ID") < _FIRST_RESERVED_SLURM_STEP
    return "SLURM_STEP_NODELIST" in env or "SLURM_STEP_NUM_TASKS" in env


def _from_slurm(env: dict[str, str]) -> World:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    _require_all(env, ("SLURM_PROCID", size_name, "SLURM_LOCALID"), "Slurm")
    world_size = number_in(env, size_name, least=1)
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    hosts = expand_nodelist(nodelist) if nodelist else []
    addr = env.get("MASTER_ADDR")
    if addr is None and (world_size == 1 or len(hosts) == 1):
        addr = LOCALHOST  # a host need not be able to resolve its own name
    elif addr is None:
        addr = hosts[0] if hosts else env.get("SLURM_LAUNCH_NODE_IPADDR")
    if addr is None:
        raise DistributedError(
            "Slurm's SLURM_STEP_NODELIST, SLURM_JOB_NODELIST and SLURM_LAUNCH_NODE_IPADDR are all unset, so the "
            "host of rank 0 is unknown; set MASTER_ADDR to it"
        )
    return World(
        rank=number_in(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=number_in(env, "SLURM_LOCALID"),
        local_size=world_size if len(hosts) == 1 else _slurm_local_size(env),
        master_addr=addr,
        master_port=port_in(env) or _derived_port(env, (*_SLURM_JOB_KEYS, "SLURM_STEP_ID")),
        source="Slurm",
    )


def _slurm_local_size(env: dict[str, str]) -> int | None:
    """Tasks on this node, from a list such as `2(x3),1`: three nodes with two tasks, then one with one."""
    counts: list[int] = []
    for item in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = number_in(env, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else None


# --- Slurm's node lists -----------------------------------------------------------------------------------------------


def expand_nodelist(nodelist: str) -> list[str]:
    """The hosts of a Slurm node list: `n[01-03,7],login` is n01, n02, n03, n7, login.

    Several bracket groups in one name multiply, the rightmost running fastest.

    Raises:
        DistributedError: the brackets do not match or hold something else than numbers and ranges.
    """
    hosts: list[str] = []
    for name in _split_outside_brackets(nodelist):
        parts = re.split(r"\[([^\[\]]*)\]", name)
        if any("[" in text or "]" in text for text in parts[::2]):
            raise DistributedError(f"the Slurm node list {nodelist!r} has unmatched brackets")
        expanded = [""]
        for index, part in enumerate(parts):
            choices = _expand_ranges(part, nodelist) if index % 2 else [part]
            expanded = [head + tail for head in expanded for tail in choices]
        hosts.extend(expanded)
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    return [name for name in re.split(r",(?![^\[]*\])", text) if name]


def _expand_ranges(text: str, nodelist: str) -> list[str]:
    """`01-03,7` is 01, 02, 03, 7: the width of a range's start is kept."""
    items: list[str] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise DistributedError(f"the Slurm node list {nodelist!r} holds {item!r}, which is no number or range")
        first, last = found[1], found[2] or found[1]
        items += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return items


def _derived_port(env: dict[str, str], job_names: tuple[str, ...]) -> int | None:
    """A port that all ranks of one job agree on and that two jobs on a host rarely share."""
    identity = "/".join(f"{name}={env[name]}" for name in job_names if name in env)
    return _DERIVED_PORTS[zlib.crc32(identity.encode()) % len(_DERIVED_PORTS)] if identity else None


# --- asking MPI -------------------------------------------------------------------------------------------------------


def ask_mpi(world: World, port: int) -> tuple[str, int]:
    """Rank 0's address and port, broadcast over MPI itself.

    Raises:
        DistributedError: there is no mpi4py, or one of another MPI.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DistributedError(
            f"{world.source} started {world.world_size} processes on several hosts, and rank 0's address is unknown; "
            "install mpi4py (pip install 'deepspeedlite[mpi]'), or pass it: mpirun -x MASTER_ADDR=<host of rank 0>"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.world_size or comm.Get_rank() != world.rank:
        raise DistributedError(
            f"mpi4py says rank {comm.Get_rank()} of {comm.Get_size()}, but {world.source}'s variables say "
            f"{world.rank} of {world.world_size}: mpi4py was built for another MPI; rebuild it for the one of mpirun, "
            "or set MASTER_ADDR"
        )
    addr, port = comm.bcast((_own_address(), port) if world.rank == 0 else None, root=0)
    return addr, port


def _own_address() -> str:
    """This host's address on the interface of its default route, which other hosts can usually reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # chooses a route; a datagram socket sends nothing on connect
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _require_all(env: dict[str, str], names: tuple[str, ...], source: str) -> None:
    """Raise where some of these variables are not set."""
    missing = [name for name in names if name not in env]
    if missing:
        present = [name for name in names if name in env]
        raise DistributedError(
            f"{source}: {', '.join(present) or 'its step variables'} set, but {', '.join(missing)} not; start the "
            "script with mpirun or srun so that all are set, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT by hand"
        )
