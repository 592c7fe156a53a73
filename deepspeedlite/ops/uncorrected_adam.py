"""Adam as torch does not have it: without bias correction. `ops.adam.FusedAdam` does the same by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from deepspeedlite.ops.foreach import dense_gradients, moment
from deepspeedlite.ops.hyperparameters import checked_defaults


class UncorrectedAdam(Optimizer):
    """Adam without bias correction: p <- p - lr m / (sqrt(v) + eps), for `"bias_correction": false`.

    Kingma and Ba 2014 (arXiv:1412.6980) with m and v used as they are; weight decay decoupled (arXiv:1711.05101) or,
    with `adam_w_mode=False`, added to the gradient. State per parameter: `step` (0-d fp32), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        defaults = checked_defaults("Adam", lr, betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {**defaults, "adam_w_mode": adam_w_mode})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads = dense_gradients(self, group)
            if not params:
                continue
            lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
            if decay and group["adam_w_mode"]:
                torch._foreach_mul_(params, 1.0 - lr * decay)
            elif decay:
                grads = list(torch._foreach_add(grads, params, alpha=decay))
            exp_avgs, exp_avg_sqs = moment(self, params, "exp_avg"), moment(self, params, "exp_avg_sq")
            torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr)
            for param in params:
                state = self.state[param]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                state["step"] += 1
        return loss
