"""Pure functions that turn launch options into each rank's command line and environment.

Nothing here looks at the machine, so every backend (local now, ssh, MPI and Slurm later) builds its ranks with
these, and `--dry_run` shows exactly what would run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LaunchOptions:
    """What the user asked for, checked for form but not yet against the machine."""

    script: str
    script_args: tuple[str, ...] = ()
    num_gpus: int | None = None  # None: every GPU there is, or one CPU rank
    master_addr: str = "127.0.0.1"
    master_port: int | None = None  # None: 29500 unless it is busy; 0: any free port
    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    log_dir: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class RankCommand:
    """One process to start: its place in the world, its command, and the variables it gets beyond the launcher's."""

    rank: int
    local_rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """Everything an agent needs to run one node's ranks."""

    ranks: tuple[RankCommand, ...]
    log_dir: str | None = None
    notes: tuple[str, ...] = ()  # said once before the start
    details: tuple[str, ...] = field(default=())  # the same, at debug level


def rank_argv(options: LaunchOptions, local_rank: int, python: str) -> tuple[str, ...]:
    """The command line of one rank; the script's own arguments follow untouched."""
    if options.no_python:
        start = [options.script]
    elif options.module:
        start = [python, "-m", options.script]
    else:
        start = [python, options.script]
    if not options.no_local_rank:
        start.append(f"--local_rank={local_rank}")
    return (*start, *options.script_args)


@dataclass(frozen=True)
class NodePlace:
    """Where one node's ranks stand in the world. A single machine is node 0 of 1."""

    local_size: int
    first_rank: int = 0
    world_size: int | None = None  # None: this node is the whole world
    node_rank: int = 0
    num_nodes: int = 1


def rank_environment(place: NodePlace, local_rank: int, master_addr: str, master_port: int) -> dict[str, str]:
    """The variables that torch.distributed and scripts written for DeepSpeed read to find their place."""
    world_size = place.local_size if place.world_size is None else place.world_size
    values = {
        "RANK": place.first_rank + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": place.local_size,
        "LOCAL_SIZE": place.local_size,
        "CROSS_RANK": place.node_rank,
        "CROSS_SIZE": place.num_nodes,
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": master_port,
    }
    return {name: str(value) for name, value in values.items()}


def defaults_environment(environ: Mapping[str, str], local_size: int, on_cpu: bool, cores: int) -> dict[str, str]:
    """Variables that only fill a gap: what the user has set already stays as it is."""
    values = {"PYTHONUNBUFFERED": "1"}  # a rank that dies must not take its last lines with it
    if on_cpu:
        values["OMP_NUM_THREADS"] = str(max(1, cores // local_size))  # else each rank takes every core
    return {name: value for name, value in values.items() if name not in environ}


def shell_line(command: RankCommand) -> str:
    """The command as one could paste it into a shell, its variables in front."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    return " ".join([*variables, shlex.join(command.argv)])
