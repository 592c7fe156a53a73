"""LAMB: Adam whose step is rescaled for each parameter by the ratio of two norms.

You et al. 2019, "Large Batch Optimization for Deep Learning" (arXiv:1904.00962). For one parameter p with gradient g:

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    u = m / (sqrt(v) + eps) + weight_decay p          (eps_inside_sqrt: m / sqrt(v + eps) + weight_decay p)
    r = clamp(|p| / |u|, min_coeff, max_coeff),  or 1 where either norm is 0
    p <- p - lr c r u        with c = sqrt(1 - beta2^t) / (1 - beta1^t), or 1 without bias_correction

The bias correction c multiplies the whole step, after the ratio, as in DeepSpeed's FusedLamb, so that its tuned
settings carry over; the paper corrects m and v before the ratio. From some hundred steps on the two agree.

A parameter's elements may be spread over the ranks, and over several runs of one rank (ZeRO). Then |p|^2 and |u|^2 are
sums over all its pieces, so a step has two phases with one reduction between them: moments and u of every run, the
squared norms of all parameters summed in one call, and the scaled subtraction. The ops of `fused_lamb` do each phase in
one pass over memory. Where they are not, torch does it, and one vector u per run is held between the phases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deepspeedlite.ops import load
from deepspeedlite.ops.foreach import check_dense, moment
from deepspeedlite.ops.hyperparameters import checked_defaults
from deepspeedlite.ops.one_pass import FusedOptimizer, OnePassUpdate
from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError

SumOverRanks = Callable[[Tensor], None]

_T = TypeVar("_T")


class _Cut(NamedTuple):
    """A run cut into consecutive pieces that cover it; none of them is empty."""

    lengths: list[int]
    owned: list[bool]  # per piece: a parameter's, or a gap
    indices: Tensor  # int64, on the run's device: the parameter's number, per owned piece


@dataclass
class _Work:
    """What a step does to the parameters of one group on one device: phase one is done, phase two is `finish`."""

    group: dict[str, Any]
    norms: (
        Tensor  # (2, pieces): |p| and |u| of each piece that has a ratio; of its whole parameter, once they are summed
    )
    indices: Tensor  # the parameter's number per piece; empty without `set_segments`
    finish: Callable[[Tensor], None]  # given the norms that count


class _Segments:
    """Where each parameter lies in the runs, and the norms of whole parameters."""

    def __init__(self, cuts: dict[Tensor, _Cut], parameter_count: int, sum_over_ranks: SumOverRanks | None) -> None:
        self.cuts = cuts
        self._sum_over_ranks = sum_over_ranks
        device = next((run.device for run in cuts), torch.device("cpu"))
        # The latest norms of each parameter.
        self.norms = torch.zeros(2, parameter_count, dtype=torch.float32, device=device)

    def complete(self, works: list[_Work]) -> None:
        """Replace the norms of pieces by those of the parameters that they belong to."""
        dtypes = [] if self._sum_over_ranks else [work.norms.dtype for work in works]
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        sums = torch.zeros(self.norms.shape, dtype=dtype, device=self.norms.device)
        for work in works:
            sums.index_add_(1, work.indices.to(sums.device), work.norms.square().to(sums))
        if self._sum_over_ranks is not None:
            self._sum_over_ranks(sums.view(-1))
        norms = sums.sqrt_()
        for work in works:
            work.norms = norms.to(work.indices.device).index_select(1, work.indices)
        self.norms = torch.where(norms.any(dim=0), norms, self.norms.to(dtype))

    def ratios(self, groups: list[dict[str, Any]]) -> list[float]:
        """The latest ratio of each parameter."""
        found = _trust_ratios(self.norms, groups[0])  # a parameter without elements here belongs to an unknown group
        for group in groups:
            for run in group["params"]:
                if run in self.cuts:
                    indices = self.cuts[run].indices.to(found.device)
                    found[indices] = _trust_ratios(self.norms[:, indices], group)
        return found.tolist()


class FusedLamb(FusedOptimizer):
    """LAMB over dense parameters, or over flat runs once `set_segments` has said where each parameter lies in them.

    The parameters are those of DeepSpeed's FusedLamb. `max_grad_norm` other than 0 and `amsgrad` are refused: clip with
    the configuration's `gradient_clipping`. State per parameter: `step` (0-d fp32), `exp_avg`, `exp_avg_sq`.
    """

    _step_supports_amp_scaling = False
    segments_told_as = "numbers"  # by the plug-in of this name, which calls `set_segments`

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
        defaults = checked_defaults("Lamb", lr, betas, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        if max_coeff < min_coeff:
            raise OptimizerError(f"Lamb: max_coeff ({max_coeff}) must be at least min_coeff ({min_coeff})")
        defaults |= {"bias_correction": bias_correction, "eps_inside_sqrt": eps_inside_sqrt, "max_coeff": max_coeff}
        self._segments: _Segments | None = None
        self._ratios: list[Tensor] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; segments are a layout, not state, and must be set again."""
        super().__setstate__(state)
        self._segments, self._ratios = None, []

    def set_segments(
        self,
        segments: Mapping[Tensor, Sequence[tuple[int, int, int]]],
        parameter_count: int | None = None,
        sum_over_ranks: SumOverRanks | None = None,
        numels: Mapping[Tensor, int] | None = None,
    ) -> None:
        """Say which elements of each 1-D run belong to which parameter.

        Args:
            segments: for every run of this optimizer its segments (start, stop, parameter_index), ascending and
                disjoint: elements [start, stop) of the run belong to parameter number `parameter_index`. A parameter
                may have segments in several runs and on several ranks. What no segment covers (padding, zeros) takes
                ratio 1. The segments of one parameter must lie in one group, or in groups with equal hyperparameters.
            parameter_count: how many parameters there are, on all ranks together; the numbering is the same on every
                rank. One more than the largest index where it is left out, which needs `sum_over_ranks` None.
            sum_over_ranks: sums an fp32 tensor of shape (2 * parameter_count,) over the ranks, in place and in the
                order of the current stream. It lies on the device of the first run here, on a rank without runs on
                the CPU. None: this process holds every element.
            numels: the elements of runs that are not in memory now, and so seem to have none.

        `sum_over_ranks` is called exactly once in each `step()`, also where there is no run or no gradient, so every
        rank must call `step()` equally often. When runs are stepped in sub-groups (`.grad` set for a part of the runs,
        then `step()`, and so on), what lacks a gradient enters no norm: all segments of a parameter, on all ranks, must
        then belong to the same call of `step()`.

        Raises:
            OptimizerError: a run is unknown, left out or not 1-D; segments overlap, are out of order or outside their
                run; an index is not in [0, parameter_count); `sum_over_ranks` without `parameter_count`.
        """
        if parameter_count is None:
            if sum_over_ranks is not None:
                raise OptimizerError("set_segments: sum_over_ranks needs a parameter_count, the same on every rank")
            parameter_count = max((index + 1 for found in segments.values() for _, _, index in found), default=0)
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for run in segments:
            if id(run) not in known or run.dim() != 1:
                raise OptimizerError(
                    f"set_segments: a tensor of shape {tuple(run.shape)} is not a 1-D run of this optimizer"
                )
        if len(segments) < len(known):
            raise OptimizerError(
                f"set_segments: {len(segments)} of this optimizer's {len(known)} runs were given; give each of them, "
                "with an empty list where it holds no parameter"
            )
        numels = {run: run.numel() for run in segments} | dict(numels or {})
        cuts = {run: _cut(run, numels[run], found, parameter_count) for run, found in segments.items()}
        self._segments = _Segments(cuts, parameter_count, sum_over_ranks)

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, one per parameter (waits for the device).

        After `set_segments` the list goes by parameter index and holds the latest ratio of each parameter, 1 before its
        first step. It is the same on every rank where `min_coeff` and `max_coeff` are the same in all groups; otherwise
        a parameter of which no element lies here is shown within the first group's bounds.
        """
        if self._segments is not None:
            return self._segments.ratios(self.param_groups)
        return [ratio for ratios in self._ratios for ratio in ratios.tolist()]

    def _update_all(self, groups: list[tuple[dict[str, Any], list[OnePassUpdate]]], grad_scale: float) -> None:
        """One step of these parameters. With `sum_over_ranks` set it is a collective: see `set_segments`."""
        works = []
        for group, updates in groups:
            for update in updates:
                check_dense(self, update.param, update.grad)
            works += [self._advance(group, together, grad_scale) for together in self._alike(updates)]
        if self._segments is not None:
            self._segments.complete(works)
        for work in works:
            work.finish(work.norms)
        self._ratios = [_trust_ratios(work.norms, work.group) for work in works]

    def _advance(self, group: dict[str, Any], updates: list[OnePassUpdate], grad_scale: float) -> _Work:
        """Phase one: steps and moments move on, and the norms of the pieces are there."""
        params = [update.param for update in updates]
        for name in ("exp_avg", "exp_avg_sq"):
            moment(self, params, name)
        cuts = [self._cut_of(param) for param in params]
        known = [cut.indices for cut in cuts if cut is not None]
        indices = torch.cat(known) if known else torch.empty(0)
        if self._op("fused_lamb_moments", updates) is not None:
            norms, finish = self._advance_by_ops(group, updates, cuts, grad_scale)
        else:
            norms, finish = self._advance_in_torch(group, updates, cuts, grad_scale)
        return _Work(group, norms, indices, finish)

    def _advance_by_ops(
        self, group: dict[str, Any], updates: list[OnePassUpdate], cuts: list[_Cut | None], grad_scale: float
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        device = updates[0].param.device
        params, exp_avgs, exp_avg_sqs, grads, copies = (
            _owned_first(_split(tensors, cuts), cuts)
            for tensors in (
                [update.param for update in updates],
                self._states(updates, "exp_avg"),
                self._states(updates, "exp_avg_sq"),
                [update.grad for update in updates],
                [update.copy for update in updates if update.copy is not None],
            )
        )
        steps = [[step] * (len(cut.lengths) if cut else 1) for step, cut in zip(self._count(updates, None), cuts)]
        norms = torch.zeros(2, len(params), dtype=torch.float32, device=device)
        betas, how = group["betas"], (group["eps"], group["weight_decay"])
        inside, owned = group["eps_inside_sqrt"], sum(sum(cut.owned) if cut else 1 for cut in cuts)
        load("fused_lamb_moments", device.type)(
            params, grads, exp_avgs, exp_avg_sqs, norms, None, None, *betas, *how, grad_scale, inside
        )

        def finish(counting: Tensor) -> None:
            norms.zero_()  # what has no ratio takes 1
            norms[:, :owned] = counting
            lr = self._on_device(device, group["lr"]).lr
            known_lr = 0.0 if lr is not None else float(group["lr"])
            bounds = (group["min_coeff"], group["max_coeff"])
            load("fused_lamb_apply", device.type)(
                *(params, exp_avgs, exp_avg_sqs, copies, _owned_first(steps, cuts), norms, lr, None),
                *(known_lr, *betas, *how, *bounds, inside, group["bias_correction"]),
            )

        return norms[:, :owned].clone(), finish

    def _advance_in_torch(
        self, group: dict[str, Any], updates: list[OnePassUpdate], cuts: list[_Cut | None], grad_scale: float
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        params = [update.param for update in updates]
        grads = [update.grad.to(update.param.dtype) for update in updates]
        if grad_scale != 1.0:
            grads = list(torch._foreach_mul(grads, grad_scale))
        weights = _owned_first(_split(params, cuts), cuts)
        vectors = _owned_first(_split(self._adam_updates(group, params, grads), cuts), cuts)
        steps = [[self._step_size(group, param)] * (len(cut.lengths) if cut else 1) for param, cut in zip(params, cuts)]
        rates = _owned_first(steps, cuts)
        owned = sum(sum(cut.owned) if cut else 1 for cut in cuts)
        norms = _norms(weights[:owned], vectors[:owned], params[0].device)

        def finish(counting: Tensor) -> None:
            ratios = _trust_ratios(counting, group)
            scales = [*ratios.unbind(), *[ratios.new_ones(())] * (len(weights) - owned)]
            if weights:
                torch._foreach_addcmul_(weights, vectors, scales, scalars=[-rate for rate in rates])
            for update in updates:
                if update.copy is not None:
                    update.copy.copy_(update.param)

        return norms, finish

    def _cut_of(self, param: Tensor) -> _Cut | None:
        if self._segments is None:
            return None
        cut = self._segments.cuts.get(param)
        if cut is None:
            raise OptimizerError(
                f"Lamb: a parameter of shape {tuple(param.shape)} was added after set_segments; call it again, with "
                "every run"
            )
        return cut

    def _adam_updates(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Advance the moments; returns u of the module's docstring, one new tensor per parameter."""
        beta1, beta2 = group["betas"]
        exp_avgs, exp_avg_sqs = moment(self, params, "exp_avg"), moment(self, params, "exp_avg_sq")
        torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)
        if group["eps_inside_sqrt"]:
            updates = list(torch._foreach_add(exp_avg_sqs, group["eps"]))
            torch._foreach_sqrt_(updates)
        else:
            updates = list(torch._foreach_sqrt(exp_avg_sqs))
            torch._foreach_add_(updates, group["eps"])
        for update, exp_avg in zip(updates, exp_avgs):
            torch.div(exp_avg, update, out=update)  # foreach has no such form, and would hold a second vector
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return updates

    def _step_size(self, group: dict[str, Any], param: Tensor) -> float:
        """Count the step, on the CPU so that nothing is waited for; returns lr c of the module's docstring."""
        state = self.state[param]
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu()
        state["step"] += 1
        if not group["bias_correction"]:
            return float(group["lr"])
        steps, (beta1, beta2) = state["step"].item(), group["betas"]
        return float(group["lr"]) * math.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)


def _split(tensors: Sequence[Tensor], cuts: Sequence[_Cut | None]) -> list[Sequence[Tensor]]:
    return [[tensor] if cut is None else tensor.split(cut.lengths) for tensor, cut in zip(tensors, cuts)]


def _owned_first(pieces: Sequence[Sequence[_T]], cuts: Sequence[_Cut | None]) -> list[_T]:
    """Of the runs' pieces those that belong to a parameter, in order, and then the gaps."""
    found: tuple[list[_T], list[_T]] = ([], [])
    for parts, cut in zip(pieces, cuts):
        for part, owned in zip(parts, [True] if cut is None else cut.owned):
            found[not owned].append(part)
    return found[0] + found[1]


def _norms(weights: list[Tensor], vectors: list[Tensor], device: torch.device) -> Tensor:
    """The 2-norms of weights and updates, shape (2, pieces): fp32, or fp64 where a piece is."""
    if not weights:
        return torch.zeros(2, 0, device=device)
    dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in weights) else torch.float32
    return torch.stack(torch._foreach_norm(weights + vectors, 2, dtype)).view(2, -1)


def _trust_ratios(norms: Tensor, group: dict[str, Any]) -> Tensor:
    """The ratios r of the module's docstring, shape (n,), for norms of shape (2, n)."""
    ratios = (norms[0] / norms[1]).clamp(group["min_coeff"], group["max_coeff"])
    return torch.where((norms[0] > 0) & (norms[1] > 0), ratios, torch.ones_like(ratios))


def _cut(run: Tensor, numel: int, segments: Sequence[tuple[int, int, int]], parameter_count: int) -> _Cut:
    """The segments and the gaps between them, empty ones out."""
    lengths: list[int] = []
    owners: list[int | None] = []
    covered_numel = 0
    for start, stop, index in segments:
        if not covered_numel <= start <= stop <= numel:
            raise OptimizerError(
                f"set_segments: [{start}, {stop}) overlaps what precedes it (up to {covered_numel}), is out of order, "
                f"or lies outside the run's {numel} elements"
            )
        if not 0 <= index < parameter_count:
            raise OptimizerError(
                f"set_segments: [{start}, {stop}) belongs to parameter {index}, but parameters are numbered from 0 to "
                f"{parameter_count - 1}"
            )
        lengths += [start - covered_numel, stop - start]
        owners += [None, index]
        covered_numel = stop
    lengths.append(numel - covered_numel)
    owners.append(None)
    kept = [(length, owner) for length, owner in zip(lengths, owners) if length]
    indices = torch.tensor([owner for _, owner in kept if owner is not None], dtype=torch.int64, device=run.device)
    return _Cut([length for length, _ in kept], [owner is not None for _, owner in kept], indices)
