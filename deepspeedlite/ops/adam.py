"""Adam and AdamW in one pass over memory: on the CPU and, as `FusedAdam`, on GPUs too.

The ops do to every element (Kingma and Ba 2014, arXiv:1412.6980; decoupled weight decay: arXiv:1711.05101)

    g = grad * grad_scale  (+ weight_decay * p, unless decoupled)
    m = m + (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g^2
    p = p * (1 - lr * weight_decay, if decoupled) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and writes p into `copy` too, where one is given. Each tensor may be fp32, bf16 or fp16; the arithmetic is fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeedlite.ops import is_available, load
from deepspeedlite.ops.hyperparameters import checked_defaults
from deepspeedlite.ops.one_pass import (
    FusedOptimizer,
    OnDevice,
    OnePassOptimizer,
    OnePassUpdate,
    put_back,
    zeros_like,
)
from deepspeedlite.runtime.errors import OptimizerError


class Adam(NamedTuple):
    """The numbers of a step, as in the formulas above."""

    step: float | Tensor
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float | Tensor = 1.0
    decoupled: bool = True
    bias_correction: bool = True


class Lists(NamedTuple):
    """The tensors of a step, alike in order; the last two lists may be empty."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    copies: Sequence[Tensor]


def adam_in_torch(*given: Any) -> None:
    """What the op does, in plain torch: it is given a `Lists`'s fields and an `Adam`'s."""
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies = given[:6]
    how = Adam(*given[6:])
    wide = torch.float64 if params and params[0].dtype == torch.float64 else torch.float32
    correction1 = 1 - how.beta1**how.step if how.bias_correction else 1.0
    correction2 = (1 - how.beta2**how.step) ** 0.5 if how.bias_correction else 1.0
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


def fused_adam_in_torch(*given: Any) -> None:
    """What the op `fused_adam` does: its arguments are a `Lists`, steps, an `OnDevice` and an `Adam` from `lr` on."""
    lists, steps, on_device = Lists(*given[:6]), given[6], OnDevice(*given[7:10])
    lr, *numbers = given[10:]
    written = [tensor for of in lists if of is not lists.grads for tensor in of]
    before = [] if on_device.found_inf is None else [tensor.clone() for tensor in written]
    factor = 1.0 if on_device.grad_factor is None else on_device.grad_factor
    how = Adam(0.0, lr if on_device.lr is None else on_device.lr, *numbers)
    how = how._replace(grad_scale=how.grad_scale * factor)
    for index, step in enumerate(steps):
        adam_in_torch(*([of[index]] if of else [] for of in lists), *how._replace(step=step))
    put_back(on_device.found_inf, written, before)


def _lists(of: OnePassOptimizer, updates: Sequence[OnePassUpdate], amsgrad: bool) -> Lists:
    return Lists(
        [update.param for update in updates],
        [update.grad for update in updates],
        of._states(updates, "exp_avg"),
        of._states(updates, "exp_avg_sq"),
        of._states(updates, "max_exp_avg_sq") if amsgrad else [],
        [update.copy for update in updates if update.copy is not None],
    )


class DeepSpeedCPUAdam(OnePassOptimizer):
    """Adam for parameters on the CPU, under DeepSpeed's name and with its arguments.

    The state is torch's, name for name (`step`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`), so state dicts of
    torch.optim.Adam and AdamW load here and the other way round. `fp32_optimizer_states=False` keeps the moments in
    the parameters' dtype. `adamw_mode=False` adds the weight decay to the gradient.
    """

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
        defaults = checked_defaults("Adam", lr, betas, eps=eps, weight_decay=weight_decay)
        defaults |= {"bias_correction": bias_correction, "amsgrad": amsgrad, "adamw_mode": adamw_mode}
        super().__init__(model_params, {**defaults, "fp32_optimizer_states": fp32_optimizer_states})

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        alike: dict[tuple[float, bool], list[OnePassUpdate]] = defaultdict(list)
        for update in updates:
            alike[self._count(update, group), update.copy is None].append(update)
        for (step, _), together in alike.items():
            self._apply(together, group, step, grad_scale)

    def _count(self, update: OnePassUpdate, group: dict[str, Any]) -> float:
        """The number of the parameter's step that begins, with its state made where it has none."""
        self._check(update, ("cpu",))
        state = self.state[update.param]
        if not state:
            dtype = torch.float32 if group["fp32_optimizer_states"] else update.param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                state[name] = zeros_like(update.param, dtype)
        state["step"] += 1
        return float(state["step"])

    def _apply(self, updates: list[OnePassUpdate], group: dict[str, Any], step: float, grad_scale: float) -> None:
        beta1, beta2 = group["betas"]
        how = Adam(step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], grad_scale)
        how = how._replace(decoupled=group["adamw_mode"], bias_correction=group["bias_correction"])
        apply = load("cpu_adam") if is_available("cpu_adam") else adam_in_torch
        apply(*_lists(self, updates, group["amsgrad"]), *how)

    # --- one parameter after another, of which each is there for a while ------------------------------------------

    def step_subgroup(self, subgroup_id: int, closure: Callable[[], float] | None = None) -> float | None:
        """`step` with the state that `state[subgroup_id]` keeps, whichever tensor the parameter is at the moment.

        Raises:
            OptimizerError: more than one parameter has a gradient, which would share that state; see `step` too.
        """
        param = self._only_param(subgroup_id)
        if param is None:
            return self.step(closure)
        own = self.state.pop(param, None)
        self.state[param] = self.state.pop(subgroup_id, {})  # type: ignore[call-overload]
        try:
            return self.step(closure)
        finally:
            self.state[subgroup_id] = self.state.pop(param)  # type: ignore[index]
            if own is not None:
                self.state[param] = own

    @torch.no_grad()
    def rollback_subgroup(self, sub_group_id: int, closure: Callable[[], float] | None = None) -> float | None:
        """Undo the last `step_subgroup` of that number, the parameter's gradient being what it was then.

        Exact but for rounding: the formulas above, solved for what was there before.

        Raises:
            OptimizerError: it has made no step, keeps the largest second moments (amsgrad), which do not tell the ones
                before, or more than one parameter has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        param, state = self._only_param(sub_group_id), self.state.get(sub_group_id, {})  # type: ignore[call-overload]
        if not state or float(state["step"]) <= 0 or "max_exp_avg_sq" in state:
            why = "keeps the largest second moments (amsgrad)" if "max_exp_avg_sq" in state else "has made no step"
            raise OptimizerError(f"DeepSpeedCPUAdam cannot undo a step of subgroup {sub_group_id}: it {why}")
        if param is None or param.grad is None:
            return loss
        group = next(group for group in self.param_groups if any(each is param for each in group["params"]))
        (beta1, beta2), step, decay = group["betas"], float(state["step"]), group["weight_decay"]
        correction1 = 1 - beta1**step if group["bias_correction"] else 1.0
        correction2 = (1 - beta2**step) ** 0.5 if group["bias_correction"] else 1.0
        p, g, m, v = (each.double() for each in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        p = p + group["lr"] / correction1 * m / (v.sqrt() / correction2 + group["eps"])
        if group["adamw_mode"]:
            p = p / (1 - group["lr"] * decay)
        else:
            g = g + decay * p
        param.copy_(p)
        state["exp_avg"].copy_((m - (1 - beta1) * g) / beta1)
        state["exp_avg_sq"].copy_(((v - (1 - beta2) * g * g) / beta2).clamp_(min=0))
        state["step"] -= 1
        return loss

    def _only_param(self, subgroup_id: int) -> Tensor | None:
        with_grads = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if len(with_grads) > 1:
            raise OptimizerError(
                f"DeepSpeedCPUAdam: subgroup {subgroup_id} is the state of one parameter, and {len(with_grads)} have "
                "gradients"
            )
        return with_grads[0] if with_grads else None


class FusedAdam(FusedOptimizer):
    """Adam for parameters on GPUs (and the CPU), under DeepSpeed's name and with its arguments, AMSGrad besides.

    The state is torch's, name for name, so state dicts of torch.optim.Adam and AdamW load here and the other way round;
    the moments have the parameters' dtype. `adam_w_mode=False` adds the weight decay to the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        defaults = checked_defaults("FusedAdam", lr, betas, eps=eps, weight_decay=weight_decay)
        defaults |= {"bias_correction": bias_correction, "amsgrad": amsgrad, "adam_w_mode": adam_w_mode}
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none

    def _update(self, updates: list[OnePassUpdate], group: dict[str, Any], grad_scale: float) -> None:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        for update in updates:
            self._check(update, ("cpu", "cuda"))
            for name in names:
                if name not in self.state[update.param]:
                    self.state[update.param][name] = zeros_like(update.param, update.param.dtype)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for together in self._alike(updates):
            device = together[0].param.device
            on_device = self._on_device(device, lr)
            steps = self._count(together, on_device.found_inf)
            known_lr = 0.0 if on_device.lr is not None else float(lr)
            apply = self._op("fused_adam", together) or fused_adam_in_torch
            apply(
                *_lists(self, together, group["amsgrad"]),
                steps,
                *on_device,
                known_lr,
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                grad_scale,
                group["adam_w_mode"],
                group["bias_correction"],
            )
