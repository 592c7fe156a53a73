"""Communication between ranks: start-up, groups, and who waits for whom.

`init_distributed` starts torch.distributed wherever the process finds itself; `Group` is what the library's parts
communicate through. What asks about ranks answers for one process alone before `init_distributed`. The functions that
scripts call by themselves, under DeepSpeed's names, are `compat.comm`'s; `deepspeedlite.comm` serves them too.
"""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import cuda  # not torch: importing DeepSpeed's module comm.torch puts that in the name's place

from deepspeedlite.comm.desync import whereabouts
from deepspeedlite.comm.group import Group
from deepspeedlite.comm.init import default_timeout, init_distributed
from deepspeedlite.comm.logger import CommsLogger, comms_logger
from deepspeedlite.comm.work import Work
from deepspeedlite.runtime.env import discover_world

__all__ = [
    "CommsLogger",
    "Group",
    "Work",
    "comms_logger",
    "default_timeout",
    "destroy_process_group",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
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
    if world.world_size == 1 and is_initialized() and cuda.is_initialized():
        return cuda.current_device()
    return world.local_rank


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """End the group (None: all of torch.distributed); nothing happens where none is up."""
    if is_initialized():
        dist.destroy_process_group(group)
