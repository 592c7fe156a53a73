"""Which model states are divided among the ranks, and how gradients become the ranks' average.

The four ZeRO stages (Rajbhandari et al. 2020, arXiv:1910.02054) are three switches: whether the optimizer's states,
the gradients and the parameters are sharded. Everything else in this package asks the switches, never the number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.tensors import dtype_named


@dataclass(frozen=True)
class ShardingPlan:
    """Stages 0, 1, 2 and 3 are (off, off, off), (on, off, off), (on, on, off) and (on, on, on)."""

    shard_optimizer: bool = False
    shard_grads: bool = False
    shard_params: bool = False

    @classmethod
    def from_stage(cls, stage: int) -> ShardingPlan:
        """The plan of a ZeRO stage, 0 to 3."""
        if not 0 <= stage <= 3:
            raise ConfigError(f"zero_optimization.stage={stage}: the stages are 0, 1, 2 and 3")
        return cls(stage >= 1, stage >= 2, stage >= 3)

    @property
    def stage(self) -> int:
        """The ZeRO stage with these switches."""
        return int(self.shard_optimizer) + int(self.shard_grads) + int(self.shard_params)

    def shard_count(self, world_size: int) -> int:
        """Into how many pieces the optimizer's view of a flat buffer is cut."""
        return world_size if self.shard_optimizer else 1


@dataclass(frozen=True, kw_only=True)
class ReducePolicy:
    """How gradients become the ranks' average: times `pre`, summed over the wire in `wire_dtype`, times `post`.

    `pre * post` is 1/world, or 1 for the ranks' sum. fp32 divides before the sum, where the division costs nothing (it
    rides on the first copy); 16-bit gradients divide after it, because dividing first would push small fp16 values to
    zero. The user may decide: `prescale_gradients` divides first; without it `predivide_factor` by that much first and
    the rest after.
    """

    group: Group
    prescale_gradients: bool = False
    predivide_factor: float = 1.0
    average: bool = True
    wire_dtype: torch.dtype | None = None
    scatter: bool = True  # False: all-reduce also where a rank needs only its shard of the average

    @classmethod
    def from_config(cls, settings: DeepSpeedConfig, group: Group) -> ReducePolicy:
        """What the configuration says of the average over `group`."""
        return cls(
            group=group,
            prescale_gradients=settings.prescale_gradients,
            predivide_factor=settings.gradient_predivide_factor,
            average=settings.gradient_allreduce_op == "mean",
            wire_dtype=dtype_named(settings.communication_data_type),
            scatter=settings.zero_optimization.reduce_scatter,
        )

    def factors(self, grad_dtype: torch.dtype) -> tuple[float, float]:
        """`(pre, post)` for gradients of this dtype."""
        whole = 1.0 / self.group.size if self.average else 1.0
        if self.predivide_factor != 1.0 and not self.prescale_gradients:
            return 1.0 / self.predivide_factor, self.predivide_factor * whole
        if self.prescale_gradients or grad_dtype.itemsize >= 4:
            return whole, 1.0
        return 1.0, whole
