"""Precision: which dtype the model computes in, and the loss scale that keeps fp16 gradients representable.

Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740): gradients are computed `scale` times too large; when
one overflows, the step is skipped and the scale halved; after `window` steps without overflow it is doubled.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from deepspeedlite.errors import LossScaleError, UnsupportedError
from deepspeedlite.zero.values import owner_of

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass
class LossScaler:
    """A static (`dynamic=False`) or dynamic loss scale, with DeepSpeed's parameters and rules.

    Args:
        scale: the current factor on the loss.
        dynamic: whether overflows change it.
        window: steps without overflow after which the scale doubles.
        min_scale: the scale is never taken below this; an overflow at it is fatal.
        hysteresis: overflows tolerated before the scale is halved.
        consecutive_hysteresis: whether every good step, rather than every doubling, restores the tolerance.
    """

    scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    min_scale: float = 1.0
    hysteresis: int = 2
    consecutive_hysteresis: bool = False

    def __post_init__(self) -> None:
        self._tolerance = self.hysteresis
        self._step = 0
        self._last_overflow = -1

    @property
    def at_minimum(self) -> bool:
        """Whether one more overflow cannot be answered by a smaller scale."""
        return self.dynamic and self.scale <= self.min_scale and self._tolerance <= 1

    def update(self, overflow: bool) -> None:
        """Account for one optimizer step.

        Raises:
            LossScaleError: the step overflowed although the scale is at its minimum.
        """
        if not self.dynamic:
            return
        if overflow:
            if self.at_minimum:
                raise LossScaleError(
                    f"the gradients overflowed at the smallest loss scale, fp16.min_loss_scale={self.min_scale:g}"
                )
            if self._tolerance <= 1:
                self.scale = max(self.scale / 2, self.min_scale)
            else:
                self._tolerance -= 1
            self._last_overflow = self._step
        else:
            doubles = (self._step - self._last_overflow) % self.window == 0
            if self.consecutive_hysteresis or doubles:
                self._tolerance = self.hysteresis
            if doubles:
                self.scale *= 2
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers."""
        return {
            "scale": self.scale,
            "tolerance": self._tolerance,
            "step": self._step,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.scale = float(state["scale"])
        self._tolerance = int(state["tolerance"])
        self._step = int(state["step"])
        self._last_overflow = int(state["last_overflow"])


@dataclass(frozen=True)
class Precision:
    """How one engine computes: the model's dtype, autocast, gradient dtype, and whether overflow is looked for."""

    model_dtype: torch.dtype | None = None  # None: leave the model as it is
    autocast_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None  # None: the parameter's own
    cast_inputs: bool = False
    check_overflow: bool = False

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients pass through fp16."""
        return torch.float16 in (self.model_dtype, self.autocast_dtype)

    def convert(self, module: torch.nn.Module) -> None:
        """Cast the module's floating-point parameters and buffers in place to the model's dtype.

        Raises:
            UnsupportedError: `zero.Init` has sharded a parameter in another dtype.
        """
        if self.model_dtype is not None:
            for name, param in module.named_parameters():
                owner = owner_of(param)
                if owner is not None and owner.sharded and owner.dtype != self.model_dtype:
                    raise UnsupportedError(
                        f"parameter {name} was sharded as {owner.dtype} by zero.Init, and the configuration trains in "
                        f"{self.model_dtype}; pass the same configuration (or dtype) to zero.Init"
                    )
            module.to(dtype=self.model_dtype)

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it, at any depth of lists, tuples and dicts, cast to `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)((key, cast_floating(item, dtype)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_floating(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(cast_floating(item, dtype) for item in value)
    return value
