"""The gradients of one unit: one flat buffer with the layout of its values, and its reduction over the ranks.

Collectives run on the buffer itself. One accumulation window goes

    EMPTY --add()--> LOCAL --reduce()--> REDUCING --wait_for_reduce()--> AVERAGED --clear()--> EMPTY

and from AVERAGED back to LOCAL when a further pass of the window brings more.

[Note: what a reduction leaves behind]
The buffer is memory that the group shares: on the CPU ranks of one host the others read their shares of it where it
lies, so a new pass waits for these readers before it writes.

Without sharding the whole buffer holds the average. With a sharded optimizer only this rank's shard of it does, and the
rest is scratch. With sharded gradients the shard is summed into `shard` (added, in later passes of a window) and the
whole buffer is dropped: there is one only while a pass fills it and while it is reduced.

[Note: autograd hands over, the buffer accumulates]
While a backward pass runs, `param.grad` is None, so autograd gives each parameter a fresh tensor without touching
memory twice; the hook moves it into the parameter's slot (the first time by a scaled copy, so nothing is ever
zeroed; later by a scaled add) and drops it. The scale carries the loss scale, the share of an accumulated
micro-batch and, where the precision allows, the 1/world of the average: three passes over memory that never happen.
The same path serves gradients accumulated in another dtype than the parameter's.

[Note: when norms are taken]
The norm of this rank's part of an average is taken as its reduction ends, when the last passes over memory left the end
of it in the cache, and kept until something may have changed it: another pass, a tied copy's sum, a user. Where
gradients are shown, anything may change them unseen (`param.grad.data`, numpy), so their norm is taken in the step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.offload.options import Offload
from deepspeedlite.zero.layout import FlatLayout, Slot
from deepspeedlite.zero.plan import ReducePolicy, ShardingPlan


class GradState(Enum):
    """What a gradient buffer holds. See the file's first lines."""

    EMPTY = "empty"
    LOCAL = "local"
    REDUCING = "reducing"
    AVERAGED = "averaged"


class GradBuffer:
    """The gradients of the parameters in a layout, of one dtype, on one device.

    Args:
        layout: where each parameter's gradient lies.
        policy: how gradients are averaged, and over which ranks.
        plan: what is sharded.
        dtype: of the buffer.
        device: of the whole buffer.
        offload: where a shard of averaged gradients is kept.
        counted: names of the parameters whose gradients the model's norm takes from here.
        tag: of the collectives on the buffer.
    """

    def __init__(
        self,
        layout: FlatLayout,
        policy: ReducePolicy,
        plan: ShardingPlan,
        *,
        dtype: torch.dtype,
        device: torch.device,
        offload: Offload,
        counted: Collection[str],
        tag: int,
    ) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.state = GradState.EMPTY
        self._group, self._policy = policy.group, policy
        # Which shard is this rank's.
        self._index = policy.group.rank if layout.shard_count > 1 else 0
        # Whether only a shard of the average is kept, and whether the whole buffer goes when that is there.
        apart = policy.group.size > 1 or offload.takes_grads  # else the shard is the whole, and one buffer does
        self.scatters, self._frees = plan.shard_optimizer and apart, plan.shard_grads and apart
        # What gradients are multiplied by before and after the sum. A backend that averages does the second itself.
        self._pre, self._post = policy.factors(dtype)
        self._averages_on_wire = self._pre == 1.0 and self._post != 1.0 and policy.group.averages
        names = [slot.name for slot in layout.slots]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        self._call: dict[str, Any] = {"label": f"the gradients of {names[0]}{more}", "tag": tag}
        edges = [0, *(edge for slot in layout.slots for edge in (slot.start, slot.stop)), layout.numel]
        # Between slots. They must hold zeros: norms and optimizers pass over them.
        self._gaps = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
        # What of this rank's shard the model's norm takes from here; the norms of that, where they are known,
        self._counted = [slice(*span) for span in layout.spans(self._index, counted)]
        self._norms: list[torch.Tensor] | None = None
        # and whether the reduction of this pass is to take them.
        self._measures = False
        # What each gradient of this pass is multiplied by, and whether the average's 1/world is in that already.
        self._scale, self._is_prescaled = 1.0, False
        # Whether a slot holds a gradient; what a slot holds that was not filled is anything, and counts as zero.
        self._filled = [False] * len(names)
        # This rank's average of earlier passes of the window, while a further pass fills the whole buffer.
        self._carried: torch.Tensor | None = None
        # Of a reduction under way: its handle, what is sent (kept alive until then), and where the sum will be.
        self._reduction: Any = None
        self._wire: torch.Tensor | None = None
        self._averaged: torch.Tensor | None = None
        # The whole buffer, and views of its slots; without memory, and none, while it is dropped.
        self.full = torch.empty(0, dtype=dtype, device=device)
        self._views: list[torch.Tensor] = []
        # This rank's shard of averages: of its own where the whole buffer is dropped, else a view of it.
        if self._frees:
            self.shard = offload.grads(layout.shard_numel, dtype, device)
        else:
            self._need()
            self.shard = self.full[slice(*layout.shard(self._index))]

    # --- memory ---------------------------------------------------------------------------------------------------

    def _need(self) -> None:
        if self._views:
            return
        self.full = self._group.alloc_shared(self.layout.numel, self.dtype, self.device)
        self._views = [self.full[slot.start : slot.stop].view(slot.shape) for slot in self.layout.slots]
        for gap in self._gaps:
            self.full[gap].zero_()

    def _drop(self) -> None:
        if self._frees:
            self.full, self._views = torch.empty(0, dtype=self.dtype, device=self.device), []
            self._filled = [False] * len(self._filled)

    def own_part(self, slot: Slot) -> tuple[slice, slice]:
        """Where in a slot, and where in this rank's shard, what the two share lies."""
        first, last = self.layout.shard(self._index)
        start = min(max(slot.start, first), slot.stop)
        stop = max(min(slot.stop, last), start)
        return slice(start - slot.start, stop - slot.start), slice(start - first, stop - first)

    def view(self, index: int) -> torch.Tensor | None:
        """The gradient of a parameter as this rank's buffer holds it; None where it holds none of it."""
        everything = self.state is GradState.AVERAGED
        return self._views[index] if self._views and (everything or self._filled[index]) else None

    @property
    def is_partly_averaged(self) -> bool:
        """Whether passes since the last average have added to it what no other rank has seen."""
        return self._carried is not None

    # --- one backward pass ----------------------------------------------------------------------------------------

    def begin(self, scale: float, reduce: bool, measure: bool) -> None:
        """Take what a backward pass brings, each times `scale`; `reduce`, `measure`: it will be averaged, and asked
        for its norm.
        """
        self._norms, self._measures = None, measure
        self._group.wait_for_readers(self.full)
        if self.state is GradState.AVERAGED and self.scatters:
            self._carried = self.shard if self._frees else self.shard.clone()
            self._filled = [False] * len(self._filled)
        # The average's 1/world may ride on the first copy only if that is all the buffer will hold when it is reduced.
        self._is_prescaled = reduce and self._pre != 1.0 and not any(self._filled)
        self._scale = scale * self._pre if self._is_prescaled else scale

    def is_in_place(self, index: int, grad: torch.Tensor) -> bool:
        """Whether autograd has added to the slot itself, which was still shown."""
        self._need()
        return not grad.is_sparse and grad.data_ptr() == self._views[index].data_ptr() and grad.numel() > 0

    @property
    def takes_in_place(self) -> bool:
        """Whether what autograd adds in place is what belongs there."""
        return self._scale == 1.0

    def add(self, index: int, grad: torch.Tensor | None) -> None:
        """Add to a parameter's gradient; None: it is in the slot already."""
        if grad is not None:
            view = self._views[index]
            grad = grad.to_dense() if grad.is_sparse else grad
            if self._filled[index]:
                view.add_(grad, alpha=self._scale)
            elif grad.dtype == view.dtype and self._scale != 1.0:
                torch.mul(grad, self._scale, out=view)
            else:
                view.copy_(grad)
                if self._scale != 1.0:
                    view.mul_(self._scale)
        self._filled[index] = True
        self.state = GradState.LOCAL

    def replace(self, index: int, grad: torch.Tensor | None) -> None:
        """Make `grad`, of the parameter's shape and times the loss scale, its gradient; None: there is none."""
        self._norms = None
        if self.state is GradState.EMPTY:
            if grad is None:
                return
            self._need()
            self._group.wait_for_readers(self.full)
            self.state = GradState.LOCAL
        slot = self.layout.slots[index]
        in_slot, in_shard = self.own_part(slot)
        shard = self._carried if self.state is GradState.LOCAL else self.shard if self.scatters else None
        if shard is not None:  # this rank's part of an average
            averaged = None if grad is None or shard is self._carried else grad.flatten()[in_slot]
            shard[in_shard].zero_() if averaged is None else shard[in_shard].copy_(averaged)
        if self.state is GradState.AVERAGED and self.scatters:
            return
        view = self._views[index] = self.full[slot.start : slot.stop].view(slot.shape)
        view.zero_() if grad is None else view.copy_(grad)
        self._filled[index] = grad is not None

    # --- reduction ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Start averaging over the ranks. Slots that no gradient reached count as zero."""
        if self.state is GradState.REDUCING:
            return
        self._need()
        for view, filled in zip(self._views, self._filled):
            if not filled:
                view.zero_()
        self._filled = [True] * len(self._filled)
        wire_dtype = self._policy.wire_dtype or self.dtype
        self._wire = self.full if wire_dtype == self.dtype else self.full.to(wire_dtype)
        if self._pre != 1.0 and not self._is_prescaled:
            self._wire.mul_(self._pre)
        self._is_prescaled = False
        op = "avg" if self._averages_on_wire else "sum"
        own = self._wire[slice(*self.layout.shard(self._index))]
        if self.scatters and self._policy.scatter:
            straight = self._frees and self._carried is None and wire_dtype == self.dtype
            self._averaged = self.shard if straight and self.shard.device == self.device else own
            self._reduction = self._group.reduce_scatter_into(
                self._averaged, self._wire, op, async_op=True, **self._call
            )
        else:
            self._averaged = own if self.scatters else self._wire
            self._reduction = self._group.all_reduce(self._wire, op, async_op=True, label=self._call["label"])
        self.state = GradState.REDUCING

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Wait until the average is in the buffer (on GPUs: until the current stream will see it)."""
        if self.state is not GradState.REDUCING:
            return
        work, averaged = self._reduction, self._averaged
        self._reduction = self._wire = self._averaged = None
        if work is not None:
            work.wait()
        if averaged is not None:
            if self._post != 1.0 and not self._averages_on_wire:
                averaged.mul_(self._post)
            # The average itself is in the device's memory also where the shard is on its way to the host's.
            is_stored_as_it_is = self._carried is None and averaged.dtype == self.dtype
            self._store_average(averaged)
            if self._measures:
                self._norms = self._norms_of(averaged if is_stored_as_it_is else self.shard)
        self.state = GradState.AVERAGED

    def _store_average(self, averaged: torch.Tensor) -> None:
        if not self.scatters:
            if averaged.data_ptr() != self.full.data_ptr():
                self.full.copy_(averaged)
            return
        if self._carried is None:
            if averaged.data_ptr() != self.shard.data_ptr():
                self.shard.copy_(averaged, non_blocking=True)  # to pinned memory: see GradReducer._wait
        elif self._frees:
            self.shard.add_(averaged.to(self.shard.device))
        else:
            torch.add(self._carried, averaged, out=self.shard)
        self._carried = None
        self._drop()

    @torch.no_grad()
    def sum_over(self, group: Group) -> None:
        """Add the averages of the parts of the model that use these parameters too. Collective over the group.

        Their units have the same layout, so that it is enough to add each rank's shard.
        """
        self._norms = None
        there = self.shard.to(self.device)
        group.all_reduce(there, label="the gradients of tied parameters")
        if there is not self.shard:
            self.shard.copy_(there)

    def norms(self, precise: bool = False) -> list[torch.Tensor]:
        """The norms of what of this rank's averages the model's norm takes from here; `precise`: squares in fp64."""
        return self._norms if self._norms is not None and not precise else self._norms_of(self.shard, precise)

    def _norms_of(self, shard: torch.Tensor, precise: bool = False) -> list[torch.Tensor]:
        """Each 0-dim and where the gradients are: nothing waits for a device."""
        everything, dtype = slice(0, shard.numel()), torch.float64 if precise else norm_dtype(self.dtype)
        cuts = (shard if span == everything else shard[span] for span in self._counted)
        return [torch.linalg.vector_norm(piece, dtype=dtype) for cut in cuts for piece in _pieces(cut)]

    def forget_norm(self) -> None:
        """The averages are being written to from outside."""
        self._norms = None

    def clear(self) -> None:
        """Forget the gradients. Nothing is written: the next window's first copy overwrites them."""
        self.wait_for_reduce()
        self._filled = [False] * len(self._filled)
        self._carried = self._norms = None
        self.state = GradState.EMPTY
        self._drop()


def norm_dtype(grad_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients' squares are summed."""
    return torch.float64 if grad_dtype is torch.float64 else torch.float32


def _pieces(grads: torch.Tensor) -> Sequence[torch.Tensor]:
    """On a CPU torch takes 16-bit numbers to fp32 before it takes their norm: pieces of 1 MiB stay in the cache."""
    return grads.split(1 << 18) if grads.device.type == "cpu" and grads.dtype.itemsize == 2 else [grads]
