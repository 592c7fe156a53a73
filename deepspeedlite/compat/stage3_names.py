"""What clients of DeepSpeed look for at stage 3 on the optimizer; on parameters see `zero_params`.

TRL takes DeepSpeed's hooks off around a generation and puts them on again, by `optimizer.parameter_offload`. Here hooks
may stay: inside `GatheredParameters` they find every value there, and do nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

import torch

from deepspeedlite.compat.offload_states import StatesAway
from deepspeedlite.optim.step import ShardedOptimizer


class ParameterOffload:
    """What clients touch of DeepSpeed's object of that name: lists without hooks, a trace that is never stale."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = _WithExternal(module)
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []
        self.param_coordinator = _Coordinator()

    def _register_deepspeed_module(self, module: Any) -> None:
        """Nothing was taken off."""


class NamedOptimizer(ShardedOptimizer):
    """The engine's optimizer, with what clients look for on it."""

    @cached_property
    def parameter_offload(self) -> ParameterOffload:
        """At stage 3; elsewhere an AttributeError, as of DeepSpeed's optimizers."""
        if not self._reducer.plan.shard_params:
            raise AttributeError("parameter_offload is there at stage 3")
        return ParameterOffload(self._module)

    @cached_property
    def states_away(self) -> StatesAway:
        """What `offload_states` has taken off the device, here or on the engine."""
        return StatesAway(self._reducer.units, lambda: self.state)

    def offload_states(
        self,
        include: Container[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """As the engine's, which clients such as OpenRLHF ask the optimizer for."""
        self.states_away.offload(include, device, pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """As the engine's."""
        self.states_away.reload(non_blocking)


class _WithExternal:
    """A module, and the method that DeepSpeed gives every module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def ds_external_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None: registered ones are among the parameters of the module that owns them."""
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Coordinator:
    def is_invalid_trace(self) -> bool:
        return True

    def _invalidate_trace(self) -> None:
        pass
