"""Lion: the sign of an interpolated momentum, one state per element.

Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), algorithm 2. With gradient g,
momentum m (starts at 0), parameter p:

    p <- p * (1 - lr * weight_decay)
    p <- p - lr * sign(beta1 * m + (1 - beta1) * g)
    m <- beta2 * m + (1 - beta2) * g

Elementwise, so it works unchanged on flat runs. Every element moves by exactly lr, hence the paper's advice: a
learning rate 3 to 10 times below AdamW's and a weight decay larger by the same factor. The sign of NaN is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeedlite.ops import is_available, load
from deepspeedlite.ops.foreach import check_dense, moment
from deepspeedlite.ops.hyperparameters import checked_defaults
from deepspeedlite.ops.one_pass import FusedOptimizer, OnDevice, OnePassOptimizer, OnePassUpdate, put_back, zeros_like


def lion_in_torch(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    copies: list[Tensor],
    *rest: Any,
) -> None:
    """What the op `fused_lion` does, in torch: `rest` are an `OnDevice`'s fields, then numbers as in its schema."""
    on_device = OnDevice(*rest[:3])
    lr, beta1, beta2, weight_decay, grad_scale = rest[3:]
    lr = lr if on_device.lr is None else on_device.lr
    written = [*params, *exp_avgs, *copies]
    before = [] if on_device.found_inf is None else [tensor.clone() for tensor in written]
    scale = grad_scale if on_device.grad_factor is None else grad_scale * on_device.grad_factor
    scaled = [grad.to(param.dtype) for grad, param in zip(grads, params)]
    if not isinstance(scale, float) or scale != 1.0:
        scaled = list(torch._foreach_mul(scaled, scale))
    if weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    directions = torch._foreach_lerp(exp_avgs, scaled, 1.0 - beta1)
    steps = torch._foreach_mul([torch.where(one.isnan(), one, one.sign()) for one in directions], lr)
    torch._foreach_sub_(params, steps)
    torch._foreach_lerp_(exp_avgs, scaled, 1.0 - beta2)
    if copies:
        torch._foreach_copy_(copies, params)
    put_back(on_device.found_inf, written, before)


class FusedLion(FusedOptimizer):
    """Lion over dense parameters of any shape, under DeepSpeed's name and with its arguments and defaults.

    `lr`, `betas` and `weight_decay` (decoupled) are the paper's, whose defaults are 1e-4, (0.9, 0.99) and 0. State per
    parameter: `exp_avg`, its shape and dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, checked_defaults("Lion", lr, betas, weight_decay=weight_decay))
        self.set_grad_none = set_grad_none

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        for update in updates:
            check_dense(self, update.param, update.grad)
        for together in self._alike(updates):
            params = [update.param for update in together]
            exp_avgs = moment(self, params, "exp_avg")
            on_device = self._on_device(params[0].device, group["lr"])
            apply = self._op("fused_lion", together) or lion_in_torch
            apply(
                params,
                [update.grad for update in together],
                exp_avgs,
                [update.copy for update in together if update.copy is not None],
                *on_device,
                0.0 if on_device.lr is not None else float(group["lr"]),
                *group["betas"],
                group["weight_decay"],
                grad_scale,
            )


class DeepSpeedCPULion(OnePassOptimizer):
    """Lion for parameters on the CPU, under DeepSpeed's name and with its arguments.

    The state is `FusedLion`'s, so that state dicts go both ways. `fp32_optimizer_states=False` keeps it in the
    parameters' dtype.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        defaults = checked_defaults("Lion", lr, betas, weight_decay=weight_decay)
        super().__init__(model_params, {**defaults, "fp32_optimizer_states": fp32_optimizer_states})

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        for update in updates:
            self._check(update, ("cpu",))
            if not self.state[update.param]:
                dtype = torch.float32 if group["fp32_optimizer_states"] else update.param.dtype
                self.state[update.param]["exp_avg"] = zeros_like(update.param, dtype)
        numbers = (float(group["lr"]), *group["betas"], group["weight_decay"], grad_scale)
        for together in self._alike(updates):
            params, grads = [update.param for update in together], [update.grad for update in together]
            copies = [update.copy for update in together if update.copy is not None]
            exp_avgs = self._states(together, "exp_avg")
            if is_available("cpu_lion"):
                load("cpu_lion")(params, grads, exp_avgs, copies, *numbers)
            else:
                wide = [param.to(exp_avg.dtype) for param, exp_avg in zip(params, exp_avgs)]  # themselves, if alike
                lion_in_torch(wide, grads, exp_avgs, copies, None, None, None, *numbers)
                torch._foreach_copy_(params, wide)
