"""Which rank this process is: answered for one process alone before torch.distributed is up."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import cuda

from deepspeedlite.comm.registry import registry
from deepspeedlite.runtime.env import discover_world


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
        if group is None:
            registry.close()  # while the process groups are there, by which it finds what to close
        dist.destroy_process_group(group)
