"""What a configuration says about the step."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.offload.options import Offload
from deepspeedlite.optim.precision import Precision


@dataclass
class StepSettings:
    """What the configuration says about the step."""

    gradient_clipping: float = 0.0
    check_overflow: bool = False
    sub_group_numel: int = 1_000_000_000
    share_numel: int = 500_000_000  # updated values under way to the other ranks at a time
    every_gradient_must_come: bool = False
    low_precision_masters: bool = False  # update 16-bit values in place
    offload: Offload = field(default_factory=Offload)

    @classmethod
    def from_config(cls, config: DeepSpeedConfig, precision: Precision, offload: Offload) -> StepSettings:
        """What a configuration asks for."""
        zero, bf16 = config.zero_optimization, config.bf16
        return cls(
            gradient_clipping=config.gradient_clipping,
            check_overflow=precision.check_overflow,
            sub_group_numel=zero.sub_group_size,
            share_numel=zero.allgather_bucket_size,
            every_gradient_must_come=not zero.ignore_unused_parameters,
            low_precision_masters=bf16.enabled and bf16.bf16_master_weights_and_grads,
            offload=offload,
        )
