"""What stands between a transformer layer's products, differentiable: each is one kernel forward, one backward.

They take float32, bfloat16 and float16 on CPUs and GPUs and compute in float32; where the op `transformer` cannot be
had, and for float64, plain torch (`reference`) does the same. Sums over rows have one order, whatever the number of
threads. `stochastic=True` takes the op `stochastic_transformer`, which adds in any order. Gradients of gradients are
not to be had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeedlite.ops import find_op
from deepspeedlite.ops.transformer import reference
from deepspeedlite.ops.transformer.dropout import NO_DROPOUT, Dropout
from deepspeedlite.runtime.errors import OpError

PART = 32  # rows that are summed together: DSL_PART of csrc/transformer/transformer.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """A layer norm's weights, and what is added to variances.

    Attributes:
        weight: `[hidden]`.
        shift: `[hidden]`, is added.
        eps: above 0, or 0.
    """

    weight: Tensor
    shift: Tensor
    eps: float


def drop_add_norm(
    x: Tensor,
    norm: Norm,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    keep_sum: bool = True,
    invertible: bool = False,
    stochastic: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """`summed = dropout(x + bias) + residual`, and `normed`, its layer norm (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: `[..., hidden]`; `residual` has its shape and gets its dtype.
        norm: its weights may be of any of the dtypes.
        bias: `[hidden]`, of any of the dtypes, or None for none.
        residual: None for none.
        dropout: of the sum of x and bias.
        keep_sum: whether `summed` is returned; else it is None.
        invertible: keep `normed` for the backward pass and make the norm's input again from it. `normed` often is kept
            anyway, by the product that follows. Where the norm's weight is 0 there is nothing to make it from: that
            number counts as the row's mean, and that weight gets no gradient.
        stochastic: see above.

    Returns:
        `(summed, normed)`, of x's shape and dtype.

    Raises:
        OpError: shapes or dtypes do not go together.
    """
    _check_rows("drop_add_norm", x, bias=bias, weight=norm.weight, shift=norm.shift)
    residual = _like("drop_add_norm", x, residual)
    how = _NormPlan(norm.eps, dropout, keep_sum, invertible, stochastic)
    summed, normed = _DropNorm.apply(x, bias, residual, norm.weight, norm.shift, how)
    return x if summed is None and keep_sum else summed, normed


def drop_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    *,
    stochastic: bool = False,
) -> Tensor:
    """`dropout(x + bias) + residual`; see `drop_add_norm`.

    Raises:
        OpError: shapes or dtypes do not go together.
    """
    _check_rows("drop_add", x, bias=bias)
    residual = _like("drop_add", x, residual)
    how = _NormPlan(0.0, dropout, True, False, stochastic)
    summed: Tensor | None = _DropNorm.apply(x, bias, residual, None, None, how)[0]
    return x if summed is None else summed


def bias_gelu_linear(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    *,
    tanh_form: bool = False,
    dropout: Dropout = NO_DROPOUT,
    recompute: bool = False,
    stochastic: bool = False,
) -> Tensor:
    """`dropout(gelu(x + bias)) @ weight.T`, GELU as Hendrycks and Gimpel 2016 (arXiv:1606.08415) have it.

    Args:
        x: `[..., inter]`, a product without its bias.
        bias: `[inter]`, or None.
        weight: `[out, inter]`, of x's dtype.
        tanh_form: GELU by tanh, not erf.
        dropout: of the activation.
        recompute: keep x alone, and compute the activation once more in the backward pass.
        stochastic: see above.

    Returns:
        `[..., out]`.

    Raises:
        OpError: shapes or dtypes do not go together.
    """
    _check_rows("bias_gelu_linear", x, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise OpError(
            f"bias_gelu_linear: the weight is {_told(weight)}; for x, {_told(x)}, it must be [out, {x.shape[-1]}] "
            f"of {x.dtype}"
        )
    product: Tensor = _BiasGeluLinear.apply(x, bias, weight, _GeluPlan(tanh_form, dropout, recompute, stochastic))
    return product


def dropout_attention(
    qkv: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    recompute: bool = False,
    stochastic: bool = False,
) -> Tensor:
    """Attention of every token to every other, with dropout of its probabilities, which fused attention cannot do.

    Args:
        qkv: `[batch, tokens, 3 * heads * dim]`: queries, keys, values, each head by head.
        heads: of queries, keys and values.
        mask: lies over `[batch, heads, queries, keys]`: bool, True where a key is seen, or floats that are added. It
            gets no gradient. A query that sees nothing gets 0.
        dropout: of the probabilities.
        recompute: keep queries, keys and values alone, and compute probabilities once more in the backward pass.
        stochastic: see above.

    Returns:
        `[batch, tokens, heads * dim]`.

    Raises:
        OpError: shapes do not go together, or the mask is of another kind.
    """
    if qkv.dim() != 3 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise OpError(
            f"dropout_attention: qkv is {_told(qkv)}; for {heads} heads it must be [batch, tokens, 3 * {heads} * dim]"
        )
    mask = checked_mask("dropout_attention", mask, qkv.shape[0], heads, qkv.shape[1])
    mixed: Tensor = _DropoutAttention.apply(qkv, mask, _AttentionPlan(heads, dropout, recompute, stochastic))
    return mixed


def checked_mask(whose: str, mask: Tensor | None, batch: int, heads: int, tokens: int) -> Tensor | None:
    """The mask with four dimensions: one of two is of `[batch, keys]`, of three `[batch, queries, keys]`.

    Raises:
        OpError: it lies over no scores of these sizes, or is neither bool nor floating point, or asks for a gradient.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool and mask.dtype not in (*_DTYPES, torch.float64):
        raise OpError(
            f"{whose}: the mask is {mask.dtype}; make it bool (True: a key is seen) or, to be added, floating point"
        )
    if mask.requires_grad:
        raise OpError(f"{whose}: the mask requires a gradient, and gets none; detach it")
    given, dims = mask, mask.dim()
    if dims == 2:
        mask = mask[:, None, None, :]
    elif dims == 3:
        mask = mask[:, None]
    whole = (batch, heads, tokens, tokens)
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, whole)):
        raise OpError(f"{whose}: the mask is {_told(given)}, which does not lie over scores {list(whole)}")
    return mask


# --- as autograd has them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NormPlan:
    eps: float
    dropout: Dropout
    keep_sum: bool
    invertible: bool
    stochastic: bool


@dataclass(frozen=True)
class _GeluPlan:
    tanh_form: bool
    dropout: Dropout
    recompute: bool
    stochastic: bool


@dataclass(frozen=True)
class _AttentionPlan:
    heads: int
    dropout: Dropout
    recompute: bool
    stochastic: bool


class _DropNorm(torch.autograd.Function):
    """The sum is None where it would be x itself; the norm is None where there is no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        how: _NormPlan,
    ) -> tuple[Tensor | None, Tensor | None]:
        x = x.contiguous()
        plain = bias is None and residual is None and how.dropout.ratio == 0
        summed = None if plain or (how.invertible and not how.keep_sum) else torch.empty_like(x)
        normed = mean = rstd = None
        if weight is not None:
            normed = torch.empty_like(x)
            mean, rstd = (_floats(x, x.shape[:-1]) for _ in range(2))
        _op("drop_norm", x, how.stochastic)(
            x, bias, residual, weight, shift, summed, normed, mean, rstd, how.eps, *how.dropout
        )
        kept = None
        if weight is not None:
            kept = normed if how.invertible else x if plain else summed
        ctx.save_for_backward(kept, weight, shift, None if how.invertible else mean, rstd, bias)
        ctx.chosen = how
        ctx.set_materialize_grads(False)
        return summed if how.keep_sum else None, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_summed: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_summed is None and grad_normed is None:
            return (None,) * 6
        kept, weight, shift, mean, rstd, bias = ctx.saved_tensors
        how, wanted = ctx.chosen, ctx.needs_input_grad
        given = [None if one is None else one.contiguous() for one in (grad_summed, grad_normed)]
        first = given[0] if given[0] is not None else given[1]
        assert first is not None
        rows, hidden = first.numel() // max(first.shape[-1], 1), first.shape[-1]
        through_norm = grad_normed is not None
        grad_x = torch.empty_like(first) if wanted[0] or wanted[2] else None
        dropping = how.dropout.ratio != 0
        grad_residual = torch.empty_like(first) if wanted[2] and dropping else None if dropping else grad_x
        sums = [
            _floats(first, (hidden,)) if needed else None
            for needed in (wanted[1], wanted[3] and through_norm, wanted[4] and through_norm)
        ]
        _op("drop_norm_backward", first, how.stochastic)(
            given[1],
            given[0],
            None if how.invertible or not through_norm else kept,
            kept if how.invertible and through_norm else None,
            *((weight, shift, mean, rstd) if through_norm else (None,) * 4),
            grad_x if dropping or grad_residual is None else None,
            grad_residual,
            *sums,
            _floats(first, (-(-rows // PART) * 3 * hidden + (0 if first.is_cpu else 2 * rows),)),
            *how.dropout,
        )
        grads = [None if one is None else one.to(like.dtype) for one, like in zip(sums, (bias, weight, shift))]
        return grad_x if wanted[0] else None, grads[0], grad_residual if wanted[2] else None, *grads[1:], None


class _BiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, how: _GeluPlan) -> Tensor:
        x = x.contiguous()
        active = torch.empty_like(x)
        _op("bias_gelu", x, how.stochastic)(x, bias, active, how.tanh_form, *how.dropout)
        ctx.save_for_backward(x, bias, weight, None if how.recompute else active)
        ctx.chosen = how
        return torch.mm(_rows(active), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight, active = ctx.saved_tensors
        how, wanted = ctx.chosen, ctx.needs_input_grad
        again = torch.empty_like(x) if active is None and wanted[2] else None
        grad_rows = _rows(grad.contiguous())
        grad_x = torch.mm(grad_rows, weight).view_as(x)
        rows, width = _rows(x).shape
        grad_bias = _floats(x, (width,)) if wanted[1] else None
        parts = _floats(x, (-(-rows // PART) * width,)) if wanted[1] else None
        _op("bias_gelu_backward", x, how.stochastic)(
            grad_x, x, bias, grad_x, grad_bias, parts, again, how.tanh_form, *how.dropout
        )
        if again is not None:
            active = again
        grad_weight = torch.mm(grad_rows.t(), _rows(active)) if wanted[2] else None
        return grad_x, None if grad_bias is None else grad_bias.to(bias.dtype), grad_weight, None


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor | None, how: _AttentionPlan) -> Tensor:
        batch, tokens, width = qkv.shape
        dim = width // (3 * how.heads)
        parts = qkv.view(batch, tokens, 3, how.heads, dim).permute(2, 0, 3, 1, 4).contiguous()
        probs, dropped = _probabilities(parts, mask, how, parts_wanted=not how.recompute)
        each = batch * how.heads
        values = parts[2].view(each, tokens, dim)
        mixed = torch.bmm(dropped.view(each, tokens, tokens), values).view(batch, how.heads, tokens, dim)
        ctx.save_for_backward(parts, mask, *((None, None) if how.recompute else (probs, dropped)))
        ctx.chosen = how
        return mixed.transpose(1, 2).reshape(batch, tokens, how.heads * dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, mask, probs, dropped = ctx.saved_tensors
        how = ctx.chosen
        _, batch, heads, tokens, dim = parts.shape
        if probs is None:
            probs, dropped = _probabilities(parts, mask, how, parts_wanted=True)
        each = batch * heads
        grad = grad.view(batch, tokens, heads, dim).transpose(1, 2).reshape(each, tokens, dim)
        q, k, v = parts.view(3, each, tokens, dim)
        grads = torch.empty_like(parts)
        grad_q, grad_k, grad_v = grads.view(3, each, tokens, dim)
        torch.bmm(dropped.view(each, tokens, tokens).transpose(1, 2), grad, out=grad_v)
        scores = torch.bmm(grad, v.transpose(1, 2))
        _op("masked_softmax_backward", scores, how.stochastic)(scores, probs, scores, dim**-0.5, *how.dropout)
        torch.bmm(scores, k, out=grad_q)
        torch.bmm(scores.transpose(1, 2), q, out=grad_k)
        return grads.permute(1, 3, 0, 2, 4).reshape(batch, tokens, 3 * heads * dim), None, None


def _probabilities(
    parts: Tensor, mask: Tensor | None, how: _AttentionPlan, *, parts_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Of `[3, batch, heads, tokens, dim]`: before dropout (after it where they are not wanted), and after it."""
    _, batch, heads, tokens, dim = parts.shape
    q, k, _ = parts.view(3, batch * heads, tokens, dim)
    scores, scale = _products(q, k)
    scores = scores.view(batch, heads, tokens, tokens)
    dropping = how.dropout.ratio != 0
    probs = scores if parts_wanted or not dropping else None
    dropped = None if not dropping else torch.empty_like(scores) if parts_wanted else scores
    _op("masked_softmax", scores, how.stochastic)(scores, mask, probs, dropped, scale, *how.dropout)
    return scores, scores if dropped is None else dropped


def _products(q: Tensor, k: Tensor) -> tuple[Tensor, float]:
    """`q k^T`, and what it is still to be multiplied by: in fp16 nothing, as it may overflow before it is scaled."""
    scale = q.shape[-1] ** -0.5
    if q.dtype != torch.float16:
        return torch.bmm(q, k.transpose(1, 2)), scale
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale), 1.0


# --- what they share --------------------------------------------------------------------------------------------------


def _op(name: str, x: Tensor, stochastic: bool) -> Callable[..., None]:
    """The op, where it can be had for such a tensor, or the same in torch."""
    if x.dtype in _DTYPES:
        op: Callable[..., None] | None = find_op(f"stochastic_{name}" if stochastic else name, x.device.type)
        if op is not None:
            return op
    return reference.op(name)


def _floats(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    make = torch.empty if like.numel() else torch.zeros  # the op writes nothing where there are no rows
    return make(shape, dtype=dtype, device=like.device)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _told(x: Tensor) -> str:
    return f"{list(x.shape)} of {x.dtype}"


def _like(whose: str, x: Tensor, residual: Tensor | None) -> Tensor | None:
    if residual is None:
        return None
    if residual.shape != x.shape:
        raise OpError(f"{whose}: the residual is {_told(residual)}, and x is {_told(x)}")
    return residual.to(x.dtype).contiguous()


def _check_rows(whose: str, x: Tensor, **weights: Tensor | None) -> None:
    if x.dim() == 0 or x.dtype not in (*_DTYPES, torch.float64):
        raise OpError(f"{whose}: x is {_told(x)}; it must be [..., hidden] of a floating point dtype")
    for name, weight in weights.items():
        if weight is not None and (weight.shape != x.shape[-1:] or not weight.is_floating_point()):
            raise OpError(f"{whose}: {name} is {_told(weight)}; for x, {_told(x)}, it must be [{x.shape[-1]}]")
