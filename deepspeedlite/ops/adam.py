"""Adam and AdamW on the CPU, in one pass over memory.

The op does to every element (Kingma and Ba 2014, arXiv:1412.6980; decoupled weight decay: arXiv:1711.05101)

    g = grad * grad_scale  (+ weight_decay * p, unless decoupled)
    m = m + (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g^2
    p = p * (1 - lr * weight_decay, if decoupled) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and writes p into `copy` too, where one is given. Each tensor may be fp32, bf16 or fp16; the arithmetic is fp32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeedlite.errors import OptimizerError
from deepspeedlite.ops import is_available, load
from deepspeedlite.ops.hyperparameters import check_hyperparameters


class Adam(NamedTuple):
    """The numbers of a step, as in the formulas above."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float = 1.0
    decoupled: bool = True
    bias_correction: bool = True


class OnePassUpdate(NamedTuple):
    """A parameter, the gradient to step it with (of any of the three dtypes), and what else is to get its values."""

    param: Tensor
    grad: Tensor
    copy: Tensor | None


def adam_in_torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    *numbers: Any,
) -> None:
    """What the op does, in plain torch: `numbers` are an `Adam`'s."""
    how = Adam(*numbers)
    wide = torch.float64 if params and params[0].dtype == torch.float64 else torch.float32
    correction1 = 1 - how.beta1**how.step if how.bias_correction else 1.0
    correction2 = math.sqrt(1 - how.beta2**how.step) if how.bias_correction else 1.0
    for index, param in enumerate(params):
        p, g, m, v = (each[index].to(wide) for each in (params, grads, exp_avgs, exp_avg_sqs))
        g = g * how.grad_scale if how.decoupled else g * how.grad_scale + how.weight_decay * p
        m = m + (1 - how.beta1) * (g - m)
        v = how.beta2 * v + (1 - how.beta2) * g * g
        exp_avgs[index].copy_(m)
        exp_avg_sqs[index].copy_(v)
        if max_exp_avg_sqs:
            v = torch.maximum(max_exp_avg_sqs[index].to(wide), v)
            max_exp_avg_sqs[index].copy_(v)
        decay = 1 - how.lr * how.weight_decay if how.decoupled else 1.0
        p = p * decay - how.lr / correction1 * m / (v.sqrt() / correction2 + how.eps)
        param.copy_(p)
        if copies:
            copies[index].copy_(p)


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    """Adam for parameters on the CPU, under DeepSpeed's name and with its arguments.

    The state is torch's, name for name (`step`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`), so state dicts of
    torch.optim.Adam and AdamW load here and the other way round. `fp32_optimizer_states=False` keeps the moments in
    the parameters' dtype. `adamw_mode=False` adds the weight decay to the gradient.
    """

    _handed_over: tuple[Sequence[OnePassUpdate], float] | None = None

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        check_hyperparameters("Adam", lr, betas, eps=eps, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"bias_correction": bias_correction, "amsgrad": amsgrad, "adamw_mode": adamw_mode}
        super().__init__(model_params, {**defaults, "fp32_optimizer_states": fp32_optimizer_states})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or from `load_state_dict`: torch's groups lack some of our keys
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss where one is given.

        Raises:
            OptimizerError: a gradient is sparse, or a tensor is not on the CPU or has no dtype of the three.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        handed_over, self._handed_over = self._handed_over, None
        updates, grad_scale = handed_over or (self._own_updates(), 1.0)
        self._step(updates, grad_scale)
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

    def _step(self, updates: Sequence[OnePassUpdate], grad_scale: float) -> None:
        by_param = {update.param: update for update in updates}
        for group in self.param_groups:
            alike: dict[tuple[float, bool], list[OnePassUpdate]] = defaultdict(list)
            for update in (by_param[param] for param in group["params"] if param in by_param):
                alike[self._count(update, group), update.copy is None].append(update)
            for (step, _), together in alike.items():
                self._update(together, group, step, grad_scale)

    def _count(self, update: OnePassUpdate, group: dict[str, Any]) -> float:
        """The number of the parameter's step that begins, with its state made where it has none."""
        param, grad = update.param, update.grad
        if grad.is_sparse or param.device.type != "cpu" or not param.is_floating_point() or param.itemsize > 4:
            raise OptimizerError(
                "DeepSpeedCPUAdam takes fp32, bf16 and fp16 tensors on the CPU with dense gradients; got a parameter "
                f"of shape {tuple(param.shape)}, {param.dtype}, on {param.device}"
                f"{' with a sparse gradient' if grad.is_sparse else ''}"
            )
        state = self.state[param]
        if not state:
            dtype = torch.float32 if group["fp32_optimizer_states"] else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        state["step"] += 1
        return float(state["step"])

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], step: float, grad_scale: float) -> None:
        def states(name: str) -> list[Tensor]:
            return [self.state[update.param][name] for update in updates]

        beta1, beta2 = group["betas"]
        how = Adam(step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], grad_scale)
        how = how._replace(decoupled=group["adamw_mode"], bias_correction=group["bias_correction"])
        apply = load("cpu_adam") if is_available("cpu_adam") else adam_in_torch
        apply(
            [update.param for update in updates],
            [update.grad for update in updates],
            states("exp_avg"),
            states("exp_avg_sq"),
            states("max_exp_avg_sq") if group["amsgrad"] else [],
            [update.copy for update in updates if update.copy is not None],
            *how,
        )
