"""Lion: the sign of an interpolated momentum, one state per element.

Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), algorithm 2. With gradient g,
momentum m (starts at 0), parameter p:

    p <- p * (1 - lr * weight_decay)
    p <- p - lr * sign(beta1 * m + (1 - beta1) * g)
    m <- beta2 * m + (1 - beta2) * g

Elementwise, so it works unchanged on flat runs. Every element moves by exactly lr, hence the paper's advice: a
learning rate 3 to 10 times below AdamW's and a weight decay larger by the same factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from deepspeedlite.ops.foreach import dense_gradients, moment
from deepspeedlite.ops.hyperparameters import check_hyperparameters


class Lion(Optimizer):
    """Lion over dense parameters of any shape; formulas in the module's docstring.

    `lr`, `betas` and `weight_decay` (decoupled) as in the paper. State per parameter: `exp_avg`, its shape and dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_hyperparameters("Lion", lr, betas, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

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
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            exp_avgs = moment(self, params, "exp_avg")
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
            directions = torch._foreach_lerp(exp_avgs, grads, 1.0 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta2)
        return loss
