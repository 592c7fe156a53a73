"""Which model states are divided among the ranks.

The four ZeRO stages (Rajbhandari et al. 2020, arXiv:1910.02054) are three switches: whether the optimizer's states,
the gradients and the parameters are sharded. Everything else in this package asks the switches, never the number.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeedlite.runtime.errors import ConfigError


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
