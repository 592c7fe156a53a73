"""The step: apply an ordinary torch optimizer to the flat fp32 runs behind the model's parameters.

The optimizer that the user gave (or named) is kept, and its param groups are kept, dict by dict, so that schedulers
and lr changes go on working; only the tensors in them are replaced by runs: one 1-D tensor per (unit, group). Where
the model is fp32 (or fp64) a run is a view of the unit's values, and nothing is held twice; where it is 16-bit, runs
are slices of one fp32 master arena.

A step is one loop over sub-groups of runs: give them their gradients in fp32 with loss scale and clipping taken out,
let the optimizer update them, write the model's copy. Whatever must be fetched or flushed around a sub-group (masters
on another tier, parameters on other ranks) has its place in that loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from deepspeedlite.errors import LossScaleError, OptimizerError, UnsupportedError
from deepspeedlite.log import logger
from deepspeedlite.optim.lamb import Lamb
from deepspeedlite.precision import LossScaler
from deepspeedlite.zero.layout import Run
from deepspeedlite.zero.schedule import GradientSchedule
from deepspeedlite.zero.unit import ShardUnit

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class SteppedRun(NamedTuple):
    """One run as the step sees it: what the optimizer updates, and the unit's views that it comes from and goes to."""

    master: torch.Tensor
    values: torch.Tensor
    grads: torch.Tensor


@dataclass
class StepSettings:
    """What the configuration says about the step."""

    gradient_clipping: float = 0.0
    check_overflow: bool = False
    sub_group_numel: int = 1_000_000_000


class ShardedOptimizer(torch.optim.Optimizer):
    """What `initialize` returns as the optimizer.

    It is a `torch.optim.Optimizer` to schedulers and type checks, and leaves groups, state and defaults to the wrapped
    `optimizer`; `torch.optim.Optimizer.__init__` is not called, since there is nothing of its own to keep.

    Args:
        optimizer: one that `registry.check_flat_compatible` passes, whose params the schedule's units hold.
        schedule: the units and the state of their gradients.
        scaler: the loss scale in force.
        settings: clipping, overflow check, sub-group size.

    Raises:
        OptimizerError: it has state already, and parameters of one run differ in it (in their step counts, say).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: GradientSchedule,
        scaler: LossScaler,
        settings: StepSettings,
    ) -> None:
        self.optimizer = optimizer
        self.loss_scaler = scaler
        self.overflow = False
        self._schedule = schedule
        self._settings = settings
        self._norm: float | None = None
        self._norm_is_current = False
        self._runs_of_units = self._make_runs()
        self._runs = [run for runs in self._runs_of_units for run in runs]
        for unit, runs in zip(schedule.units, self._runs_of_units):
            unit.on_new_values = partial(self._refresh, runs)
            unit.stepper, unit.masters = self, [run.master for run in runs]
        self._drop_states_of_parameters()
        self._sub_groups = self._cut_sub_groups()

    # --- construction ---------------------------------------------------------------------------------------------

    def _make_runs(self) -> list[list[SteppedRun]]:
        made: list[list[SteppedRun]] = []
        per_group: list[list[torch.Tensor]] = [[] for _ in self.optimizer.param_groups]
        segments: dict[torch.Tensor, list[tuple[int, int, int]]] = {}
        numbers = {slot.name: i for i, slot in enumerate(s for u in self._schedule.units for s in u.layout.slots)}
        for unit in self._schedule.units:
            arena = self._master_arena(unit)
            made.append([])
            cursor = 0
            for run, values, grads in unit.runs():
                if arena is None:
                    master = values
                else:
                    master = arena[cursor : cursor + run.numel]
                    cursor += run.numel
                per_group[run.group].append(master)
                segments[master] = [(s.start, s.stop, numbers[s.slot.name]) for s in unit.layout.segments(run)]
                self._adopt_state(unit, run, master)
                made[-1].append(SteppedRun(master, values, grads))
        for group, runs in zip(self.optimizer.param_groups, per_group):
            group["params"] = runs
        if isinstance(self.optimizer, Lamb):
            reduce = self._sum_over_ranks if self._schedule.plan.shard_optimizer else None
            self.optimizer.set_segments(segments, len(numbers), reduce)
        return made

    def _sum_over_ranks(self, squares: torch.Tensor) -> None:
        device = self._schedule.units[0].device  # a rank without runs has no tensor to tell it
        there = squares.to(device)
        self._schedule.group.all_reduce(there)
        if there is not squares:
            squares.copy_(there)

    @torch.no_grad()
    def _adopt_state(self, unit: ShardUnit, run: Run, master: torch.Tensor) -> None:
        """Join the states that the optimizer holds for single parameters (Adagrad makes them at once)."""
        owners = {slot.name: param for slot, param in zip(unit.layout.slots, unit.params)}
        segments = unit.layout.segments(run)
        states = [self.optimizer.state.get(owners[segment.slot.name], {}) for segment in segments]
        joined: dict[str, Any] = {}
        for key in states[0] if states else ():
            parts = [state.get(key) for state in states]
            per_element = all(
                key != "step" and isinstance(part, torch.Tensor) and part.shape == segment.slot.shape
                for part, segment in zip(parts, segments)
            )
            if per_element:
                joined[key] = torch.zeros_like(master)
                for (slot, start, stop), part in zip(segments, parts):
                    first = run.start + start - slot.start
                    joined[key][start:stop] = part.flatten()[first : first + stop - start]
            elif all(torch.equal(torch.as_tensor(part), torch.as_tensor(parts[0])) for part in parts):
                joined[key] = parts[0]
            else:
                raise OptimizerError(
                    f"{type(self.optimizer).__name__} holds a different {key!r} for {segments[0].slot.name} than for "
                    "others of its group; pass the optimizer fresh, and load its state after initialize"
                )
        if joined:
            self.optimizer.state[master] = joined

    def _drop_states_of_parameters(self) -> None:
        for unit in self._schedule.units:
            for param in unit.params:
                self.optimizer.state.pop(param, None)

    @staticmethod
    @torch.no_grad()
    def _master_arena(unit: ShardUnit) -> torch.Tensor | None:
        """fp32 copies of the unit's shard; None where the values themselves are precise enough."""
        if unit.dtype in (torch.float32, torch.float64):
            return None
        shards = [values.float() for _, values, _ in unit.runs()]
        return torch.cat(shards) if shards else torch.empty(0)

    def _cut_sub_groups(self) -> list[list[SteppedRun]]:
        """Runs to step together, cut by sizes that are the same on every rank, so that all take equally many steps."""
        sub_groups: list[list[SteppedRun]] = []
        room = 0
        for unit, runs in zip(self._schedule.units, self._runs_of_units):
            numel = unit.layout.shard_numel
            if not sub_groups or numel > room:
                sub_groups.append([])
                room = self._settings.sub_group_numel
            sub_groups[-1] += runs
            room -= numel
        return sub_groups

    # --- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from the averaged gradients; skip and set `overflow` if they are not finite.

        Raises:
            LossScaleError: fp16 overflow at the smallest loss scale, naming the parameters that overflowed.
        """
        if closure is not None:
            raise UnsupportedError("step(closure) would run the backward pass inside the step; call backward first")
        self._schedule.finish()
        for unit in self._schedule.units:
            unit.verify_attached()
        self._norm, self._norm_is_current = None, True
        factor = 1.0 / self.loss_scaler.scale
        if self._settings.gradient_clipping > 0 or self._settings.check_overflow:
            norm = self._measure_norm()
            self.overflow = self._settings.check_overflow and not math.isfinite(norm)
            if self.overflow:
                self._skip()
                return
            factor *= self._clip_factor(norm)
        for sub_group in self._sub_groups:
            self._load_grads(sub_group, factor)
            self.optimizer.step()
            self._store_values(sub_group)
        self._schedule.share_values()
        self.loss_scaler.update(overflow=False)
        self._schedule.clear()

    def _skip(self) -> None:
        guilty = self._schedule.overflowed() if self.loss_scaler.at_minimum else []
        before = self.loss_scaler.scale
        try:
            self.loss_scaler.update(overflow=True)
        except LossScaleError as error:
            shown = ", ".join(guilty[:8]) + (f" and {len(guilty) - 8} more" if len(guilty) > 8 else "")
            raise LossScaleError(
                f"{error}; the gradients that are not finite belong to: {shown}. The run has diverged: lower the "
                "learning rate, clip gradients, or train in bf16"
            ) from None
        finally:
            self._schedule.clear()
        logger.info("gradients overflowed: step skipped, loss scale %g -> %g", before, self.loss_scaler.scale)

    def _clip_factor(self, norm: float) -> float:
        limit = self._settings.gradient_clipping
        return min(1.0, limit / (norm + CLIP_EPSILON)) if limit > 0 else 1.0

    @staticmethod
    def _load_grads(sub_group: list[SteppedRun], factor: float) -> None:
        for master, _, grads in sub_group:
            if grads.dtype == master.dtype:
                master.grad = grads if factor == 1.0 else grads.mul_(factor)
            else:
                master.grad = grads.to(master.dtype).mul_(factor)

    @staticmethod
    def _store_values(sub_group: list[SteppedRun]) -> None:
        for master, values, _ in sub_group:
            master.grad = None
            if master is not values:
                values.copy_(master)

    def refresh_masters(self) -> None:
        """Take the model's present values as the masters', after they were loaded from outside."""
        self._refresh(self._runs)

    @staticmethod
    @torch.no_grad()
    def _refresh(runs: Sequence[SteppedRun]) -> None:
        for master, values, _ in runs:
            if master is not values:
                master.copy_(values)

    # --- norms ----------------------------------------------------------------------------------------------------

    def _measure_norm(self) -> float:
        self._norm = float(self._schedule.grad_norm()) / self.loss_scaler.scale
        return self._norm

    def grad_norm(self) -> float | None:
        """The 2-norm of the last step's averaged gradients, before clipping; None before the first step.

        Where neither clipping nor an overflow check needed it during the step, it is computed when asked for, which is
        possible until the next backward pass overwrites the gradients; afterwards None.
        """
        if self._norm is None and self._norm_is_current and not self._schedule.has_grads:
            return self._measure_norm()
        return self._norm

    # --- what users and clients of an optimizer touch ----------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups; their `params` are runs."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state, per run."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        """The factor on the loss now in force; 1 where gradients are not scaled."""
        return self.loss_scaler.scale

    cur_scale = loss_scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated so far."""
        self._schedule.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: groups are laid out in flat buffers when the engine is made.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "add_param_group after initialize: pass every group in the optimizer or model_parameters"
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state (per run) and the loss scale's."""
        return {"optimizer": self.optimizer.state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same model, world size and configuration."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])

    def __repr__(self) -> str:
        return f"ShardedOptimizer({self.optimizer!r})"
