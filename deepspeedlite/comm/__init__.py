"""Communication between ranks: start-up, groups, and the few functions that scripts call by themselves.

`init_distributed` starts torch.distributed wherever the process finds itself; `Group` is what the library's parts
communicate through; the functions here are thin and work on the default group, or answer for one process alone
before `init_distributed`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.comm.group import Group, Work
from deepspeedlite.comm.init import default_timeout, init_distributed
from deepspeedlite.comm.logger import CommsLogger, comms_logger
from deepspeedlite.comm.stall import whereabouts
from deepspeedlite.env import discover_world

__all__ = [
    "CommsLogger",
    "Group",
    "Work",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "comms_logger",
    "default_timeout",
    "destroy_process_group",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
    "log_summary",
    "whereabouts",
]


def is_initialized() -> bool:
    """Whether torch.distributed is up in this process."""
    return bool(dist.is_available() and dist.is_initialized())


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group (None: the world); 0 before `init_distributed`."""
    return dist.get_rank(group) if is_initialized() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group (None: the world); 1 before `init_distributed`."""
    return dist.get_world_size(group) if is_initialized() else 1


def get_local_rank() -> int:
    """This process's index on its host.

    It is what LOCAL_RANK says, else what MPI or Slurm say. A script that set up torch.distributed with neither has
    chosen its GPU itself, and that GPU's number is the answer; otherwise 0.
    """
    if os.environ.get("LOCAL_RANK", "").strip():
        return max(0, int(os.environ["LOCAL_RANK"]))
    told = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    world = discover_world(told)
    if world.world_size == 1 and is_initialized() and torch.cuda.is_initialized():
        return torch.cuda.current_device()
    return world.local_rank


def all_reduce(
    tensor: torch.Tensor, op: str = "sum", group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Work | None:
    """See `Group.all_reduce`."""
    return Group(group).all_reduce(tensor, op, async_op)


def broadcast(tensor: torch.Tensor, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """See `Group.broadcast`; `src` is a rank of the world, as in torch."""
    Group(group).broadcast(tensor, src if group is None else dist.get_group_rank(group, src))


def all_gather_object(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """See `Group.all_gather_objects`."""
    return Group(group).all_gather_objects(obj)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """See `Group.barrier`."""
    Group(group).barrier()


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """End the group (None: all of torch.distributed); nothing happens where none is up."""
    if is_initialized():
        dist.destroy_process_group(group)


def log_summary(show_straggler: bool = False) -> None:
    """Print the table of measured collectives on rank 0; with `show_straggler` every rank must call."""
    comms_logger.log_summary(show_straggler)
