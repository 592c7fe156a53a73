"""Learning-rate schedules beside torch's, with DeepSpeed's names, parameters and formulas.

A schedule is a pure function of the step n, counted from 0: `lrs_at(n)` gives one learning rate per parameter group.
`_Schedule` does the rest: it writes the rates into the optimizer, remembers n and saves it. So a schedule can be
plotted, resumed or moved to any step without a replay. They are plug-ins: the package's root adds each by its name to
those of torch that a configuration's `scheduler` section may ask for (`optim.schedules`).

The engine calls `step()` after each optimizer step, so step n of training runs with the rate of n - 1, and the
very first with the one written at construction (n = -1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepspeedlite.optim.schedules import with_param_groups
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.runtime.log import logger
from deepspeedlite.schedule_parameters import schedule_problem

PerGroup = float | Sequence[float]  # one value for all parameter groups, or one for each


class _Schedule:
    """Applies `lrs_at` to an optimizer's parameter groups and keeps count.

    `optimizer` is anything with `param_groups`, or a wrapper whose `.optimizer` has them. `last_batch_iteration` is
    the last step taken, -1 at the start; resuming with another value leaves the optimizer alone until `step`.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int, given: Mapping[str, Any]) -> None:
        """`given`: the constructor's arguments, which are checked by their names as a configuration's are."""
        problems = {name: schedule_problem(name, value) for name, value in given.items()}
        if problem := next((f"{name} {said}" for name, said in problems.items() if said), ""):
            raise OptimizerError(problem)
        self.optimizer = with_param_groups(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[Any] | None = None

    def lrs_at(self, step: int) -> list[Any]:
        """The learning rate of each parameter group after step `step` (from 0; -1: before the first)."""
        raise NotImplementedError(f"{type(self).__name__} must define lrs_at")

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group now."""
        return self.lrs_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[Any]:
        """The rates last written into the optimizer. Raises `AssertionError`, as DeepSpeed's clients expect."""
        if self._last_lr is None:
            raise AssertionError("need to call step() first: no learning rate has been set by this schedule yet")
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None, *, batch_iteration: int | None = None) -> None:
        """Move on by one step, or to the given one, and write its rates into the optimizer."""
        target = batch_iteration if last_batch_iteration is None else last_batch_iteration
        self.last_batch_iteration = self.last_batch_iteration + 1 if target is None else target
        self._write()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs: the step. The rest is configuration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: Mapping[str, int]) -> None:
        """Go to a saved step and write its rates into the optimizer."""
        self.last_batch_iteration = sd["last_batch_iteration"]
        self._write()

    def _begin(self) -> None:
        """Write the first rates, unless this resumes."""
        if self.last_batch_iteration == -1:
            self._write()

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self.get_lr()):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in groups]

    def _per_group(self, name: str, value: PerGroup) -> list[Any]:
        count = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise OptimizerError(f"{name} has {len(values)} values and the optimizer has {count} parameter groups")
        return values


class LRRangeTest(_Schedule):
    """A rate that only grows, to find where training diverges (Smith 2018, arXiv:1803.09820).

    lr(n) = min_lr * (1 + step_rate * k),  k = (n + 1) / step_size, rounded down with `lr_range_test_staircase`.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration, locals())
        self.min_lr = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = int(lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._begin()

    def lrs_at(self, step: int) -> list[Any]:
        """The formula of the class's docstring."""
        interval = float(step + 1) / self.step_size
        growth = 1 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [lr * growth for lr in self.min_lr]


class OneCycle(_Schedule):
    """One rise and fall of the rate, with the momentum going the other way, then a decay (arXiv:1803.09820).

    With i = n + 1, F = `cycle_first_step_size` and S = `cycle_second_step_size` (default F), for n < F + S:
        h = i / F for i <= F, else (F + S - i) / S;   with a stair count c > 0: h rounded down to a multiple of 1 / c
        lr = min_lr + (max_lr - min_lr) h             momentum = max_mom - (max_mom - min_mom) h
    and afterwards, with d = (i - F - S) / `decay_step_size` (each only where its rate and the step size are not 0):
        lr = min_lr / (1 + decay_lr_rate d)           momentum = max_mom (1 + decay_mom_rate d)
    As in DeepSpeed, momentum is beta1 of optimizers that have betas, and cycling it sets beta2 to 0.99. The first step
    is taken with the formula's max_mom, where DeepSpeed, which reports that too, takes it with min_mom.
    `get_last_lr` raises until the first step.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration, locals())
        second_size = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.first_step_size = float(cycle_first_step_size)
        self.second_step_size = float(second_size)
        self.total_size = self.first_step_size + self.second_step_size
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = second_stairs
        self.decay_step_size = decay_step_size
        self.decay_lr_rate = decay_lr_rate
        self.decay_mom_rate = decay_mom_rate
        self.min_lrs = self._per_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self._per_group("cycle_max_lr", cycle_max_lr)
        self.min_moms = self._per_group("cycle_min_mom", cycle_min_mom)
        self.max_moms = self._per_group("cycle_max_mom", cycle_max_mom)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and not all("betas" in group for group in self.optimizer.param_groups):
            logger.warning(
                "OneCycle leaves the momentum alone: %s has no betas (say cycle_momentum false to silence this)",
                type(self.optimizer).__name__,
            )
            self.cycle_momentum = False
        self._begin()
        self._last_lr = None

    def lrs_at(self, step: int) -> list[Any]:
        """The formula of the class's docstring; min_lr before the first step."""
        if step >= self.total_size:
            shrink = 1 + self.decay_lr_rate * self._decay_interval(step)
            return [lr / shrink for lr in self.min_lrs]
        height = self._height(step)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs)]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """(momentum, 0.99) for each parameter group now, or None where momentum is not cycled."""
        return self.moms_at(self.last_batch_iteration) if self.cycle_momentum else None

    def moms_at(self, step: int) -> list[tuple[float, float]]:
        """(momentum, 0.99) for each parameter group after `step`; max_mom before the first."""
        if step >= self.total_size:
            grow = 1 + self.decay_mom_rate * self._decay_interval(step)
            momenta = [high * grow for high in self.max_moms]
        else:
            height = self._height(step)
            momenta = [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms)]
        return [(momentum, 0.99) for momentum in momenta]

    def _write(self) -> None:
        super()._write()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or []):
            if not 0 <= betas[0] < 1:
                raise OptimizerError(
                    f"OneCycle: the momentum is {betas[0]:g} at step {self.last_batch_iteration}, outside [0, 1): "
                    f"lower decay_mom_rate ({self.decay_mom_rate}) or mend cycle_min_mom and cycle_max_mom"
                )
            group["betas"] = betas

    def _height(self, step: int) -> float:
        position = (step + 1) % self.total_size
        rising = position <= self.first_step_size
        distance, size = (
            (position, self.first_step_size) if rising else (self.total_size - position, self.second_step_size)
        )
        stairs = self.first_stair_count if rising else self.second_stair_count
        return math.floor(distance * stairs / size) / stairs if stairs > 0 else distance / size

    def _decay_interval(self, step: int) -> float:
        return (step - self.total_size + 1) / self.decay_step_size if self.decay_step_size else 0.0


class WarmupLR(_Schedule):
    """A rise from `warmup_min_lr` to `warmup_max_lr` (default: each group's own lr) and then a constant.

    lr(n) = min_lr + (max_lr - min_lr) w(n) with, for n < N, w = log(n + 1) / log(N) or, linear, w = n / N, and then 1.
    N is `warmup_num_steps`, at least 2.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration, locals())
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps, self.warmup_type = max(2, int(warmup_num_steps)), warmup_type
        self._begin()

    def lrs_at(self, step: int) -> list[Any]:
        """The formula of the class's docstring; min_lr before the first step."""
        if step < 0:
            return list(self.min_lrs)
        height = self._height(step)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs)]

    def _height(self, step: int) -> float:
        if step < self.warmup_num_steps:
            return _warmup_fraction(step, self.warmup_num_steps, self.warmup_type)
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then a straight line down to `warmup_min_lr` at `total_num_steps`.

    From n = N on, w(n) = max(0, (T - n) / max(1, T - N)) with T = `total_num_steps`.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        if problem := schedule_problem("total_num_steps", total_num_steps):
            raise OptimizerError(f"total_num_steps {problem}")
        self.total_num_steps = int(total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_all_warmup(self.total_num_steps, self.warmup_num_steps)

    def _after_warmup(self, step: int) -> float:
        span = max(1.0, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, float(self.total_num_steps - step) / span)


class WarmupCosineLR(_Schedule):
    """A rise to each group's own lr, then half a cosine down to `cos_min_ratio` of it.

    lr(n) = lr_of_group * q(n). For n < N: q = a + (1 - a) w(n), a = `warmup_min_ratio`, w as in `WarmupLR`. Then, with
    x = min(1, (n - N + 1) / max(1, T - N)), b = `cos_min_ratio`:  q = max(0, b + (1 - b) (1 + cos(pi x)) / 2).
    Before the first step the rate is 0.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration, locals())
        self.total_num_steps = int(total_num_steps)
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.warmup_num_steps, self.warmup_type = max(2, int(warmup_num_steps)), warmup_type
        groups = self.optimizer.param_groups
        self.org_lrs = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]
        _warn_if_all_warmup(self.total_num_steps, self.warmup_num_steps)
        self._begin()

    def lrs_at(self, step: int) -> list[Any]:
        """The formula of the class's docstring."""
        ratio = self.ratio_at(step)
        return [lr * ratio for lr in self.org_lrs]

    def get_lr_ratio(self) -> float:
        """The ratio q of the class's docstring, now."""
        return self.ratio_at(self.last_batch_iteration)

    def ratio_at(self, step: int) -> float:
        """The ratio q of the class's docstring after `step`."""
        if step < 0:
            return 0.0
        if step < self.warmup_num_steps:
            risen = _warmup_fraction(step, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * risen
        progress = min(1.0, (step - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


SCHEDULES: dict[str, type[_Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES: list[str] = list(SCHEDULES)


def _warmup_fraction(step: int, num_steps: int, kind: str) -> float:
    return math.log(step + 1) / math.log(num_steps) if kind == "log" else step / num_steps


def _warn_if_all_warmup(total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        logger.warning("total_num_steps %d is less than warmup_num_steps %d", total_num_steps, warmup_num_steps)
