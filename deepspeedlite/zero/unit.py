"""A ShardUnit: flat values, flat gradients of the same layout, and the life of the gradients.

Collectives run on the buffers themselves. One accumulation window of the gradients goes

    EMPTY --contributions--> LOCAL --reduce()--> REDUCING --wait_for_reduce()--> AVERAGED --clear()--> EMPTY

and from AVERAGED back to LOCAL when a further pass of the window brings more.

[Note: what a reduction leaves behind]
The buffer is memory that the group shares: on the CPU ranks of one host the others read their shares of it where it
lies, so a new pass waits for these readers before it writes.

Without sharding the whole buffer holds the average. With a sharded optimizer only this rank's shard of it does, and the
rest is scratch. With sharded gradients the shard is summed into `grad_shard` (added, in later passes of a window) and
the whole buffer is dropped: there is one only while a pass fills it and while it is reduced.

[Note: autograd hands over, the unit accumulates]
While a backward pass runs, `param.grad` is None, so autograd gives each parameter a fresh tensor without touching
memory twice; the hook moves it into the parameter's slot (the first time by a scaled copy, so nothing is ever
zeroed; later by a scaled add) and drops it. The scale carries the loss scale, the share of an accumulated
micro-batch and, where the precision allows, the 1/world of the average: three passes over memory that never happen.
The same path serves gradients accumulated in another dtype than the parameter's.

[Note: what users see, and what they write]
Between passes `param.grad` is a view of the slot wherever this rank holds the whole gradient (see `_shows`), and None
elsewhere. Whatever a user makes of it is the gradient from then on: changed in place it is so already; where the next
pass or the step finds None, the gradient was cleared, and where it finds another tensor, replaced (`take_in`). What is
shown, and written, is what the buffer holds: times the loss scale, and each micro-batch's share of the accumulation.

[Note: when norms are taken]
The norm of this rank's part of an average is taken as its reduction ends, when the last passes over memory left the end
of it in the cache, and kept until something may have changed it: another pass, a tied copy's sum, a user. Where
gradients are shown, anything may change them unseen (`param.grad.data`, numpy), so their norm is taken in the step.

[Note: a gradient that was not handed over]
When `loss.backward()` starts without the engine knowing (the model was called around it), autograd adds into the
slots that are still shown. That is right only while the scale is 1; otherwise it is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from deepspeedlite.comm import Group
from deepspeedlite.offload.options import Offload
from deepspeedlite.offload.store import Store
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero.flat_params import FlatParams, owner_of
from deepspeedlite.zero.layout import Run, Slot
from deepspeedlite.zero.norm import norm_dtype, norms_of
from deepspeedlite.zero.plan import ShardingPlan
from deepspeedlite.zero.wrap import NamedParameter


class GradState(Enum):
    """What a unit's gradient buffer holds. See the file's first lines."""

    EMPTY = "empty"
    LOCAL = "local"
    REDUCING = "reducing"
    AVERAGED = "averaged"


class Stepper(Protocol):
    """What a unit knows of the optimizer that steps its runs."""

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """The optimizer's state, per master."""

    @property
    def loss_scale(self) -> float:
        """The factor that the gradients carry."""


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
        scatter: bool = True,
    ) -> None:
        self.group = group
        self.scatter = scatter  # False: all-reduce also where a rank needs only its shard of the average
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


class ShardUnit(FlatParams):
    """Flat values and flat gradients of some parameters of one dtype.

    Args:
        members: the parameters with their names and optimizer groups; their memory is replaced by views.
        policy: how gradients are averaged.
        plan: what is sharded.
        sharded: whether the values are (a persistent unit of stage 3 keeps them whole).
        grad_dtype: dtype in which gradients are accumulated; the parameters' own if None.
        offload: where the values live between uses, where averaged gradients are kept, and how runs are cut.
    """

    def __init__(
        self,
        members: Sequence[NamedParameter],
        *,
        policy: ReducePolicy,
        plan: ShardingPlan | None = None,
        sharded: bool = False,
        grad_dtype: torch.dtype | None = None,
        offload: Offload | None = None,
    ) -> None:
        plan, offload = plan or ShardingPlan(), offload or Offload()
        count, run_numel = plan.shard_count(policy.group.size), offload.run_numel
        super().__init__(
            members, policy.group, sharded=sharded, shard_count=count, offload=offload, run_numel=run_numel
        )
        self._values_of_runs = self._cut_values()
        self._new_grads = offload.grads
        self.grad_dtype = grad_dtype or self.dtype
        self.grad_state = GradState.EMPTY
        self._hides = plan.shard_params or self.grad_dtype != self.dtype  # gradients, from `param.grad`
        apart = policy.group.size > 1 or offload.takes_grads  # else the shard is the whole, and one buffer does
        self._scatters, self._frees = plan.shard_optimizer and apart, plan.shard_grads and apart
        self._policy = policy
        self._pre, self._post = policy.factors(self.grad_dtype)
        # Called when every gradient that this backward pass is known to bring has arrived.
        self.on_complete: Callable[[], None] = lambda: None
        # Called when a gradient arrives in a pass that nobody announced by `begin_backward`; must do so.
        self.on_unannounced: Callable[[], None] = partial(self.begin_backward, 1.0, False)
        # Whether a gradient that arrives now comes from a backward pass inside the backward pass.
        self.is_nested: Callable[[], bool] = lambda: False
        # Called when every trained parameter has its gradient: nothing in this pass needs the values any more.
        self.on_all_arrived: Callable[[], None] = lambda: None
        # The optimizer, where there is one, and what it updates: a 1-D tensor per run. See `zero.inspect`.
        self.stepper: Stepper | None = None
        self.masters: Sequence[torch.Tensor] = ()
        self.run_stores: Sequence[Store] = ()  # where what a step of each run reads and writes lives
        # Ranks that hold the same parameters for another part of the model, and a gradient of their own for them.
        self.tied_group: Group | None = None
        label, tag = self._call["label"].replace("the values", "the gradients"), self._call["tag"] + 1
        self._reduce_call: dict[str, Any] = {"label": label, "tag": tag}
        self._reduction: Any = None
        self._wire: torch.Tensor | None = None  # what is sent
        self._averaged: torch.Tensor | None = None  # where the sum will be
        self._make_grads()
        self._filled = [False] * len(self.params)
        self._reached = [False] * len(self.params)
        self._arrivals = [0] * len(self.params)
        # How often each gradient arrives in one pass: once, until a pass has shown otherwise. A parameter used in
        # several reentrant checkpoints comes several times; one that does not come keeps its unit open to the end.
        self._expected = [1] * len(self.params)
        self._learnt = False
        self._missing = 0
        self._scale = 1.0
        self._prescaled = False
        self._in_pass = False
        self._launched = False
        self.hooks: list[RemovableHandle] = []  # the same list for good: whoever ends the unit may hold it alone
        self._hook()

    # --- gradients' memory ----------------------------------------------------------------------------------------

    def _make_grads(self) -> None:
        edges = [0, *(edge for slot in self.layout.slots for edge in (slot.start, slot.stop)), self.layout.numel]
        self._gaps = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
        self._offsets = [slot.start * self.grad_dtype.itemsize for slot in self.layout.slots]
        self._carried: torch.Tensor | None = None
        # What of this rank's shard the model's norm takes from here; its norms, where they are known.
        self.counted: Sequence[slice] = [slice(0, self.layout.shard_numel)]
        self._norms: list[torch.Tensor] | None = None
        self._measures = False  # whether the reduction of this pass is to take them
        self._shown: list[torch.Tensor | None] = []  # what each `param.grad` was left at
        self._hide()
        self._grad_views: list[torch.Tensor] = []
        self._drop_grads()
        if self._frees:
            self.grad_shard = self._new_grads(self.layout.shard_numel, self.grad_dtype, self.device)
        else:
            self._need_grads()
            self.grad_shard = self.grads[slice(*self.layout.shard(self.index))]

    def _use_grads(self, grads: torch.Tensor) -> None:
        """Make this the whole gradient buffer. Its gaps must hold zeros: norms and optimizers pass over them."""
        self.grads = grads
        self._grad_views = [grads[slot.start : slot.stop].view(slot.shape) for slot in self.layout.slots]
        for gap in self._gaps:
            grads[gap].zero_()

    def _drop_grads(self) -> None:
        self.grads = torch.empty(0, dtype=self.grad_dtype, device=self.device)
        self._grad_views = []

    def _need_grads(self) -> None:
        if not self._grad_views:
            self._use_grads(self.group.alloc_shared(self.layout.numel, self.grad_dtype, self.device))

    def runs(self) -> list[tuple[Run, torch.Tensor, torch.Tensor]]:
        """This rank's runs: index range, values and averaged gradients as 1-D views of its shard."""
        start, _ = self.layout.shard(self.index)
        return [
            (run, values, self.grad_shard[run.start - start : run.stop - start])
            for run, values in zip(self.layout.runs(self.index), self._values_of_runs)
        ]

    def _cut_values(self) -> list[torch.Tensor]:
        """The values of each run, where they lie; without memory if they are brought from a disk."""
        start, _ = self.layout.shard(self.index)
        cuts = [(run.start - start, run.stop - start) for run in self.layout.runs(self.index)]
        return [self.store.values(self.shard, *cut) for cut in cuts]

    def own_grad(self, slot: Slot) -> torch.Tensor | None:
        """What this rank alone has accumulated of a parameter's gradient: a 1-D view; None where it is not LOCAL.

        Raises:
            EngineStateError: during a backward pass, and where another part of the gradient is averaged already.
        """
        if self._in_pass:
            raise EngineStateError(f"the gradient of {slot.name} was asked for while a backward pass is under way")
        if self.grad_state is not GradState.LOCAL:
            return None
        if self._carried is not None:
            raise EngineStateError(
                f"the gradient of {slot.name} is averaged over the ranks but for what the last pass, without "
                "averaging, has added; read it after the pass that ends the accumulation"
            )
        filled = self._filled[self.layout.place(slot)]
        return self.grads[slot.start : slot.stop] if filled else None

    # --- gradients ------------------------------------------------------------------------------------------------

    def begin_backward(self, scale: float, reduce: bool, measure: bool = False) -> None:
        """Hide the gradients shown so far and take what this backward pass brings, each multiplied by `scale`.

        `measure`: the norm will be asked for after it, and its reduction may take it.
        """
        self.take_in()
        self._hide()
        self._norms, self._measures = None, measure and not self._shows(GradState.AVERAGED)
        self.group.wait_for_readers(self.grads)
        if self.grad_state is GradState.AVERAGED and self._scatters:
            self._carried = self.grad_shard if self._frees else self.grad_shard.clone()
            self._filled = [False] * len(self.params)
        # The average's 1/world may ride on the first copy only if that is all the buffer will hold when it is reduced.
        self._prescaled = reduce and self._pre != 1.0 and not any(self._filled)
        self._scale = scale * self._pre if self._prescaled else scale
        self._arrivals = [0] * len(self.params)
        self._missing = sum(param.requires_grad for param in self.params)
        self._in_pass, self._launched, self._uncertain = True, False, False

    def _hide(self) -> None:
        for param in self.params:
            param.grad = None
        self._shown = [None] * len(self.params)

    @property
    def complete(self) -> bool:
        """Whether every gradient known to come in this pass has come."""
        return self._missing <= 0 and not self._uncertain

    @torch.no_grad()
    def _arrived(self, index: int, param: torch.Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        if not self._in_pass:
            if grad is not self._shown[index]:
                param.grad = None  # autograd's, not a user's
            self.on_unannounced()
        slot = self.layout.slots[index]
        if self._launched:
            raise EngineStateError(
                f"parameter {slot.name} received a gradient after its bucket had been reduced in this backward pass: "
                "it was used a different number of times than in earlier steps, inside reentrant activation "
                "checkpoints. Use non-reentrant checkpointing (use_reentrant=False), or set "
                "zero_optimization.overlap_comm to false"
            )
        self._need_grads()
        view = self._grad_views[index]
        if not grad.is_sparse and grad.data_ptr() == view.data_ptr() and view.numel() > 0:
            self._check_added_in_place(slot)
        else:
            param.grad = None
            self._accumulate(grad, view, self._filled[index])
        self._filled[index] = self._reached[index] = True
        self.grad_state = GradState.LOCAL
        self._arrivals[index] += 1
        if not self._learnt and self.is_nested():
            self._uncertain = True  # how many nested passes will bring this gradient is known when the pass ends
        if self._arrivals[index] == self._expected[index]:
            self._missing -= 1
            if self.complete:
                self.on_all_arrived()
                self.on_complete()

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
        self._in_pass, self._learnt = False, True
        self._expected = [max(known, seen) for known, seen in zip(self._expected, self._arrivals)]
        if not self._shows(self.grad_state):
            return
        everything = self.grad_state is GradState.AVERAGED
        for index, (param, view, filled) in enumerate(zip(self.params, self._grad_views, self._filled)):
            if everything or filled:
                param.grad = self._shown[index] = view

    def _shows(self, state: GradState) -> bool:
        """Whether `param.grad` can show the gradients: all of them are here, in the parameters' dtype."""
        if self._hides:
            return False
        return state is GradState.LOCAL or (state is GradState.AVERAGED and not self._scatters)

    @torch.no_grad()
    def take_in(self) -> None:
        """Make what users have made of `param.grad` since the last pass the gradients."""
        start = self.grads.data_ptr()
        changed = [
            (index, param.grad)
            for index, (param, shown, offset) in enumerate(zip(self.params, self._shown, self._offsets))
            # The second: other memory was put behind what is shown, by `param.grad.data = ...`.
            if param.grad is not shown or (shown is not None and shown.data_ptr() != start + offset)
        ]
        if len(changed) > 1:  # parameters may have exchanged what they show
            changed = [(index, None if grad is None else grad.clone()) for index, grad in changed]
        for index, grad in changed:
            self._replace(index, grad)

    @property
    def shows_gradients(self) -> bool:
        """Whether `param.grad` shows them after every pass."""
        return self._shows(GradState.LOCAL) and self._shows(GradState.AVERAGED)

    @torch.no_grad()
    def forget_grads(self, ids: Container[int]) -> None:
        """Clear the gradients of the parameters with these ids."""
        for index, param in enumerate(self.params):
            if id(param) in ids:
                self._replace(index, None)

    def forget_norm(self) -> None:
        """The averages are being written to from outside."""
        self._norms = None

    def _replace(self, index: int, grad: torch.Tensor | None) -> None:
        """Make `grad`, of the parameter's shape and times the loss scale, its gradient; None: there is none."""
        param, slot = self.params[index], self.layout.slots[index]
        if grad is not None and tuple(grad.shape) != slot.shape:
            raise EngineStateError(f"{slot.name}.grad was set to a tensor of {tuple(grad.shape)}, not {slot.shape}")
        grad = grad.to_dense() if grad is not None and grad.is_sparse else grad
        self._norms = param.grad = self._shown[index] = None
        if self.grad_state is GradState.EMPTY:
            if grad is None:
                return
            self._need_grads()
            self.group.wait_for_readers(self.grads)
            self.grad_state = GradState.LOCAL
        in_slot, in_shard = self.own_part(slot)
        shard = self._carried if self.grad_state is GradState.LOCAL else self.grad_shard if self._scatters else None
        if shard is not None:  # this rank's part of an average
            averaged = None if grad is None or shard is self._carried else grad.flatten()[in_slot]
            shard[in_shard].zero_() if averaged is None else shard[in_shard].copy_(averaged)
        if self.grad_state is GradState.AVERAGED and self._scatters:
            return
        view = self._grad_views[index] = self.grads[slot.start : slot.stop].view(slot.shape)
        view.zero_() if grad is None else view.copy_(grad)
        self._filled[index] = grad is not None
        if grad is not None and self._shows(self.grad_state):
            param.grad = self._shown[index] = view

    def own_part(self, slot: Slot) -> tuple[slice, slice]:
        """Where in a slot, and where in this rank's shard, what the two share lies."""
        first, last = self.layout.shard(self.index)
        start = min(max(slot.start, first), slot.stop)
        stop = max(min(slot.stop, last), start)
        return slice(start - slot.start, stop - slot.start), slice(start - first, stop - first)

    @torch.no_grad()
    def reduce(self) -> None:
        """Start averaging over the ranks. Slots that no gradient reached count as zero."""
        self._launched = self._in_pass
        if self.grad_state is GradState.REDUCING:
            return
        self._need_grads()
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
        if self._scatters and self._policy.scatter:
            straight = self._frees and self._carried is None and wire_dtype == self.grad_dtype
            straight = straight and self.grad_shard.device == self.device
            self._averaged = self.grad_shard if straight else self._wire[slice(*self.layout.shard(self.index))]
            self._reduction = self.group.reduce_scatter_into(
                self._averaged, self._wire, op, async_op=True, **self._reduce_call
            )
        else:
            self._averaged = self._wire[slice(*self.layout.shard(self.index))] if self._scatters else self._wire
            self._reduction = self.group.all_reduce(self._wire, op, async_op=True, label=self._reduce_call["label"])
        self.grad_state = GradState.REDUCING

    @property
    def _averages_on_wire(self) -> bool:
        return self._pre == 1.0 and self._post != 1.0 and self.group.averages

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Wait until the average is in the gradient buffer (on GPUs: until the current stream will see it)."""
        if self.grad_state is not GradState.REDUCING:
            return
        work, averaged = self._reduction, self._averaged
        self._reduction = self._wire = self._averaged = None
        if work is not None:
            work.wait()
        if averaged is not None:
            if self._post != 1.0 and not self._averages_on_wire:
                averaged.mul_(self._post)
            # The average itself is in the device's memory also where the shard is on its way to the host's.
            stored_as_it_is = self._carried is None and averaged.dtype == self.grad_dtype
            self._store_average(averaged)
            if self._measures:
                measured = averaged if stored_as_it_is else self.grad_shard
                self._norms = norms_of(measured, self.counted, norm_dtype(self.grad_dtype))
        self.grad_state = GradState.AVERAGED

    def _store_average(self, averaged: torch.Tensor) -> None:
        if not self._scatters:
            if averaged.data_ptr() != self.grads.data_ptr():
                self.grads.copy_(averaged)
            return
        if self._carried is None:
            if averaged.data_ptr() != self.grad_shard.data_ptr():
                self.grad_shard.copy_(averaged, non_blocking=True)  # to pinned memory: see GradReducer._wait
        elif self._frees:
            self.grad_shard.add_(averaged.to(self.grad_shard.device))
        else:
            torch.add(self._carried, averaged, out=self.grad_shard)
        self._carried = None
        if self._frees:
            self._drop_grads()
            self._filled = [False] * len(self.params)

    def norms(self, precise: bool = False) -> list[torch.Tensor]:
        """The norms of what of this rank's averages the model's norm takes from here; `precise`: squares in fp64."""
        if self._norms is not None and not precise:
            return self._norms
        return norms_of(self.grad_shard, self.counted, torch.float64 if precise else norm_dtype(self.grad_dtype))

    @torch.no_grad()
    def sum_over_tied(self) -> None:
        """Add the averages of the parts of the model that use these parameters too. Collective over `tied_group`.

        Their units have the same layout, so that it is enough to add each rank's shard.
        """
        if self.tied_group is None:
            return
        self._norms = None
        there = self.grad_shard.to(self.device)
        self.tied_group.all_reduce(there, label="the gradients of tied parameters")
        if there is not self.grad_shard:
            self.grad_shard.copy_(there)

    def clear(self) -> None:
        """Forget the gradients. Nothing is written: the next window's first copy overwrites them."""
        self.wait_for_reduce()
        self._hide()
        self._filled = [False] * len(self.params)
        self._reached = [False] * len(self.params)
        self._carried = self._norms = None
        self.grad_state = GradState.EMPTY
        self._in_pass = False
        if self._frees:
            self._drop_grads()

    def unreached(self) -> list[str]:
        """Names of the parameters that no gradient of this rank has reached since the last `clear`."""
        return [slot.name for slot, reached in zip(self.layout.slots, self._reached) if not reached and slot.numel]

    def overflowed(self) -> list[str]:
        """Names of the parameters of which this rank's part of the averaged gradient is not finite."""
        return [
            segment.slot.name
            for run, _, grads in self.runs()
            for segment in self.layout.segments(run)
            if not bool(torch.isfinite(grads[segment.start : segment.stop]).all())
        ]

    def _hook(self) -> None:
        self.hooks += [
            param.register_post_accumulate_grad_hook(_weak_hook(self._arrived, index))
            for index, param in enumerate(self.params)
            if param.requires_grad
        ]

    def detach(self) -> None:
        """Forget the gradients, and the optimizer of values that outlast the engine."""
        self.clear()
        self.unhook()
        if self.sharded:  # the module keeps it alive, and must not keep the optimizer
            self.stepper, self.masters, self.run_stores = None, (), ()

    def unhook(self) -> None:
        """Leave gradients to come to the parameters."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def attach(self) -> None:
        """Take gradients again after `close`, where the values are not sharded.

        Raises:
            EngineStateError: another engine has the parameters, or their memory was replaced.
        """
        for slot, param in self.slots:
            if owner_of(param) not in (None, self):
                raise EngineStateError(f"parameter {slot.name} is another engine's by now: use that one")
        self.verify_attached()
        self.own()
        self._hook()

    def close(self) -> None:
        """Remove the hooks, and forget the optimizer. See `FlatParams.close` for what becomes of the values."""
        self.detach()
        super().close()


def _weak_hook(arrived: Callable[[int, torch.Tensor], None], index: int) -> Callable[[torch.Tensor], None]:
    """A hook that does not keep the unit alive: Python cannot see, and so not collect, what a tensor's hooks hold."""
    method = weakref.WeakMethod(arrived)

    def hook(param: torch.Tensor) -> None:
        call = method()
        if call is not None:
            call(index, param)

    return hook
