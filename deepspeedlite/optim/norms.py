"""The norm of a step's gradients: whether they are finite, how far they are clipped, and what users are told of it."""

from __future__ import annotations

import math

from deepspeedlite.optim.precision import LossScaler
from deepspeedlite.zero.grad_reducer import GradReducer

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class StepNorm:
    """Measures what a reducer holds, and remembers the last step's norm.

    Args:
        reducer: whose averages are measured.
        scaler: whose loss scale they carry.
        clipping: the largest norm that is left as it is; 0: any.
        check_overflow: whether a step is skipped for gradients that are not finite.
    """

    def __init__(self, reducer: GradReducer, scaler: LossScaler, clipping: float, check_overflow: bool) -> None:
        self._reducer, self._scaler = reducer, scaler
        self._clipping, self._check_overflow = clipping, check_overflow
        self._norm: float | None = None  # of the last step; None where nobody has asked for it yet
        self.has_stepped = False  # from then on the last step's gradients may be measured, until a pass overwrites them

    @property
    def is_needed(self) -> bool:
        """Whether a step asks for it."""
        return self._clipping > 0 or self._check_overflow

    def begin_step(self) -> list[str]:
        """Measure this step's gradients if need be; names of the parameters for which the step is to be skipped."""
        self._norm, self.has_stepped = None, True
        if not self.is_needed or math.isfinite(self._measure()):
            return []
        guilty = self._reducer.overflowed()
        if not guilty:  # the squares alone overflowed
            self._measure(precise=True)
        return guilty if self._check_overflow else []

    def clip_factor(self) -> float:
        """What this step's gradients are multiplied by to be within the limit."""
        if self._norm is None or self._clipping <= 0:
            return 1.0
        return min(1.0, self._clipping / (self._norm + CLIP_EPSILON))

    def last(self) -> float | None:
        """The last step's norm, before clipping. See `ShardedOptimizer.grad_norm`."""
        if self._norm is None and self.has_stepped and not self._reducer.has_grads:
            return self._measure(alone=True)
        return self._norm

    def _measure(self, alone: bool = False, precise: bool = False) -> float:
        self._norm = float(self._reducer.grad_norm(alone, precise)) / self._scaler.scale
        return self._norm
