"""The ops of `csrc/transformer` in plain torch: what stands in where they cannot be had, with the same bits.

Arithmetic is float32, or float64 for float64 tensors, which kernels do not take.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops.transformer.dropout import Dropout, kept


def drop_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    summed: Tensor | None,
    normed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    ratio: float,
    seed: int,
    stream: int,
) -> None:
    """`summed = dropout(x + bias) + residual` and its layer norm `normed`, with the rows' `mean` and `rstd`."""
    value = _wide(x)
    if bias is not None:
        value = value + _wide(bias)
    value = _dropped(value, ratio, seed, stream)
    if residual is not None:
        value = value + _wide(residual)
    _put(summed, value)
    if normed is None or weight is None or shift is None or mean is None or rstd is None:
        return
    value = _wide(value.to(x.dtype))
    centre = value.mean(-1, keepdim=True)
    factor = ((value - centre).square().mean(-1, keepdim=True) + eps).rsqrt()
    _put(normed, (value - centre) * factor * _wide(weight) + _wide(shift))
    mean.copy_(centre.view_as(mean))
    rstd.copy_(factor.view_as(rstd))


def drop_norm_backward(
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
    summed: Tensor | None,
    normed: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    grad_x: Tensor | None,
    grad_residual: Tensor | None,
    grad_bias: Tensor | None,
    grad_weight: Tensor | None,
    grad_shift: Tensor | None,
    parts: Tensor,
    ratio: float,
    seed: int,
    stream: int,
) -> None:
    """Gradients of `drop_norm`, of the norm's input where `summed` is there, else of what `normed` was made from."""
    grad = _wide(grad_summed) if grad_summed is not None else None
    if grad_normed is not None:
        assert weight is not None and shift is not None and rstd is not None
        given = _wide(grad_normed).view(-1, grad_normed.shape[-1])
        factor = rstd.view(-1, 1)
        if summed is not None and mean is not None:
            normalized = (_wide(summed).view_as(given) - mean.view(-1, 1)) * factor
        else:
            assert normed is not None
            inverse = torch.where(weight == 0, 0.0, 1 / _wide(weight))
            normalized = (_wide(normed).view_as(given) - _wide(shift)) * inverse
        _put(grad_weight, (given * normalized).sum(0))
        _put(grad_shift, given.sum(0))
        weighed = given * _wide(weight)
        along = (weighed * normalized).mean(-1, keepdim=True)
        through = ((weighed - weighed.mean(-1, keepdim=True) - normalized * along) * factor).view_as(grad_normed)
        grad = through if grad is None else grad + through
    assert grad is not None
    _put(grad_residual, grad)
    grad = _dropped(grad, ratio, seed, stream)
    _put(grad_bias, grad.view(-1, grad.shape[-1]).sum(0))
    _put(grad_x, grad)


def bias_gelu(
    x: Tensor, bias: Tensor | None, out: Tensor, tanh_form: bool, ratio: float, seed: int, stream: int
) -> None:
    """`out = dropout(gelu(x + bias))`."""
    value = _wide(x) if bias is None else _wide(x) + _wide(bias)
    _put(out, _dropped(F.gelu(value, approximate="tanh" if tanh_form else "none"), ratio, seed, stream))


def bias_gelu_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    grad_bias: Tensor | None,
    parts: Tensor | None,
    out: Tensor | None,
    tanh_form: bool,
    ratio: float,
    seed: int,
    stream: int,
) -> None:
    """Gradients of `bias_gelu`, and its result once more where `out` is there."""
    value = _wide(x) if bias is None else _wide(x) + _wide(bias)
    form = "tanh" if tanh_form else "none"
    grad = torch.ops.aten.gelu_backward(_dropped(_wide(grad_out), ratio, seed, stream), value, approximate=form)
    _put(grad_x, grad)
    _put(grad_bias, grad.view(-1, grad.shape[-1]).sum(0))
    if out is not None:
        _put(out, _dropped(F.gelu(value, approximate=form), ratio, seed, stream))


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None,
    probs: Tensor | None,
    dropped: Tensor | None,
    scale: float,
    ratio: float,
    seed: int,
    stream: int,
) -> None:
    """`probs = softmax(scale * scores + mask)`, 0 where all of a row is -infinity, and `dropped = dropout(probs)`."""
    value = _wide(scores) * scale
    if mask is not None and mask.dtype == torch.bool:
        value = value.masked_fill(~mask, -math.inf)
    elif mask is not None:
        value = value + _wide(mask)
    value = value.softmax(-1).masked_fill((value == -math.inf).all(-1, keepdim=True), 0)
    _put(probs, value)
    _put(dropped, _dropped(value, ratio, seed, stream))


def masked_softmax_backward(
    grad_dropped: Tensor, probs: Tensor, grad_scores: Tensor, scale: float, ratio: float, seed: int, stream: int
) -> None:
    """`grad_scores`, of the products before they are scaled."""
    grad, weights = _dropped(_wide(grad_dropped), ratio, seed, stream), _wide(probs).view_as(grad_dropped)
    _put(grad_scores, scale * weights * (grad - (grad * weights).sum(-1, keepdim=True)))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _put(to: Tensor | None, value: Tensor) -> None:
    if to is not None:
        to.copy_(value.view_as(to))


def _dropped(value: Tensor, ratio: float, seed: int, stream: int) -> Tensor:
    if ratio == 0:
        return value
    return value * kept(Dropout(ratio, seed, stream), value.numel(), value.device).view_as(value)
