"""What the optimizers made of ops share: one update that reads gradient, states and parameter once and writes a copy.

`hand_over` is how the sharded step drives them: the parameters to step, with gradients of any dtype still multiplied by
the loss scale, and where the model's 16-bit values lie. Without it they are ordinary torch optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeedlite.ops import is_available, load
from deepspeedlite.ops.late_compiler import import_compiler_late
from deepspeedlite.runtime.errors import OptimizerError


class OnePassUpdate(NamedTuple):
    """A parameter, the gradient to step it with (of any of the three dtypes), and what else is to get its values."""

    param: Tensor
    grad: Tensor
    copy: Tensor | None


class OnePassOptimizer(torch.optim.Optimizer):
    """An optimizer whose `_update` does all that a step does to some parameters of one group."""

    _handed_over: tuple[Sequence[OnePassUpdate], float] | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        import_compiler_late()
        super().__init__(params, defaults)

    def _update_all(self, groups: list[tuple[dict[str, Any], list[OnePassUpdate]]], grad_scale: float) -> None:
        """One step: of each group the parameters that take part in it. Groups without any are left out."""
        for group, updates in groups:
            self._update(updates, group, grad_scale)

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
        of_groups = [
            (group, [by_param[param] for param in group["params"] if param in by_param]) for group in self.param_groups
        ]
        self._update_all([(group, updates) for group, updates in of_groups if updates], grad_scale)
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

    def _alike(self, updates: list[OnePassUpdate]) -> list[list[OnePassUpdate]]:
        """Those that one call of an op can take: on one device, all with a copy or all without."""
        alike: dict[tuple[torch.device, bool], list[OnePassUpdate]] = {}
        for update in updates:
            alike.setdefault((update.param.device, update.copy is None), []).append(update)
        return list(alike.values())

    def _states(self, updates: Sequence[OnePassUpdate], name: str) -> list[Tensor]:
        return [self.state[update.param][name] for update in updates]


class OnDevice(NamedTuple):
    """Numbers that only the device may know, as 0-d fp32 tensors there, or None."""

    lr: Tensor | None
    grad_factor: Tensor | None
    found_inf: Tensor | None


class FusedOptimizer(OnePassOptimizer):
    """A one-pass optimizer that never waits for the device, so that a CUDA graph can hold its step.

    `step` is counted on the device, `lr` may be a tensor there, and where a `torch.amp.GradScaler` steps it, the scale
    and the finding of infinities stay there too: the kernels read them.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to us: see `_on_device`
    set_grad_none = True

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients; `set_grad_none` says whether they are freed where this call does not."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def _on_device(self, device: torch.device, lr: float | Tensor) -> OnDevice:
        def there(number: Tensor | None) -> Tensor | None:
            return None if number is None else number.to(device, torch.float32, non_blocking=True).reshape(())

        scale, found_inf = (
            getattr(self, name, None) for name in ("grad_scale", "found_inf")
        )  # a GradScaler's, in `step`
        rate = lr if isinstance(lr, Tensor) and lr.device == device else None
        return OnDevice(there(rate), there(None if scale is None else scale.reciprocal()), there(found_inf))

    def _op(self, name: str, updates: list[OnePassUpdate]) -> Any:
        """The op, or None where it cannot be had for these: not here, fp64, or not contiguous (channels_last, say)."""
        takes_them = all(
            tensor.is_contiguous() and tensor.itemsize <= 4
            for update in updates
            for tensor in (*update, *self.state[update.param].values())
            if isinstance(tensor, Tensor)
        )
        device_type = updates[0].param.device.type
        return load(name, device_type) if takes_them and is_available(name, device_type) else None

    def _count(self, updates: list[OnePassUpdate], found_inf: Tensor | None) -> list[Tensor]:
        """The numbers of the steps that begin, 0-d tensors on the parameters' devices; a skipped one does not count."""
        for param, _, _ in updates:
            state, device = self.state[param], param.device
            count = state.get("step", 0.0)
            if not isinstance(count, Tensor) or count.device != device or count.dtype != torch.float32:
                state["step"] = torch.as_tensor(count, dtype=torch.float32).to(device)
        counts = self._states(updates, "step")
        torch._foreach_add_(counts, 1.0 if found_inf is None else 1.0 - found_inf)
        return counts


def put_back(found_inf: Tensor | None, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Undo what was done to `tensors` where infinities were found, without asking the device whether."""
    if found_inf is not None:
        for tensor, kept in zip(tensors, before):
            tensor.copy_(torch.where(found_inf != 0, kept, tensor))


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A running average's beginning: of the parameter's shape and contiguous, whatever the parameter is."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
