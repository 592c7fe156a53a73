"""A ShardUnit: the flat buffers behind a group of parameters, and the life of their gradients.

The module's parameters are made views of one flat buffer, their gradients live in another with the same layout, and
collectives run on the buffers themselves. One accumulation window of the gradients goes

    EMPTY --contributions--> LOCAL --reduce()--> REDUCING --wait_for_reduce()--> AVERAGED --clear()--> EMPTY

[Note: autograd hands over, the unit accumulates]
While a backward pass runs, `param.grad` is None, so autograd gives each parameter a fresh tensor without touching
memory twice; the hook moves it into the parameter's slot (the first time by a scaled copy, so nothing is ever
zeroed; later by a scaled add) and drops it. The scale carries the loss scale, the share of an accumulated
micro-batch and, where the precision allows, the 1/world of the average: three passes over memory that never happen.
The same path serves gradients accumulated in another dtype than the parameter's. Between passes `param.grad` shows
the slot (where the dtypes agree), so that users read averaged gradients and may change them in place.

[Note: a gradient that was not handed over]
When `loss.backward()` starts without the engine knowing (the model was called around it), autograd adds into the
slots that are still shown. That is right only while the scale is 1; otherwise it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.errors import EngineStateError
from deepspeedlite.zero.layout import FlatLayout, Run, Slot
from deepspeedlite.zero.wrap import TrainedParameter


class GradState(Enum):
    """What a unit's gradient buffer holds. See the file's first lines."""

    EMPTY = "empty"
    LOCAL = "local"
    REDUCING = "reducing"
    AVERAGED = "averaged"


class ReducePolicy:
    """How gradients become the ranks' average: times `pre`, summed over the wire in `wire_dtype`, times `post`.

    `pre * post` is 1/world. fp32 divides before the sum, where the division costs nothing (it rides on the first
    copy); 16-bit gradients divide after it, because dividing first would push small fp16 values to zero. The user may
    decide: `prescale_gradients` divides first, `gradient_predivide_factor` by that much first and the rest after.
    """

    def __init__(
        self,
        group: Group,
        *,
        prescale_gradients: bool = False,
        predivide_factor: float = 1.0,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.group = group
        self.wire_dtype = wire_dtype
        self._prescale = prescale_gradients
        self._predivide = predivide_factor

    def factors(self, grad_dtype: torch.dtype) -> tuple[float, float]:
        """`(pre, post)` for gradients of this dtype."""
        if self._predivide != 1.0:
            return 1.0 / self._predivide, self._predivide / self.group.size
        if self._prescale or grad_dtype.itemsize >= 4:
            return 1.0 / self.group.size, 1.0
        return 1.0, 1.0 / self.group.size


class ShardUnit:
    """Flat values and flat gradients of some parameters of one dtype.

    Args:
        members: the parameters with their names and optimizer groups; their memory is replaced by views.
        grad_dtype: dtype in which gradients are accumulated; the parameters' own if None.
        policy: how gradients are averaged.
        shard_count: into how many shards the optimizer's view is cut.
        on_complete: called when every gradient that this backward pass is known to bring has arrived.
        on_unannounced: called when a gradient arrives in a pass that nobody announced by `begin_backward`; must do so.
    """

    def __init__(
        self,
        members: Sequence[TrainedParameter],
        *,
        policy: ReducePolicy,
        grad_dtype: torch.dtype | None = None,
        shard_count: int = 1,
        on_complete: Callable[[], None] = lambda: None,
        on_unannounced: Callable[[], None] | None = None,
    ) -> None:
        ordered = sorted(members, key=lambda member: member.group)
        self.layout = FlatLayout([(m.name, m.param.shape, m.group) for m in ordered], shard_count)
        self.params = [member.param for member in ordered]
        first = self.params[0]
        self.dtype, self.device = first.dtype, first.device
        self.grad_dtype = grad_dtype or self.dtype
        self.values = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        self.grads = torch.zeros(self.layout.numel, dtype=self.grad_dtype, device=self.device)
        self.state = GradState.EMPTY
        self._policy = policy
        self._pre, self._post = policy.factors(self.grad_dtype)
        self._on_complete = on_complete
        self._on_unannounced = on_unannounced or partial(self.begin_backward, 1.0, False)
        self._work: Any = None
        self._wire: torch.Tensor | None = None
        self._attach()
        self._filled = [False] * len(self.params)
        self._arrivals = [0] * len(self.params)
        # How often each gradient arrives in one pass is learnt from the passes before (0: never seen): a parameter used
        # in several reentrant checkpoints comes several times. One never seen keeps its unit open until the pass ends.
        self._expected = [0] * len(self.params)
        self._missing = 0
        self._scale = 1.0
        self._prescaled = False
        self._in_pass = False
        self._launched = False
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrived, index))
            for index, param in enumerate(self.params)
        ]

    # --- parameters -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _attach(self) -> None:
        self._grad_views = []
        for slot, param in zip(self.layout.slots, self.params):
            view = self.values[slot.start : slot.stop].view(slot.shape)
            view.copy_(param)
            param.data = view
            self._grad_views.append(self.grads[slot.start : slot.stop].view(slot.shape))
        self._addresses = [param.data_ptr() for param in self.params]

    def verify_attached(self) -> None:
        """Raise when a parameter's memory was replaced, since its training would then go unnoticed.

        Raises:
            EngineStateError: naming the parameter.
        """
        for slot, param, address in zip(self.layout.slots, self.params, self._addresses):
            if param.data_ptr() != address:
                raise EngineStateError(
                    f"parameter {slot.name} was given new memory after deepspeedlite.initialize (by .to(), .data = , "
                    "load_state_dict(assign=True) or flatten_parameters()); its optimizer no longer sees it. Move or "
                    "convert the model before initialize, and copy values in place afterwards"
                )

    def broadcast_values(self) -> None:
        """Give every rank the values of rank 0."""
        self._policy.group.broadcast(self.values, src=0)

    def runs(self) -> list[tuple[Run, torch.Tensor, torch.Tensor]]:
        """This rank's runs: index range, values and gradients as 1-D views of the buffers."""
        shard = self._policy.group.rank if self.layout.shard_count > 1 else 0
        return [
            (run, self.values[run.start : run.stop], self.grads[run.start : run.stop])
            for run in self.layout.runs(shard)
        ]

    # --- gradients ------------------------------------------------------------------------------------------------

    def begin_backward(self, scale: float, reduce: bool) -> None:
        """Hide the gradients shown so far and take what this backward pass brings, each multiplied by `scale`."""
        for param in self.params:
            param.grad = None
        # The average's 1/world may ride on the first copy only if that is all the buffer will hold when it is reduced.
        self._prescaled = reduce and self.state is GradState.EMPTY and self._pre != 1.0
        self._scale = scale * self._pre if self._prescaled else scale
        self._arrivals = [0] * len(self.params)
        self._missing = len(self.params)
        self._in_pass, self._launched = True, False

    @property
    def complete(self) -> bool:
        """Whether every gradient known to come in this pass has come."""
        return self._missing <= 0

    @torch.no_grad()
    def _arrived(self, index: int, param: torch.Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        slot, view = self.layout.slots[index], self._grad_views[index]
        if not self._in_pass:
            self._on_unannounced()
        if self._launched:
            raise EngineStateError(
                f"parameter {slot.name} received a gradient after its bucket had been reduced in this backward pass: "
                "it was used a different number of times than in earlier steps, inside reentrant activation "
                "checkpoints. Use non-reentrant checkpointing (use_reentrant=False), or set "
                "zero_optimization.overlap_comm to false"
            )
        if not grad.is_sparse and grad.data_ptr() == view.data_ptr() and view.numel() > 0:
            self._check_added_in_place(slot)
        else:
            param.grad = None
            self._accumulate(grad, view, self._filled[index])
        self._filled[index] = True
        self.state = GradState.LOCAL
        self._arrivals[index] += 1
        if self._arrivals[index] == self._expected[index]:
            self._missing -= 1
            if self._missing == 0:
                self._on_complete()

    def _accumulate(self, grad: torch.Tensor, view: torch.Tensor, add: bool) -> None:
        if grad.is_sparse:
            grad = grad.to_dense()
        if add:
            view.add_(grad, alpha=self._scale)
        elif grad.dtype == view.dtype and self._scale != 1.0:
            torch.mul(grad, self._scale, out=view)
        else:
            view.copy_(grad)
            if self._scale != 1.0:
                view.mul_(self._scale)

    def _check_added_in_place(self, slot: Slot) -> None:
        if self._scale != 1.0:
            raise EngineStateError(
                f"the gradient of {slot.name} was accumulated by a backward pass that did not come through the engine, "
                "while loss scaling or gradient accumulation is on; call the model through the engine "
                "(engine(inputs)) or use engine.backward(loss)"
            )

    def end_backward(self) -> None:
        """Close the pass: learn how often each gradient arrived, and show the gradients where they can be shown."""
        if not self._in_pass:
            return
        self._in_pass = False
        self._expected = [max(known, seen) for known, seen in zip(self._expected, self._arrivals)]
        if self.grad_dtype != self.dtype:
            return
        everything = self.state is GradState.AVERAGED
        for param, view, filled in zip(self.params, self._grad_views, self._filled):
            if everything or filled:
                param.grad = view

    @torch.no_grad()
    def reduce(self) -> None:
        """Start averaging over the ranks. Slots that no gradient reached count as zero."""
        self._launched = self._in_pass
        if self.state is GradState.REDUCING:
            return
        for view, filled in zip(self._grad_views, self._filled):
            if not filled:
                view.zero_()
        self._filled = [True] * len(self.params)
        wire_dtype = self._policy.wire_dtype or self.grad_dtype
        self._wire = self.grads if wire_dtype == self.grad_dtype else self.grads.to(wire_dtype)
        if self._pre != 1.0 and not self._prescaled:
            self._wire.mul_(self._pre)
        self._prescaled = False
        op = "avg" if self._averages_on_wire else "sum"
        self._work = self._policy.group.all_reduce(self._wire, op, async_op=True)
        self.state = GradState.REDUCING

    @property
    def _averages_on_wire(self) -> bool:
        return self._pre == 1.0 and self._post != 1.0 and self._policy.group.averages

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Wait until the average is in the gradient buffer (on GPUs: until the current stream will see it)."""
        if self.state is not GradState.REDUCING:
            return
        if self._work is not None:
            self._work.wait()
        wire, self._work, self._wire = self._wire, None, None
        if wire is not None:
            if self._post != 1.0 and not self._averages_on_wire:
                wire.mul_(self._post)
            if wire is not self.grads:
                self.grads.copy_(wire)
        self.state = GradState.AVERAGED

    def clear(self) -> None:
        """Forget the gradients. Nothing is written: the next window's first copy overwrites them."""
        self.wait_for_reduce()
        for param in self.params:
            param.grad = None
        self._filled = [False] * len(self.params)
        self.state = GradState.EMPTY
        self._in_pass = False

    def overflowed(self) -> list[str]:
        """Names of the parameters whose gradients are not finite."""
        return [s.name for s in self.layout.slots if not bool(torch.isfinite(self.grads[s.start : s.stop]).all())]

    def close(self) -> None:
        """Remove the hooks. The parameters stay views of the flat buffer and keep their values."""
        self.clear()
        for hook in self._hooks:
            hook.remove()
