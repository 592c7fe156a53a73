"""A group of ranks and the collectives that the library uses on it.

`Group` wraps a torch.distributed process group, or stands for one process alone: with one rank every method is the
identity and torch.distributed need not be initialised, so callers carry no "are we distributed" branch. Ranks in
arguments count within the group. Each collective runs in place on buffers that the caller owns.

Averages: NCCL averages while reducing. gloo cannot, so there the input is divided by the number of ranks first, in
place, as torch's DistributedDataParallel does; the results of the two differ by rounding only.

[Note: shards on gloo]
gloo's own reduce-scatter and all-gather move the whole buffer several times through one thread. Here every rank sends
each other rank its piece directly, which is the least that can be sent, and a reduce-scatter adds up the pieces it was
sent in rank order, in fp32 for 16-bit gradients. Where all ranks are on one host the pieces go through memory that they
share (`comm.shared_memory`), and so does an all-reduce of more than a few kilobytes: its shards are reduced, then
gathered. One of 16-bit numbers always goes this way, because gloo's own rounds to 16 bits at every hop.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepspeedlite.comm.desync import LabelledWork, explained
from deepspeedlite.comm.logger import CommsLogger, comms_logger
from deepspeedlite.comm.roll_call import LEFT_ALONE_S, absent_ranks
from deepspeedlite.comm.shared_memory import SharedMemoryLink, link_of
from deepspeedlite.comm.work import PendingWork, Work
from deepspeedlite.runtime.errors import DistributedError

# torch 2.13 renamed both, and warns where the older names are used.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_T = TypeVar("_T")
_SUMS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "avg": dist.ReduceOp.AVG}


# Smaller all-reduces are one message of gloo's rather than two of a link's.
_SPLIT_FROM_NBYTES = 1 << 16
# The tags of an all-reduce's two halves, and of one of extremes, which no caller counts up to.
_SUMMED, _GATHERED, _AGREED = 1 << 29, (1 << 29) + 1, (1 << 29) + 2
_EXTREMES = {"max": torch.maximum, "min": torch.minimum}

# Numbers for what must not be mixed up on a process group, whichever `Group` of it counts.
_TAGS: weakref.WeakKeyDictionary[Any, itertools.count[int]] = weakref.WeakKeyDictionary()

# gloo's finished collectives that Python holds on to: see the note on the interpreter's end in `comm.init`.
_KEPT: deque[Any] = deque(maxlen=2)


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
        self._left_alone: set[str] = set()  # calls that the other ranks did not make the last time
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
        self.tags = itertools.count(1)
        """Numbers for collectives that must not be mixed up; ranks that take them in the same order get the same."""
        if dist.is_initialized():
            self.tags = _TAGS.setdefault(process_group or dist.distributed_c10d._get_default_group(), self.tags)

    @classmethod
    def alone(cls, logger: CommsLogger | None = None) -> Group:
        """This process alone, whatever the world is: nothing is communicated."""
        group = cls.__new__(cls)
        group.process_group, group.logger = None, comms_logger if logger is None else logger
        group._left_alone = set()
        group.rank, group.size, group.backend = 0, 1, "none"
        group.ranks = [dist.get_rank() if dist.is_initialized() else 0]
        group.tags = itertools.count(1)
        return group

    @property
    def averages(self) -> bool:
        """Whether the backend itself can average (`ReduceOp.AVG`)."""
        return "nccl" in self.backend

    @property
    def device(self) -> torch.device:
        """Where tensors that no other one decides about must be, to be communicated."""
        return torch.device("cuda", torch.cuda.current_device()) if "nccl" in self.backend else torch.device("cpu")

    # `label` says in an error what was to be moved. `tag` tells apart, on gloo, collectives that must not be mixed up
    # when ranks are out of step: messages of different tags never meet.

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False, label: str = "") -> Work | None:
        """Reduce `tensor` over the ranks in place. `op` is sum, avg, max or min; None is returned unless async."""
        reduce_op = self._reduce_op(op, tensor)
        if self.size == 1:
            return None

        def start() -> Work:
            if op in _EXTREMES and not async_op and tensor.is_contiguous() and self._link(tensor) is not None:
                # What ranks agree on: by the link, where it is told from what others wait for.
                then = partial(_extreme_into, tensor, _EXTREMES[op])
                return self._swap([tensor] * self.size, [tensor] * self.size, _AGREED, then, what=label)
            if reduce_op == dist.ReduceOp.SUM and self._is_better_split(tensor):
                return self._split_all_reduce(list(tensor.view(-1).tensor_split(self.size)), label)
            return self._kept(dist.all_reduce, tensor, reduce_op)

        return self._run("all_reduce", tensor, async_op, start, label)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> None:
        """Give every rank the values that `tensor` has on rank `src` of this group."""
        if self.size > 1:
            self._run("broadcast", tensor, False, lambda: self._kept(dist.broadcast, tensor, group_src=src))

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
            _copy_unless_same(out, shard)
            return None

        def start() -> Work:
            if self.backend != "gloo":
                return self._kept(_ALL_GATHER, out, shard)
            pieces = list(out.view(self.size, shard.numel()))
            own = shard if final else pieces[self.rank]
            if not final:
                _copy_unless_same(own, shard)
            then = partial(_copy_all, pieces)
            return self._swap([own] * self.size, pieces, tag, then, in_place=True, final=final, what=label)

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
        reduce_op = self._reduce_op(op, full)
        if self.size == 1:
            _copy_unless_same(out_shard, full)
            return None

        def start() -> Work:
            if self.backend != "gloo" or reduce_op != dist.ReduceOp.SUM:
                return self._kept(_REDUCE_SCATTER, out_shard, full, reduce_op)
            pieces = list(full.view(self.size, out_shard.numel()))
            return self._sum_pieces(pieces, out_shard, tag, label)

        return self._run("reduce_scatter_tensor", full, async_op, start, label)

    def alloc_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor, of arbitrary content, for what is to be sent: by `reduce_scatter_into`, or as a final shard.

        Where ranks share memory it lies there and is sent without a copy: what was sent is not to be written before
        `wait_for_readers`. Its memory is used for others when no view of it is left. Elsewhere it is a new tensor.
        Collective the first time.
        """
        link = self._connected() if self._may_share(device) and numel else None
        if link is None:
            return torch.empty(numel, dtype=dtype, device=device)
        return link.alloc_shared(numel * dtype.itemsize).view(dtype)

    def wait_for_readers(self, tensor: torch.Tensor) -> None:
        """Return when no rank reads `tensor`, shared memory that was sent as final, any more."""
        if self._may_share(tensor.device) and (link := self._connected()) is not None:
            with explained("other ranks to read a shard", self.ranks):
                link.wait_for_readers(tensor)

    def all_gather_objects(self, obj: _T) -> list[_T]:
        """Every rank's object, in rank order. Objects are pickled: trusted ranks and small objects only."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, obj, self.process_group)
        return gathered

    def gather_objects(self, obj: _T, dst: int = 0) -> list[_T]:
        """Every rank's object, in rank order, on rank `dst` of this group; an empty list elsewhere."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.size if self.rank == dst else None
        dist.gather_object(obj, gathered, group=self.process_group, group_dst=dst)
        return gathered or []

    def broadcast_object(self, obj: _T, src: int = 0) -> _T:
        """The object that rank `src` of this group passed; what other ranks pass is ignored."""
        if self.size == 1:
            return obj
        box: list[Any] = [obj if self.rank == src else None]
        dist.broadcast_object_list(box, group=self.process_group, group_src=src)
        return box[0]

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
        if self.size == 1:
            return
        devices = [self.device.index] if "nccl" in self.backend else None
        self._run("barrier", None, False, lambda: self._kept(dist.barrier, device_ids=devices))

    def _run(
        self,
        name: str,
        tensor: torch.Tensor | None,
        async_op: bool,
        start: Callable[[], Work],
        label: str = "",
    ) -> Work | None:
        if not self.logger.enabled:
            return self._finish(name, tensor, async_op, start(), label)
        with self.logger.measure(name, tensor, self.size) as measured:
            work = self._finish(name, tensor, async_op, start(), label)
            return None if work is None else measured.finish(work)

    def _finish(self, name: str, tensor: torch.Tensor | None, async_op: bool, work: Work, label: str) -> Work | None:
        what = label or (f"{tensor.numel()} elements" if tensor is not None else "all ranks")
        labelled = LabelledWork(work, f"{name} of {what}", self.ranks)
        if async_op:
            return labelled
        labelled.wait()
        return None

    def _kept(self, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Work:
        work = collective(*tensors, group=self.process_group, async_op=True, **options)
        if self.backend == "gloo":
            _KEPT.append(work)
        return work

    def _link(self, tensor: torch.Tensor) -> SharedMemoryLink | None:
        return self._connected() if self._may_share(tensor.device) else None

    def _may_share(self, device: torch.device) -> bool:
        return self.size > 1 and self.backend == "gloo" and device.type == "cpu"

    def _connected(self) -> SharedMemoryLink | None:
        with explained("the first shards of this group, to share memory", self.ranks):
            return link_of(self.process_group, self.rank, self.size)

    def _is_better_split(self, tensor: torch.Tensor) -> bool:
        """Whether an all-reduce is to be made of its two halves; alike on all ranks."""
        # gloo's own all-reduce takes tensors of a GPU; its messages do not.
        if not self._may_share(tensor.device) or not tensor.is_contiguous() or tensor.numel() < self.size:
            return False
        is_16_bit = tensor.is_floating_point() and tensor.dtype.itemsize == 2
        return is_16_bit or (tensor.nbytes >= _SPLIT_FROM_NBYTES and self._link(tensor) is not None)

    def _split_all_reduce(self, pieces: list[torch.Tensor], what: str) -> Work:
        own = pieces[self.rank]
        then = partial(_copy_all, pieces)
        return PendingWork(
            [self._sum_pieces(pieces, own, _SUMMED, what)],
            lambda: self._swap([own] * self.size, pieces, _GATHERED, then, in_place=True, what=what).wait(),
        )

    def _sum_pieces(self, pieces: list[torch.Tensor], out: torch.Tensor, tag: int, what: str) -> Work:
        """Send every rank its piece, for good; `out` becomes the sum of what all have sent here."""
        return self._swap(pieces, [pieces[self.rank]] * self.size, tag, partial(_sum_into, out), final=True, what=what)

    def _swap(
        self,
        outbox: Sequence[torch.Tensor],
        expect: Sequence[torch.Tensor],
        tag: int,
        then: Callable[[list[torch.Tensor]], None],
        in_place: bool = False,
        final: bool = False,
        what: str = "",
    ) -> Work:
        """Send `outbox[r]` to every other rank r; what comes from it, shaped as `expect[r]`, is given to `then`.

        All pieces are empty, or none is. `in_place`: what comes from r may be received in `expect[r]` itself. `final`:
        what is sent is not written again before every rank has read it, so need not be copied.
        """
        link = self._link(outbox[0])
        if link is not None:
            return link.exchange(outbox, expect, tag, then, final, what)
        inbox = [
            outbox[rank] if rank == self.rank else piece if in_place else torch.empty_like(piece)
            for rank, piece in enumerate(expect)
        ]
        return PendingWork(self._send_and_receive(outbox, inbox, tag), partial(then, inbox))

    def _send_and_receive(self, outbox: Sequence[torch.Tensor], inbox: Sequence[torch.Tensor], tag: int) -> list[Any]:
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        if not outbox[0].numel():
            return []
        receives = [dist.irecv(inbox[rank], group=self.process_group, group_src=rank, tag=tag) for rank in others]
        sends = [dist.isend(outbox[rank], group=self.process_group, group_dst=rank, tag=tag) for rank in others]
        return receives + sends

    def _reduce_op(self, op: str, tensor: torch.Tensor) -> dist.ReduceOp.RedOpType:
        if op not in _SUMS:
            raise DistributedError(f"reduction {op!r} is not known; use {', '.join(_SUMS)}")
        if op == "avg" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise DistributedError(f"an average of {tensor.dtype} has no place for fractions; sum, or convert to float")
        if op == "avg" and self.size > 1 and not self.averages:
            tensor.div_(self.size)
            return dist.ReduceOp.SUM
        return _SUMS[op]


def _sum_into(out: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """The pieces' sum in the order given, accumulated in fp32 where they are 16-bit. `out` may be one of them."""
    if len(pieces) == 2:
        torch.add(pieces[0], pieces[1], out=out)
        return
    total = pieces[0].float() if pieces[0].dtype.itemsize < 4 else pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    out.copy_(total)


def _extreme_into(out: torch.Tensor, extreme: Callable[..., torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
    out.copy_(functools.reduce(extreme, pieces))


def _copy_all(out: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor]) -> None:
    for view, piece in zip(out, pieces):
        _copy_unless_same(view, piece)


def _copy_unless_same(out: torch.Tensor, source: torch.Tensor) -> None:
    if out.data_ptr() != source.data_ptr():
        out.copy_(source)
