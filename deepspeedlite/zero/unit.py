"""A ShardUnit: some parameters that are trained, and with them what brings their gradients together.

It has three parts: `flat` is where the values lie, `grads` where the gradients lie and how they are reduced, `arrivals`
counts how many a backward pass still owes. What is left here is what users see of gradients, and who steps the values.

[Note: what users see, and what they write]
Between passes `param.grad` is a view of the slot wherever this rank holds the whole gradient (see `_shows`), and None
elsewhere. Whatever a user makes of it is the gradient from then on: changed in place it is so already; where the next
pass or the step finds None, the gradient was cleared, and where it finds another tensor, replaced (`take_in`). What is
shown, and written, is what the buffer holds: times the loss scale, and each micro-batch's share of the accumulation.

[Note: a gradient that was not handed over]
When `loss.backward()` starts without the engine knowing (the model was called around it), autograd adds into the
slots that are still shown. That is right only while the scale is 1; otherwise it is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.offload.options import Offload
from deepspeedlite.offload.store import Store
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero.arrivals import Arrivals
from deepspeedlite.zero.flat_params import FlatParams, owner_of
from deepspeedlite.zero.grad_buffer import GradBuffer, GradState
from deepspeedlite.zero.layout import Run
from deepspeedlite.zero.missing import as_plain
from deepspeedlite.zero.plan import ReducePolicy, ShardingPlan
from deepspeedlite.zero.use_order import UseTrace
from deepspeedlite.zero.wrap import Bucket


class Stepper(Protocol):
    """What a unit knows of the optimizer that steps its runs."""

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """The optimizer's state, per master."""

    @property
    def loss_scale(self) -> float:
        """The factor that the gradients carry."""

    def refresh(self, unit: Any) -> None:
        """The unit's values were written from outside: take the masters from them."""


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What all units of an engine have in common."""

    policy: ReducePolicy
    plan: ShardingPlan
    grad_dtype: torch.dtype | None = None  # in which gradients are accumulated; the parameters' own if None
    offload: Offload  # where values live between uses, and averaged gradients; how runs are cut
    counts: Callable[[torch.Tensor], bool]  # whether the model's norm counts a parameter here
    live: UseTrace  # counts values that come to life, and knows the order of their uses

    @classmethod
    def from_config(
        cls,
        settings: DeepSpeedConfig,
        group: Group,
        grad_dtype: torch.dtype | None,
        offload: Offload,
        counts: Callable[[torch.Tensor], bool],
    ) -> UnitOptions:
        """What the configuration says of units over the ranks of `group`."""
        return cls(
            policy=ReducePolicy.from_config(settings, group),
            plan=ShardingPlan.from_stage(settings.zero_optimization.stage),
            grad_dtype=grad_dtype,
            offload=offload,
            counts=counts,
            live=UseTrace(),
        )


class ShardUnit:
    """Parameters of one dtype that are trained: their flat values, their flat gradients, and who steps them.

    Args:
        bucket: the parameters, whose memory is replaced by views; a persistent bucket of stage 3 is not sharded.
        options: the engine's.
    """

    def __init__(self, bucket: Bucket, options: UnitOptions) -> None:
        plan, policy = options.plan, options.policy
        self.flat = FlatParams(
            bucket.members,
            policy.group,
            sharded=bucket.sharded,
            shard_count=plan.shard_count(policy.group.size),
            offload=options.offload,
            run_numel=options.offload.run_numel,
            live=options.live,
            unit=self,
        )
        self.layout = self.flat.layout  # of values and gradients alike
        # Views of the shard, or pieces of the store that bring it. The optimizer keeps them, so they are cut once.
        self._runs = self.flat.cut_runs()
        self.grads = GradBuffer(
            self.layout,
            policy,
            plan,
            dtype=options.grad_dtype or self.flat.dtype,
            device=self.flat.device,
            offload=options.offload,
            counted={slot.name for slot, param in self.flat.slots if options.counts(param)},
            tag=2 * self.flat.key + 1,
        )
        self.arrivals = Arrivals(len(self.flat.params))
        # Ranks that hold the same parameters for another part of the model, and a gradient of their own for them.
        self._tied_group = bucket.tied_group
        self._hides = plan.shard_params or self.grads.dtype != self.flat.dtype  # gradients, from `param.grad`
        # What each `param.grad` was left at, to tell what users have made of it; where each slot begins in the buffer.
        self._shown: list[torch.Tensor | None] = []
        self._offsets = [slot.start * self.grads.dtype.itemsize for slot in self.layout.slots]
        self._hide()
        # The optimizer, where there is one, and what it updates: a 1-D tensor per run, and where what a step of each
        # reads and writes lives. Whoever looks at a parameter (accessors, checkpoints) finds them by its unit.
        self.stepper: Stepper | None = None
        self.masters: Sequence[torch.Tensor] = ()
        self.run_stores: Sequence[Store] = ()
        self.hooks: list[RemovableHandle] = []  # the same list for good: whoever ends the unit may hold it alone

    # --- what the optimizer steps ---------------------------------------------------------------------------------

    def runs(self) -> list[tuple[Run, torch.Tensor, torch.Tensor]]:
        """This rank's runs: index range, values and averaged gradients as 1-D views of its shard."""
        return [(run, values, self.grads.shard[slice(*self.layout.span(run))]) for run, values in self._runs]

    def be_stepped_by(
        self, stepper: Stepper | None, masters: Sequence[torch.Tensor] = (), stores: Sequence[Store] = ()
    ) -> None:
        """From now on an optimizer updates the runs, or none does."""
        self.stepper, self.masters, self.run_stores = stepper, masters, stores

    def note_new_values(self) -> None:
        """Let the optimizer, which may keep copies of the values, know that they were written from outside."""
        if self.stepper is not None:
            self.stepper.refresh(self)

    # --- a backward pass ------------------------------------------------------------------------------------------

    def begin_backward(self, scale: float, reduce: bool, measure: bool = False) -> None:
        """Hide the gradients shown so far and take what this backward pass brings, each multiplied by `scale`.

        `measure`: the norm will be asked for after it, and its reduction may take it.
        """
        self.take_in()
        self._hide()
        self.grads.begin(scale, reduce, measure and not self._shows(GradState.AVERAGED))
        with as_plain():
            self.arrivals.begin(sum(param.requires_grad for param in self.flat.params))

    def take(self, index: int, param: torch.Tensor, grad: torch.Tensor) -> None:
        """Move what autograd has put into `param.grad` to the buffer."""
        slot = self.layout.slots[index]
        if self.arrivals.is_launched:
            raise EngineStateError(
                f"parameter {slot.name} received a gradient after its bucket had been reduced in this backward pass: "
                "it was used a different number of times than in earlier steps, inside reentrant activation "
                "checkpoints. Use non-reentrant checkpointing (use_reentrant=False), or set "
                "zero_optimization.overlap_comm to false"
            )
        if not self.grads.is_in_place(index, grad):
            param.grad = None
            self.grads.add(index, grad)
        elif self.grads.takes_in_place:
            self.grads.add(index, None)
        else:
            raise EngineStateError(
                f"the gradient of {slot.name} was accumulated by a backward pass that did not come through the engine, "
                "while loss scaling or gradient accumulation is on; call the model through the engine "
                "(engine(inputs)) or use engine.backward(loss)"
            )

    def hide_unannounced(self, index: int, param: torch.Tensor) -> None:
        """Before a pass begins because a gradient has come: that one is autograd's, not a user's."""
        if param.grad is not self._shown[index]:
            param.grad = None

    def reduce(self) -> None:
        """Start averaging the gradients over the ranks."""
        self.arrivals.is_launched = self.arrivals.in_pass
        self.grads.reduce()

    def end_backward(self) -> None:
        """Close the pass: learn how often each gradient arrived, and show the gradients where they can be shown."""
        if not self.arrivals.in_pass:
            return
        self.arrivals.end()
        if self._shows(self.grads.state):
            for index, param in enumerate(self.flat.params):
                view = self.grads.view(index)
                if view is not None:
                    param.grad = self._shown[index] = view

    def sum_over_tied(self) -> None:
        """Add the averages of tied parameters' copies, where there are any. Collective over the ranks that have one."""
        if self._tied_group is not None:
            self.grads.sum_over(self._tied_group)

    def clear(self) -> None:
        """Forget the gradients."""
        self.grads.clear()
        self._hide()
        self.arrivals.clear()

    def unreached(self) -> list[str]:
        """Names of the parameters that no gradient of this rank has reached since the last `clear`."""
        return [slot.name for slot, got in zip(self.layout.slots, self.arrivals.reached) if not got and slot.numel]

    def overflowed(self) -> list[str]:
        """Names of the parameters of which this rank's part of the averaged gradient is not finite."""
        return [
            segment.slot.name
            for run, _, grads in self.runs()
            for segment in self.layout.segments(run)
            if not bool(torch.isfinite(grads[segment.start : segment.stop]).all())
        ]

    # --- what users see of it -------------------------------------------------------------------------------------

    def _hide(self) -> None:
        with as_plain():
            for param in self.flat.params:
                param.grad = None
        self._shown = [None] * len(self.flat.params)

    def _shows(self, state: GradState) -> bool:
        """Whether `param.grad` can show the gradients: all of them are here, in the parameters' dtype."""
        if self._hides:
            return False
        return state is GradState.LOCAL or (state is GradState.AVERAGED and not self.grads.scatters)

    @property
    def shows_gradients(self) -> bool:
        """Whether `param.grad` shows them after every pass."""
        return self._shows(GradState.LOCAL) and self._shows(GradState.AVERAGED)

    @torch.no_grad()
    def take_in(self) -> None:
        """Make what users have made of `param.grad` since the last pass the gradients."""
        start = self.grads.full.data_ptr()
        with as_plain():
            changed = [
                (index, param.grad)
                for index, (param, shown, offset) in enumerate(zip(self.flat.params, self._shown, self._offsets))
                # The second: other memory was put behind what is shown, by `param.grad.data = ...`.
                if param.grad is not shown or (shown is not None and shown.data_ptr() != start + offset)
            ]
        if len(changed) > 1:  # parameters may have exchanged what they show
            changed = [(index, None if grad is None else grad.clone()) for index, grad in changed]
        for index, grad in changed:
            self._replace(index, grad)

    @torch.no_grad()
    def forget_grads(self, ids: Container[int]) -> None:
        """Clear the gradients of the parameters with these ids."""
        for index, param in enumerate(self.flat.params):
            if id(param) in ids:
                self._replace(index, None)

    def _replace(self, index: int, grad: torch.Tensor | None) -> None:
        param, slot = self.flat.params[index], self.layout.slots[index]
        if grad is not None and tuple(grad.shape) != slot.shape:
            raise EngineStateError(f"{slot.name}.grad was set to a tensor of {tuple(grad.shape)}, not {slot.shape}")
        param.grad = self._shown[index] = None
        self.grads.replace(index, grad.to_dense() if grad is not None and grad.is_sparse else grad)
        if grad is not None and self._shows(self.grads.state):
            param.grad = self._shown[index] = self.grads.view(index)

    # --- whose gradients come here --------------------------------------------------------------------------------

    def hook(self, arrived: Callable[[ShardUnit, int, torch.Tensor], None]) -> None:
        """Let a method of the reducer know of every gradient: of this unit, the parameter with this index."""
        self.hooks += [
            param.register_post_accumulate_grad_hook(_weak_hook(arrived, weakref.ref(self), index))
            for index, param in enumerate(self.flat.params)
            if param.requires_grad
        ]

    def unhook(self) -> None:
        """Leave gradients to come to the parameters."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def take_back(self) -> None:
        """Have the parameters again after `close`, where the values are not sharded.

        Raises:
            EngineStateError: another engine has the parameters, or their memory was replaced.
        """
        for slot, param in self.flat.slots:
            if owner_of(param) not in (None, self.flat):
                raise EngineStateError(f"parameter {slot.name} is another engine's by now: use that one")
        self.flat.verify_attached()
        self.flat.own()

    def detach(self) -> None:
        """Forget the gradients, and the optimizer of values that outlast the engine."""
        self.clear()
        self.unhook()
        if self.flat.sharded:  # the module keeps it alive, and must not keep the optimizer
            self.be_stepped_by(None)

    def close(self) -> None:
        """Remove the hooks, and forget the optimizer. See `FlatParams.close` for what becomes of the values."""
        self.detach()
        self.flat.close()


def unit_of(param: torch.Tensor) -> ShardUnit | None:
    """The unit that a parameter is trained in, if there is one."""
    owner = owner_of(param)
    unit = None if owner is None else owner.unit
    return unit if isinstance(unit, ShardUnit) else None


def _weak_hook(
    arrived: Callable[[ShardUnit, int, torch.Tensor], None], unit: Callable[[], ShardUnit | None], index: int
) -> Callable[[torch.Tensor], None]:
    """A hook that keeps neither alive: Python cannot see, and so not collect, what a tensor's hooks hold."""
    method = weakref.WeakMethod(arrived)

    def hook(param: torch.Tensor) -> None:
        call, its = method(), unit()
        if call is not None and its is not None:
            call(its, index, param)

    return hook
