"""Precision: which dtype the model computes in, and the loss scale that keeps fp16 gradients representable.

Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740): gradients are computed `scale` times too large; when
one overflows, the step is skipped and the scale halved; after `window` steps without overflow the next doubles it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.config.sections.precision import name_pattern
from deepspeedlite.runtime.errors import LossScaleError, UnsupportedError
from deepspeedlite.runtime.tensors import dtype_named, map_tensors
from deepspeedlite.zero.flat_params import owner_of


@dataclass
class LossScaler:
    """A static (`dynamic=False`) or dynamic loss scale, with DeepSpeed's parameters and rules.

    Args:
        scale: the current factor on the loss.
        dynamic: whether overflows change it.
        window: good steps after which the next good one doubles the scale; the first of a run is `window + 1` long.
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

    @classmethod
    def from_config(cls, config: DeepSpeedConfig, precision: Precision) -> LossScaler:
        """What the fp16 section asks for; a constant 1 where gradients do not pass through fp16."""
        if not precision.needs_loss_scale:
            return cls()
        fp16 = config.fp16
        if fp16.loss_scale:
            return cls(scale=float(fp16.loss_scale))
        return cls(
            scale=2.0**fp16.initial_scale_power,
            dynamic=True,
            window=fp16.loss_scale_window,
            min_scale=fp16.min_loss_scale,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
        )

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
            stable = self._step - self._last_overflow - 1  # good steps before this one, since the last overflow
            doubles = stable > 0 and stable % self.window == 0
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
    buffer_dtype: torch.dtype | None = None  # None: buffers keep theirs
    fp32_buffers: Sequence[str] | None = None  # patterns of the names that stay fp32; None: what the model says
    cast_inputs: bool = False
    check_overflow: bool = False

    @classmethod
    def from_config(cls, config: DeepSpeedConfig) -> Precision:
        """What the fp16, bf16, torch_autocast and data_types sections ask for."""
        model_dtype = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
        autocast, types = config.torch_autocast, config.data_types
        autocast_dtype = dtype_named(autocast.dtype) if autocast.enabled else None
        return cls(
            model_dtype=model_dtype,
            autocast_dtype=autocast_dtype,
            grad_dtype=dtype_named(types.grad_accum_dtype),
            buffer_dtype=dtype_named(types.buffer_dtype),
            fp32_buffers=None if types.keep_in_fp32_modules == "auto" else types.keep_in_fp32_modules,
            cast_inputs=any(half.enabled and half.auto_cast for half in (config.fp16, config.bf16)),
            # A loss scale lives by overflows; elsewhere a user may have them pass.
            check_overflow=torch.float16 in (model_dtype, autocast_dtype)
            or (config.check_grad_overflow and (config.bf16.check_grad_overflow or not config.bf16.enabled)),
        )

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients pass through fp16."""
        return torch.float16 in (self.model_dtype, self.autocast_dtype)

    def convert(self, module: torch.nn.Module) -> None:
        """Cast the module's floating-point parameters in place to the model's dtype, and its buffers as configured.

        Buffers keep their types: positions and frequencies are wrong in 16 bits. Only a batch norm's statistics, which
        torch takes in the type of its weights alone, follow these.

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
            kept = [(part._buffers, dict(part._buffers)) for part in module.modules()]
            module.to(dtype=self.model_dtype)
            for buffers, as_they_were in kept:
                buffers.update(as_they_were)
        self._convert_buffers(module)

    def _convert_buffers(self, module: torch.nn.Module) -> None:
        stays = self._stay_fp32(module)
        for path, part in module.named_modules():
            for key, buffer in part._buffers.items():
                if buffer is None or not buffer.is_floating_point():
                    continue
                dtype = self.buffer_dtype or buffer.dtype
                if self.buffer_dtype is not None and any(p.search(f"{path}.{key}".lstrip(".")) for p in stays):
                    dtype = torch.float32
                if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.weight is not None:
                    dtype = part.weight.dtype
                if dtype != buffer.dtype:
                    part._buffers[key] = buffer.to(dtype)

    def _stay_fp32(self, module: torch.nn.Module) -> list[re.Pattern[str]]:
        """What to search buffers' full names for; transformers' models say it in two attributes."""
        patterns = self.fp32_buffers
        if patterns is None:
            patterns = list(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
            if self.buffer_dtype == torch.float16:
                patterns += list(getattr(module, "_keep_in_fp32_modules", None) or ())
        return [name_pattern(pattern) for pattern in patterns]

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it, at any depth of lists, tuples and dicts, cast to `dtype`."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def widen(loss: torch.Tensor) -> torch.Tensor:
    """The loss in a dtype that a loss scale does not push out of range."""
    return loss.float() if loss.dtype.itemsize < 4 else loss
