"""Where this process stands in its world, told from the variables that its launcher set.

`discover_world(environ)` is a pure function: it reads a mapping, opens nothing and imports no torch. It knows, in
this order: RANK and WORLD_SIZE (torchrun, our launcher, hand-set), Open MPI (with Azure ML and SageMaker on top),
MVAPICH, MPICH and Intel MPI (PMI), a Slurm job step, and else a single process. The first that is present wins,
since the inner launcher is the one that started the process: torchrun under srun, mpirun under sbatch.

Variables that are half-set or contradict each other raise `DistributedError`, which names them and the remedy.
MASTER_ADDR and MASTER_PORT, where set, override what a scheduler implies. `master_addr` stays None when several
hosts are used and no variable tells rank 0's; then only MPI itself (mpi4py) can.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeedlite.runtime.errors import DistributedError

LOCALHOST = "127.0.0.1"
# Ports below Linux's ephemeral range (32768 up), so that no outgoing connection sits on one by chance.
_DERIVED_PORTS = range(10000, 30000)
# Slurm's reserved step ids start here: interactive, batch script, extern. None of them was started by srun's tasks.
_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFFA
# What Azure ML's own recipes use, as DeepSpeed does.
_AZUREML_ONE_HOST_PORT = 54965
_AZUREML_MANY_HOSTS_PORT = 6105
_SLURM_JOB_KEYS = ("SLURM_JOB_ID", "SLURM_JOBID")


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `world_size`, `local_rank` of `local_size` on its host.

    `local_size`, `master_addr` and `master_port` are None where no variable tells them. `source` names the
    launcher whose variables were read, for people.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    master_addr: str | None
    master_port: int | None
    source: str


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


def discover_world(environ: Mapping[str, str], schedulers: bool = True) -> World:
    """Tell rank, world size and where rank 0 is, from the environment alone.

    Args:
        environ: usually `os.environ`. Empty values count as unset.
        schedulers: False reads only RANK and WORLD_SIZE and never those of MPI or Slurm.

    Raises:
        DistributedError: variables are half-set, are no numbers, or contradict each other.
    """
    env = {name: value.strip() for name, value in environ.items() if value.strip()}
    outer = _from_schedulers(env) if schedulers else None
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _from_rank_variables(env)
        _refuse_stale_single(env, outer)
    elif outer is not None:
        world = outer
    else:
        if _number(env, "LOCAL_RANK", least=-1, default=0) > 0:
            raise DistributedError(
                f"LOCAL_RANK={env['LOCAL_RANK']} is set, but RANK and WORLD_SIZE are not; start the script with "
                "torchrun, mpirun, srun or the deepspeedlite launcher, or set all three"
            )
        world = World(0, 1, 0, 1, env.get("MASTER_ADDR"), _port(env), "single process")
    _check(world)
    return world


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


# ------------------------------------------------------------------------------------------------- the sources


def _from_rank_variables(env: dict[str, str]) -> World:
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
    if missing:
        present = "RANK" if "RANK" in env else "WORLD_SIZE"
        raise DistributedError(
            f"{present}={env[present]} is set, but {missing[0]} is not; set both, or unset {present} to let the "
            "world be found otherwise (MPI, Slurm, a single process)"
        )
    world_size = _number(env, "WORLD_SIZE", least=1)
    if "LOCAL_RANK" not in env and world_size > 1:
        raise DistributedError(
            f"RANK={env['RANK']} and WORLD_SIZE={world_size} are set, but LOCAL_RANK, which chooses this process's "
            "device, is not; set LOCAL_RANK to the process's index on its own host"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    return World(
        rank=_number(env, "RANK"),
        world_size=world_size,
        local_rank=max(0, _number(env, "LOCAL_RANK", least=-1, default=0)),
        local_size=_number(env, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in env else None,
        master_addr=env.get("MASTER_ADDR"),
        master_port=_port(env),
        source="torchrun" if elastic else "RANK and WORLD_SIZE",
    )


def _from_schedulers(env: dict[str, str]) -> World | None:
    for names in _MPI_FAMILIES:
        if names.rank in env or names.size in env:
            # srun --mpi=pmi2 sets PMI_RANK too, but tells the local rank only by Slurm's own variables.
            if names.rank == "PMI_RANK" and names.local_rank not in env and _in_slurm_step(env):
                continue
            return _from_mpi(env, names)
    return _from_slurm(env) if _in_slurm_step(env) else None


def _from_mpi(env: dict[str, str], names: _MpiNames) -> World:
    _require(env, (names.rank, names.size, names.local_rank), names.source)
    world_size = _number(env, names.size, least=1)
    local_size = _number(env, names.local_size, least=1) if names.local_size in env else None
    source, addr, port = names.source, env.get("MASTER_ADDR"), _port(env)
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
    return World(_number(env, names.rank), world_size, _number(env, names.local_rank), local_size, addr, port, source)


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
        return "SLURM_PROCID" in env and _number(env, "SLURM_STEP_ID") < _FIRST_RESERVED_SLURM_STEP
    return "SLURM_STEP_NODELIST" in env or "SLURM_STEP_NUM_TASKS" in env


def _from_slurm(env: dict[str, str]) -> World:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    _require(env, ("SLURM_PROCID", size_name, "SLURM_LOCALID"), "Slurm")
    world_size = _number(env, size_name, least=1)
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
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=world_size if len(hosts) == 1 else _slurm_local_size(env),
        master_addr=addr,
        master_port=_port(env) or _derived_port(env, (*_SLURM_JOB_KEYS, "SLURM_STEP_ID")),
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
    node = _number(env, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else None


# --------------------------------------------------------------------------------------------------- the checks


def _check(world: World) -> None:
    if world.rank >= world.world_size:
        raise DistributedError(
            f"{world.source}: rank {world.rank} does not exist in a world of {world.world_size} "
            f"(ranks are 0..{world.world_size - 1}); correct the rank or the world size"
        )
    if world.local_size is not None and world.local_rank >= world.local_size:
        raise DistributedError(
            f"{world.source}: local rank {world.local_rank} does not exist among {world.local_size} process(es) on "
            "this host; correct the local rank or the local size"
        )
    if world.local_rank >= world.world_size:
        raise DistributedError(
            f"{world.source}: local rank {world.local_rank} contradicts a world of {world.world_size} process(es)"
        )


def _refuse_stale_single(env: dict[str, str], outer: World | None) -> None:
    """A leftover `WORLD_SIZE=1` under mpirun or srun would have every process train alone, unnoticed."""
    on_purpose = "TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env
    if outer is not None and outer.world_size > 1 and env["WORLD_SIZE"] == "1" and not on_purpose:
        raise DistributedError(
            f"RANK and WORLD_SIZE=1 are set, but {outer.source} started {outer.world_size} processes; unset RANK and "
            "WORLD_SIZE to train on all of them, or set LOCAL_WORLD_SIZE=1 too if each is to train alone"
        )


def _require(env: dict[str, str], names: tuple[str, ...], source: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        present = [name for name in names if name in env]
        raise DistributedError(
            f"{source}: {', '.join(present) or 'its step variables'} set, but {', '.join(missing)} not; start the "
            "script with mpirun or srun so that all are set, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT by hand"
        )


def _number(env: dict[str, str], name: str, least: int = 0, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        value = int(env[name])
    except ValueError:
        value = least - 1
    if value < least:
        raise DistributedError(f"{name}={env[name]!r} is not a whole number of at least {least}; correct or unset it")
    return value


def _port(env: dict[str, str]) -> int | None:
    if "MASTER_PORT" not in env:
        return None
    port = _number(env, "MASTER_PORT", least=1)
    if port > 65535:
        raise DistributedError(f"MASTER_PORT={port} is not a TCP port; use 1024..65535")
    return port


def _derived_port(env: dict[str, str], job_names: tuple[str, ...]) -> int | None:
    """A port that all ranks of one job agree on and that two jobs on a host rarely share."""
    identity = "/".join(f"{name}={env[name]}" for name in job_names if name in env)
    return _DERIVED_PORTS[zlib.crc32(identity.encode()) % len(_DERIVED_PORTS)] if identity else None


# ---------------------------------------------------------------------------------------------------- node lists


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
