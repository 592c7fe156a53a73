"""Where this process stands in its world, told from the variables that its launcher set.

`discover_world(environ)` is a pure function: it reads a mapping, opens nothing and imports no torch. It knows, in
this order: RANK and WORLD_SIZE (torchrun, our launcher, hand-set), what a plug-in knows of MPI and Slurm, and else a
single process. The first that is present wins, since the inner launcher is the one that started the process: torchrun
under srun, mpirun under sbatch.

Variables that are half-set or contradict each other raise `DistributedError`, which names them and the remedy.
MASTER_ADDR and MASTER_PORT, where set, override what a scheduler implies. `master_addr` stays None when several
hosts are used and no variable tells rank 0's; then only MPI itself (mpi4py) can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.plugins import plugins

LOCALHOST = "127.0.0.1"
# The variable by which ranks get what shows each other that they are of one start: see comm/guard.
JOB_SECRET = "DSL_JOB_SECRET"


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


def discover_world(environ: Mapping[str, str], schedulers: bool = True) -> World:
    """Tell rank, world size and where rank 0 is, from the environment alone.

    Args:
        environ: usually `os.environ`. Empty values count as unset.
        schedulers: False reads only RANK and WORLD_SIZE and never those of MPI or Slurm.

    Raises:
        DistributedError: variables are half-set, are no numbers, or contradict each other.
    """
    env = {name: value.strip() for name, value in environ.items() if value.strip()}
    find = plugins.find("world", "schedulers") if schedulers else None
    outer = find(env) if find is not None else None
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _from_rank_variables(env)
        _refuse_stale_single(env, outer)
    elif outer is not None:
        world = outer
    else:
        if number_in(env, "LOCAL_RANK", least=-1, default=0) > 0:
            raise DistributedError(
                f"LOCAL_RANK={env['LOCAL_RANK']} is set, but RANK and WORLD_SIZE are not; start the script with "
                "torchrun, mpirun, srun or the deepspeedlite launcher, or set all three"
            )
        world = World(0, 1, 0, 1, env.get("MASTER_ADDR"), port_in(env), "single process")
    _check(world)
    return world


# ------------------------------------------------------------------------------------------------- the sources


def _from_rank_variables(env: dict[str, str]) -> World:
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
    if missing:
        present = "RANK" if "RANK" in env else "WORLD_SIZE"
        raise DistributedError(
            f"{present}={env[present]} is set, but {missing[0]} is not; set both, or unset {present} to let the "
            "world be found otherwise (MPI, Slurm, a single process)"
        )
    world_size = number_in(env, "WORLD_SIZE", least=1)
    if "LOCAL_RANK" not in env and world_size > 1:
        raise DistributedError(
            f"RANK={env['RANK']} and WORLD_SIZE={world_size} are set, but LOCAL_RANK, which chooses this process's "
            "device, is not; set LOCAL_RANK to the process's index on its own host"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    return World(
        rank=number_in(env, "RANK"),
        world_size=world_size,
        local_rank=max(0, number_in(env, "LOCAL_RANK", least=-1, default=0)),
        local_size=number_in(env, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in env else None,
        master_addr=env.get("MASTER_ADDR"),
        master_port=port_in(env),
        source="torchrun" if elastic else "RANK and WORLD_SIZE",
    )


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


def number_in(env: dict[str, str], name: str, least: int = 0, default: int | None = None) -> int:
    """A variable's whole number; `DistributedError` for another value, or one below `least`."""
    if name not in env and default is not None:
        return default
    try:
        value = int(env[name])
    except ValueError:
        value = least - 1
    if value < least:
        raise DistributedError(f"{name}={env[name]!r} is not a whole number of at least {least}; correct or unset it")
    return value


def port_in(env: dict[str, str]) -> int | None:
    """What MASTER_PORT says; None where it is not set."""
    if "MASTER_PORT" not in env:
        return None
    port = number_in(env, "MASTER_PORT", least=1)
    if port > 65535:
        raise DistributedError(f"MASTER_PORT={port} is not a TCP port; use 1024..65535")
    return port
