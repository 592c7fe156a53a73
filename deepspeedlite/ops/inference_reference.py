"""What the ops of `transformer_inference` do, in plain torch: their oracle, and what stands in where they are missing.

Any floating dtype and device. Arithmetic is in float32 (float64 of float64 tensors), rounded once to the input's dtype.
Shapes are those of `transformer_inference`, whose functions have the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# In the order of `dsl_activation`, in csrc/transformer_inference/between.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
}


def wide(tensor: Tensor) -> Tensor:
    """The same numbers in the dtype that arithmetic is done in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: str,
    residual: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum is rounded to x's dtype before its statistics are taken: what is normed is what the caller keeps."""
    summed = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    values = wide(summed)
    if kind == "layer":
        values = values - values.mean(-1, keepdim=True)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (wide(weight) + 1.0 if unit_offset else wide(weight))
    if bias is not None:
        normed = normed + wide(bias)
    return normed.to(x.dtype), summed


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first `cos.shape[-1]` numbers of each head.

    x is `[batch, heads, tokens, dim]`; cos and sin are `[batch, tokens, rotary_dim]`.
    """
    rotary_dim = cos.shape[-1]
    turned, kept = wide(x[..., :rotary_dim]), x[..., rotary_dim:]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    turned = turned * wide(cos).unsqueeze(1) + other * wide(sin).unsqueeze(1)
    return torch.cat((turned.to(x.dtype), kept), -1)


def rotary_to_cache(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: int,
    *,
    heads: int,
    kv_heads: int,
    rotary_dim: int,
    interleaved: bool,
) -> Tensor:
    batch, tokens, width = qkv.shape
    each = qkv.view(batch, tokens, heads + 2 * kv_heads, width // (heads + 2 * kv_heads)).transpose(1, 2)
    q, k, v = each.split((heads, kv_heads, kv_heads), 1)
    if cos is not None and sin is not None:
        cos, sin = cos[..., :rotary_dim], sin[..., :rotary_dim]
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    keys[:, :, start : start + tokens] = k
    values[:, :, start : start + tokens] = v
    return q.contiguous()


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    *,
    scale: float,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    batch, heads, tokens, dim = q.shape
    kv_heads = keys.shape[1]
    grouped = wide(q).view(batch, kv_heads, -1, dim)  # a key's query heads beside each other, each with its tokens
    scores = grouped @ wide(keys[:, :, :length]).transpose(-1, -2) * scale
    scores = scores.view(batch, heads, tokens, length)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    key_at = torch.arange(length, device=q.device)
    distance = key_at - torch.arange(length - tokens, length, device=q.device)[:, None]  # [tokens, length], 0: itself
    if slopes is not None:
        scores = scores + wide(slopes)[:, None, None] * distance
    seen = distance <= 0
    if window:
        seen = seen & (distance > -window)
    seen = seen.expand(batch, 1, tokens, length)
    if mask is not None:
        seen = seen & mask[:, None, None, :length]
    scores = scores.masked_fill(~seen, -torch.inf)
    # Where nothing is seen the result is 0, not NaN.
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    mixed = weights.view(batch, kv_heads, -1, length) @ wide(values[:, :, :length])
    return mixed.view(batch, heads, tokens, dim).transpose(1, 2).reshape(batch, tokens, heads * dim).to(q.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](wide(x)).to(x.dtype)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = wide(gate_up).chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)
