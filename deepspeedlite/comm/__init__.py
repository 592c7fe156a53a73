"""Communication between ranks: start-up, groups, and the few functions that scripts call by themselves.

`init_distributed` starts torch.distributed wherever the process finds itself; `Group` is what the library's parts
communicate through; `collectives` are the functions that scripts call, under DeepSpeed's names. What asks about ranks
answers for one process alone before `init_distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import cuda  # not torch: importing DeepSpeed's module comm.torch puts that in the name's place
from torch.distributed import ProcessGroup, ReduceOp

from deepspeedlite.comm.collectives import (
    P2POp,
    all_gather,
    all_gather_coalesced,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    all_to_all_single,
    allgather_fn,
    barrier,
    batch_isend_irecv,
    broadcast,
    broadcast_object_list,
    gather,
    inference_all_reduce,
    irecv,
    isend,
    monitored_barrier,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_fn,
    reduce_scatter_tensor,
    scatter,
    send,
)
from deepspeedlite.comm.desync import whereabouts
from deepspeedlite.comm.group import Group, Work
from deepspeedlite.comm.init import default_timeout, init_distributed
from deepspeedlite.comm.logger import CommsLogger, comms_logger
from deepspeedlite.runtime.env import discover_world

__all__ = [
    "CommsLogger",
    "Group",
    "P2POp",
    "ProcessGroup",
    "ReduceOp",
    "Work",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "allgather_fn",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "comms_logger",
    "configure",
    "default_timeout",
    "destroy_process_group",
    "gather",
    "get_all_ranks_from_group",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "has_all_gather_into_tensor",
    "has_all_reduce_coalesced",
    "has_coalescing_manager",
    "has_reduce_scatter_tensor",
    "inference_all_reduce",
    "init_distributed",
    "initialize_mesh_device",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "log_summary",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_fn",
    "reduce_scatter_tensor",
    "reset_log",
    "scatter",
    "send",
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


# --- groups -----------------------------------------------------------------------------------------------------------


def is_available() -> bool:
    """Whether this torch can communicate at all."""
    return dist.is_available()


def new_group(ranks: Sequence[int] | None = None) -> Any:
    """A process group of these ranks of the world; every rank of the world calls, in the same order."""
    return dist.new_group(None if ranks is None else list(ranks))


def get_world_group() -> Any:
    """The group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: dist.ProcessGroup | None = None, group_rank: int = 0) -> int:
    """The rank of the world that is `group_rank` in the group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: dist.ProcessGroup | None = None) -> list[int]:
    """The group's ranks of the world, in its own order."""
    return list(dist.get_process_group_ranks(group))


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
    """All ranks as a grid with named dimensions, of which each has groups: torch's DeviceMesh."""
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    return init_device_mesh(device, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def has_all_gather_into_tensor() -> bool:
    """True, as of the three below: every torch that this library runs on has it."""
    return True


has_reduce_scatter_tensor = has_all_reduce_coalesced = has_coalescing_manager = has_all_gather_into_tensor


# --- the log ----------------------------------------------------------------------------------------------------------


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Set up the log of collectives, from a configuration's `comms_logger` section or switch by switch."""
    section = getattr(deepspeed_config, "comms_logger", None)
    if section is not None:
        comms_logger.configure(section)
    given = {"enabled": enabled, "prof_all": prof_all, "verbose": verbose, "debug": debug}
    given["prof_ops"] = None if prof_ops is None else tuple(prof_ops)  # type: ignore[assignment]
    for name, value in given.items():
        if value is not None:
            setattr(comms_logger, name, value)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, dict[int, list[float]]] | None:
    """Print the table of measured collectives on rank 0; with `show_straggler` every rank must call.

    `return_dict`: also return {operation: {bytes: [calls, total ms, mean ms]}}.
    """
    comms_logger.log_summary(show_straggler)
    if not return_dict:
        return None
    found: dict[str, dict[int, list[float]]] = {}
    for (op, size_bytes), one in comms_logger.stats.items():
        found.setdefault(op, {})[size_bytes] = [one.count, one.total_ms, one.mean_ms]
    return found


def reset_log() -> None:
    """Forget what was measured."""
    comms_logger.reset()
