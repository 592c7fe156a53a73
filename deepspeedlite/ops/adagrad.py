"""Adagrad on the CPU in one pass over memory.

The op does to every element (Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods", JMLR 12)

    g = grad * grad_scale + weight_decay * p          sum = sum + g^2
    p = p - lr * g / (sqrt(sum) + eps)

and writes p into `copy` too, where one is given. Each tensor may be fp32, bf16 or fp16; the arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeedlite.ops import is_available, load
from deepspeedlite.ops.hyperparameters import checked_defaults
from deepspeedlite.ops.one_pass import OnePassOptimizer, OnePassUpdate, zeros_like
from deepspeedlite.runtime.errors import UnsupportedError


def adagrad_in_torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    copies: Sequence[Tensor],
    *numbers: float,
) -> None:
    """What the op `cpu_adagrad` does, in plain torch; `numbers` are its, from `lr` on."""
    lr, eps, weight_decay, grad_scale = numbers
    for index, param in enumerate(params):
        wide = torch.promote_types(param.dtype, torch.float32)
        p, g, total = (each[index].to(wide) for each in (params, grads, sums))
        g = g * grad_scale + weight_decay * p if weight_decay else g * grad_scale
        total = total + g * g
        sums[index].copy_(total)
        param.copy_(p - lr * g / (total.sqrt() + eps))
        if copies:
            copies[index].copy_(param)


class DeepSpeedCPUAdagrad(OnePassOptimizer):
    """Adagrad for parameters on the CPU, under DeepSpeed's name and with its arguments.

    The state is torch's, name for name (`step`, `sum`), so that state dicts of torch.optim.Adagrad load here and the
    other way round. `fp32_optimizer_states=False` keeps the sum in the parameters' dtype. Of a sparse gradient (an
    embedding's) only the elements that it has are stepped, weight decay included.

    Raises:
        UnsupportedError: `amsgrad`, which Adagrad has not.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if amsgrad:
            raise UnsupportedError("Adagrad has no amsgrad: it never forgets a gradient; leave it out")
        defaults = checked_defaults("Adagrad", lr, eps=eps, weight_decay=weight_decay)
        defaults["lr_decay"] = 0.0  # torch's groups have it
        super().__init__(model_params, {**defaults, "fp32_optimizer_states": fp32_optimizer_states})

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        if group["lr_decay"]:
            raise UnsupportedError(
                f"DeepSpeedCPUAdagrad has no lr_decay, and the state that was loaded has {group['lr_decay']}: use "
                "torch.optim.Adagrad, or a learning rate schedule"
            )
        for update in updates:
            self._check(update._replace(grad=update.param) if update.grad.is_sparse else update, ("cpu",))
            state = self.state[update.param]
            if not state:
                dtype = torch.float32 if group["fp32_optimizer_states"] else update.param.dtype
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["sum"] = zeros_like(update.param, dtype)
            state["step"] += 1
        for update in updates:
            if update.grad.is_sparse:
                self._apply_sparse(update, group, grad_scale)
        for together in self._alike([update for update in updates if not update.grad.is_sparse]):
            self._apply(together, self._states(together, "sum"), group, grad_scale)

    def _apply_sparse(self, update: OnePassUpdate, group: dict[str, Any], grad_scale: float) -> None:
        grad = update.grad.coalesce()
        where = tuple(grad.indices())  # of an embedding: rows
        total = self.state[update.param]["sum"]
        param, sums = update.param[where], total[where]
        copy = None if update.copy is None else update.copy[where]
        self._apply([OnePassUpdate(param, grad.values(), copy)], [sums], group, grad_scale)
        update.param[where], total[where] = param, sums
        if update.copy is not None and copy is not None:
            update.copy[where] = copy

    def _apply(
        self, updates: list[OnePassUpdate], sums: list[Tensor], group: dict[str, Any], grad_scale: float
    ) -> None:
        apply = load("cpu_adagrad") if is_available("cpu_adagrad") else adagrad_in_torch
        apply(
            [update.param for update in updates],
            [update.grad for update in updates],
            sums,
            [update.copy for update in updates if update.copy is not None],
            float(group["lr"]),
            group["eps"],
            group["weight_decay"],
            grad_scale,
        )
