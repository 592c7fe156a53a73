"""LAMB: Adam whose step is rescaled for each parameter by the ratio of two norms.

You et al. 2019, "Large Batch Optimization for Deep Learning" (arXiv:1904.00962). For one parameter p with gradient g:

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    u = m / (sqrt(v) + eps) + weight_decay p          (eps_inside_sqrt: m / sqrt(v + eps) + weight_decay p)
    r = clamp(|p| / |u|, min_coeff, max_coeff),  or 1 where either norm is 0
    p <- p - lr c r u        with c = sqrt(1 - beta2^t) / (1 - beta1^t), or 1 without bias_correction

The bias correction c multiplies the whole step, after the ratio, as in DeepSpeed's FusedLamb, so that its tuned
settings carry over; the paper corrects m and v before the ratio. From some hundred steps on the two agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite.errors import OptimizerError, UnsupportedError
from deepspeedlite.optim.lion import check_hyperparameters, dense_gradients, moment


class _Split(NamedTuple):
    """A run cut into consecutive pieces that cover it, each with a norm of its own."""

    lengths: list[int]
    repeats: Tensor  # the same lengths, on the run's device


class Lamb(Optimizer):
    """LAMB over dense parameters, or over flat runs once `set_segments` has said where each parameter lies in them.

    The parameters are those of DeepSpeed's FusedLamb. `max_grad_norm` other than 0 and `amsgrad` are refused: clip with
    the configuration's `gradient_clipping`. State per parameter: `step` (0-d fp32), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise UnsupportedError("LAMB has no AMSGrad variant: leave amsgrad out")
        if max_grad_norm:
            raise UnsupportedError(
                f"max_grad_norm={max_grad_norm} is not a parameter of LAMB here: "
                f'set "gradient_clipping": {max_grad_norm} at the top level of the configuration'
            )
        check_hyperparameters("Lamb", lr, betas, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        if max_coeff < min_coeff:
            raise OptimizerError(f"Lamb: max_coeff ({max_coeff}) must be at least min_coeff ({min_coeff})")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        self._splits: dict[Tensor, _Split] = {}
        self._ratios: list[Tensor] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; segments are a layout, not state, and must be set again."""
        super().__setstate__(state)
        self._splits, self._ratios = {}, []

    def set_segments(self, segments: Mapping[Tensor, Iterable[tuple[int, int]]]) -> None:
        """Say which parts of each 1-D run are one parameter.

        `segments` maps a run to ranges [start, end) in elements, ascending and disjoint; what lies between them
        (padding) is treated as one more parameter, and zero padding stays zero. Runs left out are one parameter each.
        A run must hold whole parameters: norms are not summed over ranks. Raises `OptimizerError`.
        """
        known = {id(p) for group in self.param_groups for p in group["params"]}
        splits: dict[Tensor, _Split] = {}
        for run, ranges in segments.items():
            if id(run) not in known or run.dim() != 1:
                raise OptimizerError(
                    f"set_segments: a tensor of shape {tuple(run.shape)} is not a 1-D run of this optimizer"
                )
            lengths = _piece_lengths(run.numel(), ranges)
            splits[run] = _Split(lengths, torch.tensor(lengths, device=run.device))
        self._splits = splits

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, one per parameter (waits for the device)."""
        return [ratio for ratios in self._ratios for ratio in ratios.tolist()]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ratios = []
        for group in self.param_groups:
            params, grads = dense_gradients(self, group)
            if not params:
                continue
            updates = self._adam_updates(group, params, grads)
            by_device: dict[torch.device, list[int]] = {}
            for index, param in enumerate(params):
                by_device.setdefault(param.device, []).append(index)
            for indices in by_device.values():
                self._apply(group, [params[i] for i in indices], [updates[i] for i in indices])
        return loss

    def _adam_updates(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Advance the moments; returns u of the module's docstring, one new tensor per parameter."""
        beta1, beta2 = group["betas"]
        exp_avgs, exp_avg_sqs = moment(self, params, "exp_avg"), moment(self, params, "exp_avg_sq")
        torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)
        if group["eps_inside_sqrt"]:
            denominators = torch._foreach_add(exp_avg_sqs, group["eps"])
            torch._foreach_sqrt_(denominators)
        else:
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(exp_avgs, denominators))
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return updates

    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        """Scale each piece of each update by its trust ratio and subtract it; all tensors on one device."""
        lengths = [self._splits[p].lengths if p in self._splits else [p.numel()] for p in params]
        pieces = [piece for p, cut in zip(params, lengths) for piece in p.reshape(-1).split(cut)]
        update_pieces = [piece for u, cut in zip(updates, lengths) for piece in u.reshape(-1).split(cut)]
        weight_norms = torch.stack(torch._foreach_norm(pieces))
        update_norms = torch.stack(torch._foreach_norm(update_pieces))
        ratios = (weight_norms / update_norms).clamp(group["min_coeff"], group["max_coeff"])
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, torch.ones_like(ratios))
        self._ratios.append(ratios)
        for param, update, own in zip(params, updates, ratios.split([len(cut) for cut in lengths])):
            split = self._splits.get(param)
            scale = own[0] if split is None else own.repeat_interleave(split.repeats, output_size=param.numel())
            param.addcmul_(update, scale, value=-self._step_size(group, param))

    def _step_size(self, group: dict[str, Any], param: Tensor) -> float:
        """Count the step; returns lr c of the module's docstring."""
        state = self.state[param]
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        state["step"] += 1
        if not group["bias_correction"]:
            return float(group["lr"])
        steps, (beta1, beta2) = state["step"].item(), group["betas"]
        return float(group["lr"]) * math.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)


def _piece_lengths(run_numel: int, ranges: Iterable[tuple[int, int]]) -> list[int]:
    """Lengths of consecutive pieces that cover [0, run_numel): the ranges and the gaps between them, empty ones out."""
    cuts = [0]
    for start, end in ranges:
        if not cuts[-1] <= start <= end <= run_numel:
            raise OptimizerError(
                f"set_segments: [{start}, {end}) overlaps what precedes it (up to {cuts[-1]}), is out of order, or "
                f"lies outside the run's {run_numel} elements"
            )
        cuts += [start, end]
    cuts.append(run_numel)
    return [end - start for start, end in itertools.pairwise(cuts) if end > start] or [0]
