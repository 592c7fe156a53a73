"""The ops of `csrc/transformer` in plain torch: what stands in where they cannot be had, with the same bits.

Arithmetic is float32, or float64 for float64 tensors, which kernels do not take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops.transformer.dropout import Dropout, kept

Tensors = Sequence[Tensor | None]


def drop_norm(given: Tensors, made: Tensors, eps: float, dropout: Dropout) -> None:
    """`summed = dropout(x + bias) + residual` and its layer norm `normed`, with the rows' `mean` and `rstd`."""
    x, bias, residual, weight, shift = given
    summed, normed, mean, rstd = made
    value = _wide(x)
    if bias is not None:
        value = value + _wide(bias)
    value = _dropped(value, dropout)
    if residual is not None:
        value = value + _wide(residual)
    _put(summed, value)
    if normed is None:
        return
    value = _wide(value.to(normed.dtype))
    centre = value.mean(-1, keepdim=True)
    factor = ((value - centre).square().mean(-1, keepdim=True) + eps).rsqrt()
    _put(normed, (value - centre) * factor * _wide(weight) + _wide(shift))
    _put(mean, centre)
    _put(rstd, factor)


def drop_norm_backward(given: Tensors, made: Tensors, dropout: Dropout) -> None:
    """Gradients of `drop_norm`, of the norm's input where `summed` is there, else of what `normed` was made from."""
    grad_normed, grad_summed = given[:2]
    grad_x, grad_residual, grad_bias, grad_weight, grad_shift, _ = made
    grad = None if grad_summed is None else _wide(grad_summed)
    if grad_normed is not None:
        rows, normalized, factor = _normalized_again(grad_normed, given[2:])
        weighed = rows * _wide(given[4])
        _put(grad_weight, (rows * normalized).sum(0))
        _put(grad_shift, rows.sum(0))
        along = (weighed * normalized).mean(-1, keepdim=True)
        through = ((weighed - weighed.mean(-1, keepdim=True) - normalized * along) * factor).view_as(grad_normed)
        grad = through if grad is None else grad + through
    grad = _wide(grad)
    _put(grad_residual, grad)
    grad = _dropped(grad, dropout)
    _put(grad_bias, grad.view(-1, grad.shape[-1]).sum(0))
    _put(grad_x, grad)


def _normalized_again(grad_normed: Tensor, kept: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient and the normalized numbers as rows, and what each row was multiplied by."""
    summed, normed, weight, shift, mean, rstd = kept
    rows = _wide(grad_normed).view(-1, grad_normed.shape[-1])
    factor = _wide(rstd).view(-1, 1)
    if summed is not None:
        return rows, (_wide(summed).view_as(rows) - _wide(mean).view(-1, 1)) * factor, factor
    inverse = torch.where(_wide(weight) == 0, 0.0, 1 / _wide(weight))
    return rows, (_wide(normed).view_as(rows) - _wide(shift)) * inverse, factor


def bias_gelu(given: Tensors, made: Tensors, tanh_form: bool, dropout: Dropout) -> None:
    """`out = dropout(gelu(x + bias))`."""
    x, bias = given
    value = _wide(x) if bias is None else _wide(x) + _wide(bias)
    _put(made[0], _dropped(F.gelu(value, approximate="tanh" if tanh_form else "none"), dropout))


def bias_gelu_backward(given: Tensors, made: Tensors, tanh_form: bool, dropout: Dropout) -> None:
    """Gradients of `bias_gelu`, and its result once more where `out` is there."""
    grad_out, x, bias = given
    grad_x, grad_bias, _, out = made
    value = _wide(x) if bias is None else _wide(x) + _wide(bias)
    form = "tanh" if tanh_form else "none"
    grad = torch.ops.aten.gelu_backward(_dropped(_wide(grad_out), dropout), value, approximate=form)
    _put(grad_x, grad)
    _put(grad_bias, grad.view(-1, grad.shape[-1]).sum(0))
    if out is not None:
        _put(out, _dropped(F.gelu(value, approximate=form), dropout))


def masked_softmax(given: Tensors, made: Tensors, scale: float, dropout: Dropout) -> None:
    """`probs = softmax(scale * scores + mask)`, 0 where all of a row is -infinity, and `dropped = dropout(probs)`."""
    scores, mask = given
    value = _wide(scores) * scale
    if mask is not None and mask.dtype == torch.bool:
        value = value.masked_fill(~mask, -math.inf)
    elif mask is not None:
        value = value + _wide(mask)
    value = value.softmax(-1).masked_fill((value == -math.inf).all(-1, keepdim=True), 0)
    _put(made[0], value)
    _put(made[1], _dropped(value, dropout))


def masked_softmax_backward(given: Tensors, made: Tensors, scale: float, dropout: Dropout) -> None:
    """`grad_scores`, of the products before they are scaled."""
    grad, probs = _dropped(_wide(given[0]), dropout), _wide(given[1]).view_as(_wide(given[0]))
    _put(made[0], scale * probs * (grad - (grad * probs).sum(-1, keepdim=True)))


# How many tensors each gets, and how many it writes: then come numbers, and what makes a `Dropout`.
_TENSORS: dict[str, tuple[Callable[..., None], int, int]] = {
    "drop_norm": (drop_norm, 5, 4),
    "drop_norm_backward": (drop_norm_backward, 8, 6),
    "bias_gelu": (bias_gelu, 2, 1),
    "bias_gelu_backward": (bias_gelu_backward, 3, 4),
    "masked_softmax": (masked_softmax, 2, 2),
    "masked_softmax_backward": (masked_softmax_backward, 2, 1),
}


def op(name: str) -> Callable[..., None]:
    """The function of that name, called as the op is: all tensors, all numbers, one after the other."""
    function, given, made = _TENSORS[name]

    def call(*arguments: Any) -> None:
        tensors, numbers = arguments[: given + made], arguments[given + made :]
        function(tensors[:given], tensors[given:], *numbers[:-3], Dropout(*numbers[-3:]))

    return call


def _wide(x: Tensor | None) -> Tensor:
    assert x is not None, "a tensor is missing that the op needs as well"
    return x if x.dtype == torch.float64 else x.float()


def _put(to: Tensor | None, value: Tensor) -> None:
    if to is not None:
        to.copy_(value.view_as(to))


def _dropped(value: Tensor, dropout: Dropout) -> Tensor:
    if dropout.ratio == 0:
        return value
    return value * kept(dropout, value.numel(), value.device).view_as(value)
