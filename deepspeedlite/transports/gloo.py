"""Gloo's transport: shards go from rank to rank by an `Exchange`, gloo's messages or memory that ranks of a host share.

[Note: shards on gloo]
gloo's own reduce-scatter and all-gather move the whole buffer several times through one thread. Here every rank sends
each other rank its piece directly, which is the least that can be sent, and a reduce-scatter adds up the pieces it was
sent in rank order, in fp32 for 16-bit gradients. Where all ranks are on one host the pieces go through memory that they
share (`transports.shared_memory`), and so does an all-reduce of more than a few kilobytes: its shards are reduced, then
gathered. One of 16-bit numbers always goes this way, because gloo's own rounds to 16 bits at every hop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deepspeedlite.comm.desync import explained
from deepspeedlite.comm.registry import registry
from deepspeedlite.comm.transport import TorchTransport, Work, copy_unless_same
from deepspeedlite.transports.pending import PendingWork
from deepspeedlite.transports.shared_memory import Pieces, SharedMemoryLink, connect

# Smaller all-reduces are one message of gloo's rather than two of a link's.
_SPLIT_FROM_NBYTES = 1 << 16
# The tags of an all-reduce's two halves, and of one of extremes, which no caller counts up to.
_SUMMED, _GATHERED, _AGREED = 1 << 29, (1 << 29) + 1, (1 << 29) + 2
_EXTREMES = {"max": torch.maximum, "min": torch.minimum}


class Exchange(Protocol):
    """A way from every rank to every other."""

    def exchange(self, pieces: Pieces) -> Work:
        """Send every other rank its piece, and take what comes."""


class GlooMessages:
    """gloo's own messages, over TCP."""

    def __init__(self, group: Callable[[], dist.ProcessGroup | None], rank: int, size: int) -> None:
        self._group, self._rank, self._size = group, rank, size

    def exchange(self, pieces: Pieces) -> Work:
        """See `Exchange`."""
        outbox, tag = pieces.outbox, pieces.tag
        inbox = [
            outbox[rank] if rank == self._rank else piece if pieces.in_place else torch.empty_like(piece)
            for rank, piece in enumerate(pieces.expect)
        ]
        works: list[Any] = []
        if outbox[0].numel():
            group = self._group()
            others = [(self._rank + step) % self._size for step in range(1, self._size)]
            works += [dist.irecv(inbox[rank], group=group, group_src=rank, tag=tag) for rank in others]
            works += [dist.isend(outbox[rank], group=group, group_dst=rank, tag=tag) for rank in others]
        return PendingWork(works, partial(pieces.then, inbox))


class GlooTransport(TorchTransport):
    """Shards by exchanges, see the note; the rest by gloo's collectives."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        super().__init__(process_group)
        self._rank, self._ranks = dist.get_rank(process_group), dist.get_process_group_ranks(process_group)
        self._messages = GlooMessages(self._group, self._rank, len(self._ranks))
        # Shared memory, once it was asked for: None where not all ranks are on one host, or some rank keeps to TCP.
        self._link: SharedMemoryLink | None = None
        self._is_connected = False

    @property
    def link(self) -> SharedMemoryLink | None:
        """The memory that the ranks share; None where they cannot. Collective the first time."""
        if not self._is_connected:
            with explained("the first shards of this group, to share memory", self._ranks):
                self._link = connect(self._group(), self._rank, len(self._ranks))
            self._is_connected = True
        return self._link

    def _link_on(self, device: torch.device) -> SharedMemoryLink | None:
        return self.link if device.type == "cpu" else None

    def _link_of_small(self, tensor: torch.Tensor, op: str) -> SharedMemoryLink | None:
        """What takes a whole all-reduce in one exchange.

        By it, what ranks agree on is told from what others wait for, and a small sum takes a fraction of gloo's time.
        That is nothing to connect for: a rank that waits would then not say for which sum.
        """
        if op in _EXTREMES:
            return self._link_on(tensor.device)
        is_small = op == "sum" and 0 < tensor.nbytes < _SPLIT_FROM_NBYTES
        return self._link if is_small and tensor.device.type == "cpu" else None

    def _exchange_of(self, tensor: torch.Tensor) -> Exchange:
        return self._link_on(tensor.device) or self._messages

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, what: str) -> Work:
        """Reduce in place."""
        link = self._link_of_small(tensor, op) if not async_op and tensor.is_contiguous() else None
        if link is not None:
            then = partial(_sum_into, tensor) if op == "sum" else partial(_extreme_into, tensor, _EXTREMES[op])
            same = [tensor] * len(self._ranks)
            return link.exchange_small(Pieces(outbox=same, expect=same, tag=_AGREED, then=then, what=what))
        if op == "sum" and self._is_better_split(tensor):
            return self._split_all_reduce(list(tensor.view(-1).tensor_split(len(self._ranks))), what)
        return super().all_reduce(tensor, op, async_op, what)

    def all_gather_into(self, out: torch.Tensor, shard: torch.Tensor, tag: int, final: bool, what: str) -> Work:
        """Concatenate shards."""
        pieces = list(out.view(len(self._ranks), shard.numel()))
        own = shard if final else pieces[self._rank]
        if not final:
            copy_unless_same(own, shard)
        return self._gather(own, pieces, tag, final, what)

    def reduce_scatter_into(self, out: torch.Tensor, full: torch.Tensor, op: str, tag: int, what: str) -> Work:
        """Reduce to shards."""
        if op != "sum":
            return super().reduce_scatter_into(out, full, op, tag, what)
        return self._sum_pieces(list(full.view(len(self._ranks), out.numel())), out, tag, what)

    def alloc_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory that the others can read, where there is such."""
        if numel and (link := self._link_on(device)) is not None:
            return link.alloc_shared(numel * dtype.itemsize).view(dtype)
        return super().alloc_shared(numel, dtype, device)

    def wait_for_readers(self, tensor: torch.Tensor) -> None:
        """Wait until the others have read it."""
        if (link := self._link_on(tensor.device)) is not None:
            with explained("other ranks to read a shard", self._ranks):
                link.wait_for_readers(tensor)

    def close(self) -> None:
        """End the link; what was sent can still be read by the others."""
        if self._link is not None:
            self._link.close()
        self._link, self._is_connected = None, False

    def _start(self, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Work:
        work = super()._start(collective, *tensors, **options)
        registry.kept.append(work)
        return work

    def _is_better_split(self, tensor: torch.Tensor) -> bool:
        """Whether an all-reduce is to be made of its two halves; alike on all ranks."""
        # gloo's own all-reduce takes tensors of a GPU; its messages do not.
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() < len(self._ranks):
            return False
        is_16_bit = tensor.is_floating_point() and tensor.dtype.itemsize == 2
        return is_16_bit or (tensor.nbytes >= _SPLIT_FROM_NBYTES and self.link is not None)

    def _split_all_reduce(self, pieces: list[torch.Tensor], what: str) -> Work:
        own = pieces[self._rank]
        return PendingWork(
            [self._sum_pieces(pieces, own, _SUMMED, what)],
            lambda: self._gather(own, pieces, _GATHERED, False, what).wait(),
        )

    def _gather(self, own: torch.Tensor, pieces: list[torch.Tensor], tag: int, final: bool, what: str) -> Work:
        outbox, then = [own] * len(pieces), partial(_copy_all, pieces)
        return self._exchange_of(own).exchange(
            Pieces(outbox=outbox, expect=pieces, tag=tag, then=then, in_place=True, final=final, what=what)
        )

    def _sum_pieces(self, pieces: list[torch.Tensor], out: torch.Tensor, tag: int, what: str) -> Work:
        """Send every rank its piece, for good; `out` becomes the sum of what all have sent here."""
        expect, then = [pieces[self._rank]] * len(pieces), partial(_sum_into, out)
        return self._exchange_of(pieces[0]).exchange(
            Pieces(outbox=pieces, expect=expect, tag=tag, then=then, final=True, what=what)
        )


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
        copy_unless_same(view, piece)
