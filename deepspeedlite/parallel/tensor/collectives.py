"""The four steps between split and whole activations, each with its gradient (Megatron-LM, arXiv:1909.08053).

    copy_in     whole -> whole      backward: the sum over the ranks
    sum_out     parts -> their sum  backward: as it is
    gather_out  columns -> whole    backward: this rank's columns
    slice_in    whole -> columns    backward: the ranks' columns, gathered

Columns are the last dimension; ranks may have different numbers of them, as `parts` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepspeedlite.comm import Group


def copy_in(x: torch.Tensor, group: Group) -> torch.Tensor:
    """What a layer split by columns takes."""
    if group.size == 1 or not torch.is_grad_enabled():
        return x
    copied: torch.Tensor = _Copy.apply(x, group)
    return copied


def sum_out(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the ranks, in place where no gradient is wanted."""
    if group.size == 1:
        return x
    if not torch.is_grad_enabled():
        x = x.contiguous()
        group.all_reduce(x, label="partial sums of a split layer")
        return x
    summed: torch.Tensor = _Sum.apply(x, group)
    return summed


def gather_out(x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
    """All ranks' columns, side by side."""
    if group.size == 1:
        return x
    gathered: torch.Tensor = _Gather.apply(x, group, parts)
    return gathered


def slice_in(x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
    """This rank's columns of what every rank has whole."""
    if group.size == 1:
        return x
    sliced: torch.Tensor = _Slice.apply(x, group, parts)
    return sliced


def _gathered(x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
    widest = max(parts)
    if x.shape[-1] < widest:
        x = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
    x = x.contiguous()
    out = x.new_empty(group.size, *x.shape)
    group.all_gather_into(out.view(-1), x.view(-1), label="columns of a split layer")
    if min(parts) == widest:
        return out.movedim(0, -2).reshape(*x.shape[:-1], group.size * widest)
    return torch.cat([out[rank, ..., :part] for rank, part in enumerate(parts)], -1)


def _own(x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
    return x.narrow(-1, sum(parts[: group.rank]), parts[group.rank])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        summed = grad.clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(summed, label="gradients of a split layer's input")
        return summed, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        group.all_reduce(summed, label="partial sums of a split layer")
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
        ctx.group, ctx.parts = group, parts
        return _gathered(x, group, parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _own(grad, ctx.group, ctx.parts).contiguous(), None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, parts: Sequence[int]) -> torch.Tensor:
        ctx.group, ctx.parts = group, parts
        return _own(x, group, parts).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _gathered(grad, ctx.group, ctx.parts), None, None
