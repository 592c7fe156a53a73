"""A group of ranks and the collectives that the library uses on it.

`Group` stands for a torch.distributed process group, or for one process alone: with one rank every method is the
identity and torch.distributed need not be initialised, so callers carry no "are we distributed" branch. Ranks in
arguments count within the group. Each collective runs in place on buffers that the caller owns.

How tensors travel is the transport's business (`comm.transport`); what a group adds is that every collective has a
label, under which errors and notices name it, and that an observer may measure it.

Averages: NCCL averages while reducing. gloo cannot, so there the input is divided by the number of ranks first, in
place, as torch's DistributedDataParallel does; the results of the two differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from deepspeedlite.comm.desync import LabelledWork
from deepspeedlite.comm.guard import objects
from deepspeedlite.comm.registry import registry
from deepspeedlite.comm.roll_call import LEFT_ALONE_S, absent_ranks
from deepspeedlite.comm.transport import OPS, TorchTransport, Transport, Work, copy_unless_same
from deepspeedlite.runtime.device import accelerator, on_accelerator
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.plugins import plugins

_T = TypeVar("_T")


class Observer(Protocol):
    """Who is told of a group's collectives, such as `metrics.comms_logger`."""

    @property
    def enabled(self) -> bool:
        """Whether it wants to be told."""

    def observe(
        self, op: str, message: torch.Tensor | None, ranks: int, call: Callable[[], Work | None]
    ) -> Work | None:
        """Make the call, which is `op` on a message over a number of ranks, and give back its result or a like one."""


class Group:
    """Ranks that communicate with each other.

    Args:
        process_group: a torch process group this process belongs to. None is the world: all ranks where
            torch.distributed is initialised, else this process alone.
        observer: is told of every collective while it is enabled.

    Raises:
        DistributedError: this process is not a member of `process_group`.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, observer: Observer | None = None) -> None:
        self.process_group, self._observer = process_group, observer
        self._left_alone: set[str] = set()  # calls that the other ranks did not make the last time
        self.rank, self.ranks, self.backend = 0, [0], "none"
        self.transport: Transport = TorchTransport(None)  # which never moves anything
        if dist.is_initialized():
            self.rank = dist.get_rank(process_group)
            if self.rank < 0:
                raise DistributedError(
                    f"rank {dist.get_rank()} is not a member of the process group given; make a Group on members only"
                )
            self.ranks = dist.get_process_group_ranks(process_group)
            self.backend = dist.get_backend(process_group)
            self.transport = registry.transport(process_group, _make_transport)
        elif process_group is not None:
            raise DistributedError(
                "a process group was given, but torch.distributed is not initialised; call "
                "deepspeedlite.init_distributed() first"
            )
        self.size = len(self.ranks)

    @classmethod
    def alone(cls) -> Group:
        """This process alone, whatever the world is: nothing is communicated."""
        group = cls.__new__(cls)
        group.process_group, group._observer, group._left_alone = None, None, set()
        group.rank, group.size, group.backend = 0, 1, "none"
        group.ranks = [dist.get_rank() if dist.is_initialized() else 0]
        group.transport = TorchTransport(None)
        return group

    @property
    def tags(self) -> Iterator[int]:
        """Numbers for collectives that must not be mixed up; ranks that take them in the same order get the same."""
        return self.transport.tags

    @property
    def averages(self) -> bool:
        """Whether the backend itself can average (`ReduceOp.AVG`)."""
        return "nccl" in self.backend

    @property
    def device(self) -> torch.device:
        """Where tensors that no other one decides about must be, to be communicated."""
        device = accelerator()
        return device.current if device.is_accelerator and device.backend in self.backend else torch.device("cpu")

    # `label` says in an error what was to be moved. `tag` tells apart, on gloo, collectives that must not be mixed up
    # when ranks are out of step: messages of different tags never meet.

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False, label: str = "") -> Work | None:
        """Reduce `tensor` over the ranks in place. `op` is sum, avg, max or min; None is returned unless async."""
        op = self._prepare(op, tensor)
        if self.size == 1:
            return None

        def start() -> Work:
            return self.transport.all_reduce(tensor, op, async_op, label)

        return self._run("all_reduce", tensor, async_op, start, label)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> None:
        """Give every rank the values that `tensor` has on rank `src` of this group."""
        if self.size > 1:
            self._run("broadcast", tensor, False, lambda: self.transport.broadcast(tensor, src))

    def all_gather_into(
        self,
        out: torch.Tensor,
        shard: torch.Tensor,
        async_op: bool = False,
        label: str = "",
        tag: int = 0,
        final: bool = False,
    ) -> Work | None:
        """Concatenate every rank's `shard` (S elements) in rank order into `out` (size * S elements).

        `shard` may be this rank's range of `out` itself. `final`: it will not be written before
        `wait_for_readers(shard)`, so that where it is shared memory it is sent without a copy.
        """
        if self.size == 1:
            copy_unless_same(out, shard)
            return None

        def start() -> Work:
            return self.transport.all_gather_into(out, shard, tag, final, label)

        return self._run("all_gather_into_tensor", out, async_op, start, label)

    def reduce_scatter_into(
        self,
        out_shard: torch.Tensor,
        full: torch.Tensor,
        op: str = "sum",
        async_op: bool = False,
        label: str = "",
        tag: int = 0,
    ) -> Work | None:
        """Reduce `full` (size * S elements) over the ranks; rank r gets the r-th S elements in `out_shard`.

        `out_shard` may be this rank's range of `full` itself. `full` is scratch afterwards: the average divides it
        in place where the backend cannot average.
        """
        op = self._prepare(op, full)
        if self.size == 1:
            copy_unless_same(out_shard, full)
            return None

        def start() -> Work:
            return self.transport.reduce_scatter_into(out_shard, full, op, tag, label)

        return self._run("reduce_scatter_tensor", full, async_op, start, label)

    def alloc_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor, of arbitrary content, for what is to be sent: by `reduce_scatter_into`, or as a final shard.

        Where ranks share memory it lies there and is sent without a copy: what was sent is not to be written before
        `wait_for_readers`. Its memory is used for others when no view of it is left. Elsewhere it is a new tensor.
        Collective the first time.
        """
        return self.transport.alloc_shared(numel, dtype, device)

    def wait_for_readers(self, tensor: torch.Tensor) -> None:
        """Return when no rank reads `tensor`, shared memory that was sent as final, any more."""
        self.transport.wait_for_readers(tensor)

    def all_gather_objects(self, obj: _T) -> list[_T]:
        """Every rank's object, in rank order: plain data and tensors, which come as CPU ones (`comm.guard.objects`)."""
        return [obj] if self.size == 1 else objects.all_gather(obj, self.process_group, self.device)

    def gather_objects(self, obj: _T, dst: int = 0) -> list[_T]:
        """Every rank's object, in rank order, on rank `dst` of this group; an empty list elsewhere."""
        return [obj] if self.size == 1 else objects.gather(obj, dst, self.process_group, self.device)

    def broadcast_object(self, obj: _T, src: int = 0) -> _T:
        """The object that rank `src` of this group passed; what other ranks pass is ignored."""
        return self.all_gather_objects(obj if self.rank == src or self.size == 1 else None)[src]  # type: ignore[return-value]

    def roll_call(self, call: str, key: str, weight: int = 0) -> str:
        """Wait a few seconds until every rank has made the same call, before it communicates; see `comm.roll_call`.

        Returns:
            the ranks that have not come, to be read ("rank 1, 3"); empty if all have.
        """
        patience_s = LEFT_ALONE_S if key in self._left_alone else None
        missing = absent_ranks(self.ranks, call, key, weight, patience_s) if self.size > 1 else []
        if not missing:
            self._left_alone.discard(key)
            return ""
        self._left_alone.add(key)
        return "rank " + ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            device = self.device
            devices = [device.index] if on_accelerator(device) else None
            self._run("barrier", None, False, lambda: self.transport.barrier(devices))

    def _run(
        self, name: str, tensor: torch.Tensor | None, async_op: bool, start: Callable[[], Work], label: str = ""
    ) -> Work | None:
        def call() -> Work | None:
            what = label or (f"{tensor.numel()} elements" if tensor is not None else "all ranks")
            labelled = LabelledWork(start(), f"{name} of {what}", self.ranks)
            if async_op:
                return labelled
            labelled.wait()
            return None

        observer = self._observer
        return call() if observer is None or not observer.enabled else observer.observe(name, tensor, self.size, call)

    def _prepare(self, op: str, tensor: torch.Tensor) -> str:
        """The reduction that the backend is asked for; where it cannot average, `tensor` is divided first."""
        if op not in OPS:
            raise DistributedError(f"reduction {op!r} is not known; use {', '.join(OPS)}")
        if op == "avg" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise DistributedError(f"an average of {tensor.dtype} has no place for fractions; sum, or convert to float")
        if op == "avg" and self.size > 1 and not self.averages:
            tensor.div_(self.size)
            return "sum"
        return op


def _make_transport(process_group: dist.ProcessGroup | None) -> Transport:
    """The transport for a process group's backend; None is the world."""
    is_one = dist.get_world_size(process_group) == 1
    make = None if is_one else plugins.find("transport", dist.get_backend(process_group))
    return TorchTransport(process_group) if make is None else make(process_group)
