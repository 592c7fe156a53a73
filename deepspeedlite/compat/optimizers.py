"""DeepSpeed's optimizer classes, for `isinstance`: here one class does what they do.

isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)    whether it trains at stage 3
"""

from __future__ import annotations

from typing import Any

import torch

from deepspeedlite.optim.step import ShardedOptimizer
from deepspeedlite.runtime.errors import UnsupportedError


class _Kind(type):
    """A class whose instances are the engine's optimizers at some stages and with some dtype."""

    stages: range = range(4)
    dtype: torch.dtype | None = None

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, ShardedOptimizer):
            return False
        reducer = instance._reducer
        return reducer.plan.stage in cls.stages and (
            cls.dtype is None or any(unit.flat.dtype is cls.dtype for unit in reducer.units)
        )

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"{cls.__name__} is made by deepspeedlite.initialize, and not by itself")


class ZeROOptimizer(metaclass=_Kind):
    """The engine's optimizer where something is sharded."""

    stages = range(1, 4)


class DeepSpeedZeroOptimizer(metaclass=_Kind):
    """The engine's optimizer at stages 1 and 2."""

    stages = range(1, 3)


class DeepSpeedZeroOptimizer_Stage3(metaclass=_Kind):  # noqa: N801  DeepSpeed's name
    """The engine's optimizer at stage 3."""

    stages = range(3, 4)


class BF16_Optimizer(metaclass=_Kind):  # noqa: N801  DeepSpeed's name
    """The engine's optimizer of bf16 parameters at stage 0."""

    stages, dtype = range(1), torch.bfloat16


class FP16_Optimizer(metaclass=_Kind):  # noqa: N801  DeepSpeed's name
    """The engine's optimizer of fp16 parameters at stage 0."""

    stages, dtype = range(1), torch.float16


FP16_UnfusedOptimizer = FP16_Optimizer
