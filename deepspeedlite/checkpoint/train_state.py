"""All of a training run that a checkpoint holds, and where it is in memory: what saving and loading are given.

An engine builds one for each call, of the parts it has then: users exchange schedules and loaders as they like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.optim.precision import LossScaler
from deepspeedlite.optim.step import ShardedOptimizer
from deepspeedlite.parallel.replica import Replica
from deepspeedlite.zero.flat_params import FlatParams
from deepspeedlite.zero.grad_reducer import GradReducer

EXTRA_STATE = "_extra_state"  # what torch calls a module's extra state in a state dict
COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
# Of param groups: how a step is computed on this machine, which is not the run's business.
MACHINE_OPTIONS = {"params", "fused", "foreach", "capturable", "differentiable"}


@dataclass(kw_only=True)
class LoadOptions:
    """What of a checkpoint is wanted."""

    strict: bool = True  # that what does not fit is an error
    optimizer_states: bool = True
    lr_scheduler_states: bool = True
    module_only: bool = False
    custom_load_fn: Callable[..., Any] | None = None  # loads the weights itself: (src=state dict, dst=module)


@dataclass(kw_only=True)
class TrainState:
    """A model in training on this rank. Saving reads it; loading writes into its parts, and into the last three."""

    module: torch.nn.Module
    reducer: GradReducer  # has the units of trained values, and gradients, which no checkpoint holds
    frozen: Sequence[FlatParams] = ()  # sharded values that are not trained
    optimizer: ShardedOptimizer | None = None
    lr_scheduler: Any = None  # with `state_dict` and `load_state_dict`, or it is left out; so is a loader
    dataloader: Any = None
    loss_scaler: LossScaler
    group: Group  # data parallel: the ranks that share the units
    replica: Replica  # model parallel: the ranks that hold one copy of the model together
    stage: int  # of ZeRO, which a checkpoint tells and no load asks for
    share_numel: int  # elements on the way at a time where loaded values are made equal on all ranks
    config: Mapping[str, Any]
    counters: dict[str, int] = field(default_factory=dict)  # by the names in COUNTERS
    client_state: dict[str, Any] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)  # what of model and checkpoint did not fit

    @property
    def owners(self) -> list[FlatParams]:
        """Whatever holds flat values, trained and frozen; what was thawed since is in a unit now."""
        return [*(unit.flat for unit in self.reducer.units), *(frozen for frozen in self.frozen if frozen.slots)]
