"""How the tensors of a process group travel: one `Transport` for each, chosen by its backend.

`Group` asks a transport. `TorchTransport` hands everything to torch.distributed's collectives, which is right for NCCL;
a plug-in (`runtime.plugins`) may have another for a backend.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

# torch 2.13 renamed both, and warns where the older names are used.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


class Work(Protocol):
    """A collective under way. Its buffers may be touched again after `wait` (on GPUs: by the current stream)."""

    def wait(self) -> Any:
        """Wait for completion; raises what the backend raises when a rank is gone."""


class Transport(Protocol):
    """Starts the collectives of one process group of several ranks; for their arguments see `Group`'s methods."""

    tags: itertools.count[int]
    """Numbers for collectives that must not be mixed up; ranks that take them in the same order get the same."""

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, what: str) -> Work: ...
    def broadcast(self, tensor: torch.Tensor, src: int) -> Work: ...
    def all_gather_into(self, out: torch.Tensor, shard: torch.Tensor, tag: int, final: bool, what: str) -> Work: ...
    def reduce_scatter_into(self, out: torch.Tensor, full: torch.Tensor, op: str, tag: int, what: str) -> Work: ...
    def barrier(self, devices: list[int] | None) -> Work: ...
    def alloc_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor: ...
    def wait_for_readers(self, tensor: torch.Tensor) -> None: ...
    def close(self) -> None: ...


class TorchTransport:
    """torch.distributed's own collectives.

    Args:
        process_group: None is the world. It is not kept alive: what is kept for a process group goes with it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._group: Callable[[], dist.ProcessGroup | None]
        self._group = (lambda: None) if process_group is None else weakref.ref(process_group)
        self.tags = itertools.count(1)

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, what: str) -> Work:
        """Reduce in place."""
        return self._start(dist.all_reduce, tensor, OPS[op])

    def broadcast(self, tensor: torch.Tensor, src: int) -> Work:
        """Send rank `src`'s values."""
        return self._start(dist.broadcast, tensor, group_src=src)

    def all_gather_into(self, out: torch.Tensor, shard: torch.Tensor, tag: int, final: bool, what: str) -> Work:
        """Concatenate shards."""
        return self._start(ALL_GATHER, out, shard)

    def reduce_scatter_into(self, out: torch.Tensor, full: torch.Tensor, op: str, tag: int, what: str) -> Work:
        """Reduce to shards."""
        return self._start(REDUCE_SCATTER, out, full, OPS[op])

    def barrier(self, devices: list[int] | None) -> Work:
        """Wait for all."""
        return self._start(dist.barrier, device_ids=devices)

    def alloc_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A new tensor."""
        return torch.empty(numel, dtype=dtype, device=device)

    def wait_for_readers(self, tensor: torch.Tensor) -> None:
        """Nothing is read but what a collective has been given."""

    def close(self) -> None:
        """Nothing is kept."""

    def _start(self, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Work:
        work: Work = collective(*tensors, group=self._group(), async_op=True, **options)
        return work


def copy_unless_same(out: torch.Tensor, source: torch.Tensor) -> None:
    """Copy, but not in place."""
    if out.data_ptr() != source.data_ptr():
        out.copy_(source)
