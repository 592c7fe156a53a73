"""A group of ranks and the collectives that the library uses on it.

`Group` wraps a torch.distributed process group, or stands for one process alone: with one rank every method is the
identity and torch.distributed need not be initialised, so callers carry no "are we distributed" branch. Ranks in
arguments count within the group. Each collective runs in place on buffers that the caller owns.

Averages: NCCL averages while reducing. gloo cannot, so there the input is divided by the number of ranks first, in
place, as torch's DistributedDataParallel does; the results of the two differ by rounding only.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from deepspeedlite.comm.logger import CommsLogger, comms_logger
from deepspeedlite.errors import DistributedError

_T = TypeVar("_T")
_SUMS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


class Work(Protocol):
    """A collective under way. Its buffers may be touched again after `wait` (on GPUs: by the current stream)."""

    def wait(self) -> Any:
        """Wait for completion; raises what the backend raises when a rank is gone."""


class Group:
    """Ranks that communicate with each other.

    Args:
        process_group: a torch process group this process belongs to. None is the world: all ranks where
            torch.distributed is initialised, else this process alone.
        logger: what measures the collectives while it is enabled; the process's own `comms_logger` by default.

    Raises:
        DistributedError: this process is not a member of `process_group`.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, logger: CommsLogger | None = None) -> None:
        self.process_group = process_group
        self.logger = comms_logger if logger is None else logger
        self.rank = 0
        self.ranks: list[int] = [0]
        self.backend = "none"
        if dist.is_initialized():
            self.rank = dist.get_rank(process_group)
            if self.rank < 0:
                raise DistributedError(
                    f"rank {dist.get_rank()} is not a member of the process group given; make a Group on members only"
                )
            self.ranks = dist.get_process_group_ranks(process_group)
            self.backend = dist.get_backend(process_group)
        elif process_group is not None:
            raise DistributedError(
                "a process group was given, but torch.distributed is not initialised; call "
                "deepspeedlite.init_distributed() first"
            )
        self.size = len(self.ranks)

    @property
    def averages(self) -> bool:
        """Whether the backend itself can average (`ReduceOp.AVG`)."""
        return "nccl" in self.backend

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Work | None:
        """Reduce `tensor` over the ranks in place. `op` is sum, avg, max or min; None is returned unless async."""
        reduce_op = self._reduce_op(op, tensor)
        if self.size == 1:
            return None
        if self.logger.enabled:
            with self.logger.measure("all_reduce", tensor, self.size) as measured:
                return measured.finish(dist.all_reduce(tensor, reduce_op, self.process_group, async_op))
        return dist.all_reduce(tensor, reduce_op, self.process_group, async_op)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> None:
        """Give every rank the values that `tensor` has on rank `src` of this group."""
        if self.size == 1:
            return
        if self.logger.enabled:
            with self.logger.measure("broadcast", tensor, self.size):
                dist.broadcast(tensor, group=self.process_group, group_src=src)
            return
        dist.broadcast(tensor, group=self.process_group, group_src=src)

    def all_gather_into(self, out: torch.Tensor, shard: torch.Tensor, async_op: bool = False) -> Work | None:
        """Concatenate every rank's `shard` (S elements) in rank order into `out` (size * S elements).

        `shard` may be this rank's range of `out` itself.
        """
        if self.size == 1:
            _copy_unless_same(out, shard)
            return None
        if self.logger.enabled:
            with self.logger.measure("all_gather_into_tensor", out, self.size) as measured:
                return measured.finish(dist.all_gather_into_tensor(out, shard, self.process_group, async_op))
        return dist.all_gather_into_tensor(out, shard, self.process_group, async_op)

    def reduce_scatter_into(
        self, out_shard: torch.Tensor, full: torch.Tensor, op: str = "sum", async_op: bool = False
    ) -> Work | None:
        """Reduce `full` (size * S elements) over the ranks; rank r gets the r-th S elements in `out_shard`.

        `out_shard` may be this rank's range of `full` itself. `full` is scratch afterwards: the average divides it
        in place where the backend cannot average.
        """
        reduce_op = self._reduce_op(op, full)
        if self.size == 1:
            _copy_unless_same(out_shard, full)
            return None
        if self.logger.enabled:
            with self.logger.measure("reduce_scatter_tensor", full, self.size) as measured:
                return measured.finish(
                    dist.reduce_scatter_tensor(out_shard, full, reduce_op, self.process_group, async_op)
                )
        return dist.reduce_scatter_tensor(out_shard, full, reduce_op, self.process_group, async_op)

    def all_gather_objects(self, obj: _T) -> list[_T]:
        """Every rank's object, in rank order. Objects are pickled: trusted ranks and small objects only."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, obj, self.process_group)
        return gathered

    def broadcast_object(self, obj: _T, src: int = 0) -> _T:
        """The object that rank `src` of this group passed; what other ranks pass is ignored."""
        if self.size == 1:
            return obj
        box: list[Any] = [obj if self.rank == src else None]
        dist.broadcast_object_list(box, group=self.process_group, group_src=src)
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.size == 1:
            return
        devices = [torch.cuda.current_device()] if "nccl" in self.backend else None
        if self.logger.enabled:
            with self.logger.measure("barrier", None, self.size):
                dist.barrier(self.process_group, device_ids=devices)
            return
        dist.barrier(self.process_group, device_ids=devices)

    def _reduce_op(self, op: str, tensor: torch.Tensor) -> dist.ReduceOp.RedOpType:
        if op not in _SUMS:
            raise DistributedError(f"reduction {op!r} is not known; use {', '.join(_SUMS)}")
        if op == "avg" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise DistributedError(f"an average of {tensor.dtype} has no place for fractions; sum, or convert to float")
        if op == "avg" and self.size > 1 and not self.averages:
            tensor.div_(self.size)
            return dist.ReduceOp.SUM
        return _SUMS[op]


def _copy_unless_same(out: torch.Tensor, source: torch.Tensor) -> None:
    if out.data_ptr() != source.data_ptr():
        out.copy_(source)
