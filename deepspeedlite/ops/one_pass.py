"""What the optimizers made of ops share: one update that reads gradient, states and parameter once and writes a copy.

`hand_over` is how the sharded step drives them: the parameters to step, with gradients of any dtype still multiplied by
the loss scale, and where the model's 16-bit values lie. Without it they are ordinary torch optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeedlite.errors import OptimizerError


class OnePassUpdate(NamedTuple):
    """A parameter, the gradient to step it with (of any of the three dtypes), and what else is to get its values."""

    param: Tensor
    grad: Tensor
    copy: Tensor | None


class OnePassOptimizer(torch.optim.Optimizer):
    """An optimizer whose `_update` does all that a step does to some parameters of one group."""

    _handed_over: tuple[Sequence[OnePassUpdate], float] | None = None

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        """Step these parameters, all of `group`, with their gradients times `grad_scale`."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or from `load_state_dict`: torch's groups lack some of our keys
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss where one is given.

        Raises:
            OptimizerError: a gradient is sparse, or a tensor is where the op does not run or has no dtype of its three.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        handed_over, self._handed_over = self._handed_over, None
        updates, grad_scale = handed_over or (self._own_updates(), 1.0)
        by_param = {update.param: update for update in updates}
        for group in self.param_groups:
            of_group = [by_param[param] for param in group["params"] if param in by_param]
            if of_group:
                self._update(of_group, group, grad_scale)
        return loss

    def hand_over(self, updates: Sequence[OnePassUpdate], grad_scale: float = 1.0) -> None:
        """Let the next `step` update these parameters alone, with gradients given here, each times `grad_scale`."""
        self._handed_over = updates, grad_scale

    @property
    def has_step_hooks(self) -> bool:
        """Whether anyone is called around `step`, and may want to see `param.grad` there."""
        return bool(self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks)

    def _own_updates(self) -> list[OnePassUpdate]:
        params = [param for group in self.param_groups for param in group["params"]]
        return [OnePassUpdate(param, param.grad, None) for param in params if param.grad is not None]

    def _check(self, update: OnePassUpdate, devices: tuple[str, ...]) -> None:
        """Raise `OptimizerError` for what no op takes, or not on these devices."""
        param, grad = update.param, update.grad
        if grad.is_sparse or param.device.type not in devices or not param.is_floating_point() or param.itemsize > 4:
            where = {"cpu": "the CPU", "cuda": "a GPU"}
            raise OptimizerError(
                f"{type(self).__name__} takes fp32, bf16 and fp16 tensors on {' or '.join(where[d] for d in devices)} "
                f"with dense gradients; got a parameter of shape {tuple(param.shape)}, {param.dtype}, on "
                f"{param.device}{' with a sparse gradient' if grad.is_sparse else ''}"
            )

    def _states(self, updates: Sequence[OnePassUpdate], name: str) -> list[Tensor]:
        return [self.state[update.param][name] for update in updates]


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A running average's beginning: of the parameter's shape and contiguous, whatever the parameter is."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
