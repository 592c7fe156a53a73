"""When gradients are reduced: during the backward pass where that is possible, at its end for the rest.

Units are always launched in the same order, on every rank, whatever the order in which gradients arrive: collectives
are matched by order, so a rank whose parameters were used differently would otherwise average the wrong buffers. A
unit therefore waits for those before it; what is left when the pass ends is launched then, and what no pass
launched (a rank that had nothing to compute) is launched by the step. Every rank reduces every unit exactly once
per reducing pass.

Where gradients are sharded, every pass reduces, and at most `MAX_IN_FLIGHT` reductions are under way, because each of
them keeps a whole gradient buffer alive.

[Note: the way of a gradient]
From autograd to Adam, by plain calls, in the order of the files:

    engine          `backward` begins the pass: `GradReducer.begin_backward`, and each unit hides its gradients
    unit            `hook`: autograd calls `GradReducer._arrived` with every gradient that it has put into `param.grad`
    grad_reducer    `_arrived` gives it to the unit, counts it, and lets the prefetcher reshard what is done with
    unit            `take` checks it, and takes it out of `param.grad`
    grad_buffer     `add` copies it, scaled, into its slot
    arrivals        `note` counts it, and says when the unit has all of its own
    grad_reducer    `_launch_complete` then reduces the unit, when those before it are: `GradBuffer.reduce`
    engine          the pass is over: `GradReducer.end_backward` reduces what is left and waits for all of it
    grad_buffer     `wait_for_reduce` leaves this rank's part of the average in `shard`
    engine          `step` calls `ShardedOptimizer.take_step`, and that `GradReducer.finish` and `grad_norm`
    optim/step      each run is a piece of `shard`: it goes, unscaled and clipped, to the optimizer with its master
    flat_params     `start_sharing` sends the values that the step has written, where every rank keeps all of them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from deepspeedlite.comm import Group
from deepspeedlite.parallel.replica import Replica
from deepspeedlite.runtime.device import device_in_use
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero.grad_buffer import GradState, norm_dtype
from deepspeedlite.zero.prefetch import ParamPrefetcher
from deepspeedlite.zero.unit import ShardUnit, UnitOptions
from deepspeedlite.zero.wrap import Bucket, NamedParameter

MAX_IN_FLIGHT = 2


class PassListener(Protocol):
    """What the reducer tells whoever counts passes, which is the engine."""

    def announce_backward(self) -> None:
        """A gradient has come in a pass that nobody began: call `GradReducer.begin_backward`."""

    def note_clearing(self) -> None:
        """A user clears gradients between two passes."""


class GradReducer:
    """The units of one engine and the progress of their reduction.

    Args:
        units: in launch order.
        options: what they were made with.
        overlap: launch a unit as soon as it is complete rather than at the end of the pass.
        replica: the ranks whose gradients are one model's, for its norm and its overflow.
        prefetcher: what unshards sharded values, where there are any.
        listener: who counts passes.
    """

    def __init__(
        self,
        units: Sequence[ShardUnit],
        options: UnitOptions,
        *,
        overlap: bool = True,
        replica: Replica | None = None,
        prefetcher: ParamPrefetcher | None = None,
        listener: PassListener,
    ) -> None:
        self.units = list(units)
        self._options, self.plan, self.group = options, options.plan, options.policy.group
        self.replica = replica or Replica()
        self._overlap = overlap
        self._prefetcher, self._listener = prefetcher, listener
        # A reduction under way keeps a whole gradient alive where they are sharded; on gloo, the other ranks' pieces.
        self._bounded = self.plan.shard_grads or (self.plan.shard_optimizer and self.group.backend == "gloo")
        # How many of the units, in their order, this pass has begun to reduce, and how many of those are done.
        self._launched_units = self._awaited_units = 0
        # Whether this pass averages; and whether there is one, from `begin_backward` to `end_backward`.
        self._reducing = self.in_backward = False
        # autograd's number of the outermost pass; -1 until a hook that surely runs in it has told.
        self._outer_pass = -1
        self.attach()

    def attach(self) -> None:
        """Take the gradients of the units' parameters as they arrive."""
        for unit in self.units:
            unit.hook(self._arrived)

    def add_units(self, buckets: Sequence[Sequence[NamedParameter]]) -> list[ShardUnit]:
        """Units for parameters that are trained from now on; their values stay whole on every rank."""
        added = [ShardUnit(Bucket(members), self._options) for members in buckets]
        for unit in added:
            unit.hook(self._arrived)
        self.units += added
        return added

    # --- one backward pass ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _arrived(self, unit: ShardUnit, index: int, param: torch.Tensor) -> None:
        """Autograd has put a gradient into `param.grad`."""
        grad = param.grad
        if grad is None:
            return
        if not unit.arrivals.in_pass:
            unit.hide_unannounced(index, param)
            self._listener.announce_backward()
        unit.take(index, param, grad)
        is_nested = not unit.arrivals.has_learnt and self._is_nested()
        if unit.arrivals.note(index, is_nested):
            if self._prefetcher is not None:
                self._prefetcher.all_arrived(unit.flat)
            self._launch_complete()

    def begin_backward(self, scale: float, reduce: bool, measure: bool = False) -> None:
        """A backward pass starts, whose gradients count `scale` times.

        Args:
            scale: a factor on them.
            reduce: average them when they are complete, as at the end of an accumulation window.
            measure: the step that comes next asks for their norm.
        """
        if self.in_backward:
            raise EngineStateError("a backward pass began before the previous one had ended")
        self.in_backward = True
        self._reducing = reduce
        self._launched_units = self._awaited_units = 0
        self._outer_pass = torch._C._current_graph_task_id()
        for unit in self.units:
            unit.begin_backward(scale, reduce, measure)

    def note_pass(self) -> None:
        """Called from the outermost backward pass, by a hook on the model's output: the pass is known from now on."""
        self._outer_pass = torch._C._current_graph_task_id()

    def _is_nested(self) -> bool:
        """Whether the gradient that arrives now comes from a pass inside the pass (reentrant checkpointing)."""
        current = torch._C._current_graph_task_id()
        if self._outer_pass == -1:
            self._outer_pass = current
        return current != self._outer_pass

    def _launch_complete(self) -> None:
        if not (self._reducing and self.in_backward and (self._overlap or self.plan.shard_grads)):
            return
        while self._launched_units < len(self.units) and self.units[self._launched_units].arrivals.is_complete:
            self._launch_next()

    def _launch_next(self) -> None:
        self.units[self._launched_units].reduce()
        self._launched_units += 1
        if self._bounded:
            in_flight = MAX_IN_FLIGHT if self._overlap or not self.plan.shard_grads else 0
            while self._awaited_units < self._launched_units - in_flight:
                self.units[self._awaited_units].grads.wait_for_reduce()
                self._awaited_units += 1

    def end_backward(self, is_shared: bool = False) -> None:
        """The backward pass is over: reduce what is left, wait for all of it and show the gradients.

        `is_shared`: all ranks run it, so that one that has no gradients takes part in its reductions too.
        """
        if not self.in_backward:
            return
        self.in_backward = False
        if self._prefetcher is not None:
            self._prefetcher.end_backward()  # what it reshards is memory for what is left to reduce
        if self._reducing and (is_shared or self.has_grads):
            while self._launched_units < len(self.units):
                self._launch_next()
            self._wait()
        for unit in self.units:
            try:
                unit.end_backward()
            except RuntimeError:  # torch takes no gradient of another dtype
                unit.flat.verify_attached()
                raise

    def finish(self) -> None:
        """Before a step: make every unit hold the average, also on a rank that ran no backward pass."""
        self.end_backward()
        for unit in self.units:
            unit.take_in()
            if unit.grads.state is not GradState.AVERAGED:
                unit.reduce()
                if self.plan.shard_grads:
                    unit.grads.wait_for_reduce()
        self._wait()
        for unit in self.units:
            unit.sum_over_tied()

    def _wait(self) -> None:
        for unit in self.units:
            unit.grads.wait_for_reduce()
        if any(unit.grads.shard.device != unit.flat.device for unit in self.units):
            device_in_use().synchronize()  # averages are on their way to the host's memory, in the current stream

    @property
    def has_grads(self) -> bool:
        """Whether any gradient has arrived since the last `clear`."""
        return any(unit.grads.state is not GradState.EMPTY for unit in self.units)

    def forget(self, params: Iterable[torch.Tensor] | None = None) -> None:
        """Clear the gradients of these parameters, or all, as a user asks for it between two passes."""
        if not self.has_grads:
            return
        self._listener.note_clearing()
        if params is None:
            self.clear()
            return
        ids = {id(param) for param in params}
        for unit in self.units:
            unit.forget_grads(ids)

    def clear(self) -> None:
        """Forget all gradients and any pass in progress."""
        self.in_backward = False
        for unit in self.units:
            unit.clear()

    @torch.no_grad()
    def grad_norm(self, alone: bool = False, precise: bool = False) -> torch.Tensor:
        """The 2-norm of the model's gradients as the buffers hold them, finite only if every gradient is: 0-dim.

        fp32, or fp64 where gradients are, where ranks hold a model together, and where it is to be `precise`: squares
        of gradients beyond 1e19 are beyond fp32. Collective; over the replica only, if `alone` and every rank of the
        group holds all gradients.
        """
        alike = not self.plan.shard_optimizer
        dtype = torch.float64 if precise else norm_dtype(self.units[0].grads.dtype) if self.units else torch.float32
        device = self.units[0].flat.device if self.units else self.replica.group.device
        total = _joined([norm for unit in self.units for norm in unit.grads.norms(precise)], dtype, device)
        if not (alone and alike):
            total = _norm_of_all(total, self.group, alike)
        return _norm_of_all(total.double(), self.replica.group) if self.replica.group.size > 1 else total

    def overflowed(self) -> list[str]:
        """Names, as in checkpoints, of the model's parameters with gradients that are not finite. Collective."""
        mine = [name for unit in self.units for name in unit.overflowed()]
        if self.group.size > 1:
            everyone = {name for names in self.group.all_gather_objects(mine) for name in names}
            mine = [slot.name for unit in self.units for slot in unit.layout.slots if slot.name in everyone]
        parts = self.replica.group.all_gather_objects([self.replica.name_prefix + name for name in mine])
        return list(dict.fromkeys(name for names in parts for name in names))

    def share_values(self, in_flight_numel: int) -> None:
        """After a step wrote this rank's shards: make values that stay whole equal on all ranks again.

        Values of at most `in_flight_numel` elements, or of one unit, are under way at a time.
        """
        if not self.plan.shard_optimizer:
            return
        awaited, room = 0, in_flight_numel
        for index, unit in enumerate(self.units):
            while awaited < index and room < unit.layout.numel:
                self.units[awaited].flat.wait_for_sharing()
                room += self.units[awaited].layout.numel
                awaited += 1
            unit.flat.start_sharing()
            room -= unit.layout.numel
        for unit in self.units[awaited:]:
            unit.flat.wait_for_sharing()

    def close(self) -> None:
        """Remove all hooks from the parameters."""
        for unit in self.units:
            unit.close()


def _joined(norms: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The norm of what has these norms."""
    if not norms:
        return torch.zeros((), dtype=dtype, device=device)
    return torch.linalg.vector_norm(torch.stack([norm.to(device, dtype) for norm in norms]))


def _norm_of_all(norm: torch.Tensor, group: Group, alike: bool = False) -> torch.Tensor:
    """The norm of what the ranks of a group have these norms of; `alike`: of what they all have, finite on all."""
    if group.size == 1:
        return norm
    total = norm.square()
    group.all_reduce(total, label="the gradients' norm")
    return (total / group.size if alike else total).sqrt()
