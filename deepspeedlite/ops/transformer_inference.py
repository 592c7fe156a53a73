"""What stands between a transformer's products when it generates: norms, positions, the cache, attention, gates.

Each function is one kernel where the op `transformer_inference` can be had, and plain torch (`inference_reference`)
where not. All take float32, bfloat16 and float16, compute in float32, and have no gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeedlite.ops import find_op
from deepspeedlite.ops import inference_reference as reference
from deepspeedlite.ops.packed_linear import PackedLinear
from deepspeedlite.runtime.errors import OpError

__all__ = [
    "PackedLinear",
    "activate",
    "activation_number",
    "activations",
    "add_norm",
    "decode_attention",
    "gated",
    "rotary_to_cache",
]

_KINDS = ("rms", "layer")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(reference.ACTIVATIONS)}


def activations() -> tuple[str, ...]:
    """The names that `activate` and `gated` know."""
    return tuple(reference.ACTIVATIONS)


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
    """The sum of x and `residual`, and its norm over the last dimension: `(normed, summed)`.

    Args:
        x: `[..., hidden]`; `residual` has its shape.
        weight: `[hidden]`, or None for ones.
        bias: `[hidden]`, or None.
        eps: is added to the mean square, or the variance.
        kind: "rms" (Zhang and Sennrich 2019, arXiv:1910.07467) or "layer" (Ba et al. 2016, arXiv:1607.06450).
        residual: None: `summed` is x itself.
        unit_offset: whether 1 is added to the weight, as Gemma does.

    Raises:
        OpError: there is no such kind.
    """
    if kind not in _KINDS:
        raise OpError(f"add_norm: kind={kind!r} is none of {', '.join(_KINDS)}")
    if (op := _op("add_norm", x)) is not None:
        x = x.contiguous()
        normed, summed = torch.empty_like(x), None
        if residual is not None:
            residual, summed = residual.contiguous(), torch.empty_like(x)
        op(x, residual, weight, bias, normed, summed, eps, kind == "layer", unit_offset)
        return normed, x if summed is None else summed
    return reference.add_norm(x, weight, bias, eps, kind=kind, residual=residual, unit_offset=unit_offset)


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
    """Turn queries and keys to their positions and put keys and values into the cache; the queries are returned.

    Args:
        qkv: `[batch, tokens, (heads + 2 kv_heads) * dim]`, ordered q, k, v.
        cos: `[batch or 1, tokens, rotary_dim]`, with `sin`; None where positions are not rotary.
        sin: a number of a pair has its own cosine and sine; those of a pair are equal in the usual embedding.
        keys: `[batch, kv_heads, max_tokens, dim]`, written at positions `start` to `start + tokens`; so is `values`.
        values: as `keys`.
        start: the first position.
        heads: of queries; `kv_heads` of keys and of values.
        kv_heads: divides `heads`.
        rotary_dim: the first numbers of a head are turned, this many of them.
        interleaved: pairs are neighbours (GPT-J); else number i and i + rotary_dim / 2 (GPT-NeoX, Llama).

    Returns:
        `[batch, heads, tokens, dim]`.

    Raises:
        OpError: the cache has no room for the tokens.
    """
    if start < 0 or start + qkv.shape[1] > keys.shape[2]:
        raise OpError(
            f"rotary_to_cache: {qkv.shape[1]} tokens at {start} do not fit into a cache of {keys.shape[2]} tokens"
        )
    if (op := _op("rotary_to_cache", qkv)) is not None:
        batch, tokens, width = qkv.shape
        q = qkv.new_empty((batch, heads, tokens, width // (heads + 2 * kv_heads)))
        op(qkv.contiguous(), cos, sin, keys, values, q, start, rotary_dim, interleaved)
        return q
    return reference.rotary_to_cache(
        *(qkv, cos, sin, keys, values, start),
        heads=heads,
        kv_heads=kv_heads,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
    )


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
    """Attention of a few query tokens over the cache's first `length` positions, the last of which are their own.

    Args:
        q: `[batch, heads, tokens, dim]`; token t stands at position `length - tokens + t` and sees none after it.
        keys: `[batch, kv_heads, max_tokens, dim]`; kv_heads divides heads, and a key serves neighbouring query heads.
        values: as `keys`.
        length: positions that are filled.
        scale: of the products of queries and keys.
        mask: bool, `[batch, length]` (or more columns), True where a position may be seen.
        slopes: `[heads]`, of ALiBi (Press et al. 2021, arXiv:2108.12409): slope * (key's - query's position) is added.
        softcap: where not 0, scores become softcap * tanh(score / softcap), as in Gemma 2.
        window: where not 0, only so many positions are seen, the query's own included.

    Returns:
        `[batch, tokens, heads * dim]`, q's dtype; 0 where a token sees no position.

    Raises:
        OpError: there are fewer positions than tokens, or than the cache has.
    """
    if not q.shape[2] <= length <= keys.shape[2]:
        raise OpError(
            f"decode_attention: length={length}, for {q.shape[2]} tokens and a cache of {keys.shape[2]} tokens"
        )
    if (op := _op("decode_attention", q)) is not None:
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
        slopes = None if slopes is None else slopes.to(torch.float32)
        op(q.contiguous(), keys, values, mask, slopes, out, length, scale, softcap, window)
        return out
    return reference.decode_attention(
        q, keys, values, length, scale=scale, mask=mask, slopes=slopes, softcap=softcap, window=window
    )


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of every number, in x's dtype.

    Raises:
        OpError: there is no such activation.
    """
    index = activation_number(activation)
    if (op := _op("gated_activation", x)) is not None:
        x = x.contiguous()
        out = torch.empty_like(x)
        op(x, out, index, False)
        return out
    return reference.activate(x, activation)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`[..., 2 * inter]` -> `[..., inter]`: the activation of the first half, times the second.

    Raises:
        OpError: there is no such activation.
    """
    index = activation_number(activation)
    if (op := _op("gated_activation", gate_up)) is not None:
        out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        op(gate_up.contiguous(), out, index, True)
        return out
    return reference.gated(gate_up, activation)


def _op(name: str, x: Tensor) -> Any:
    """The op where it takes such an input, else None: of its dtypes, and without gradients."""
    if x.dtype not in _DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return find_op(name, "cpu" if x.is_cpu else x.device.type)


def activation_number(name: str) -> int:
    """An activation's number in `csrc/transformer_inference/between.h`, for who calls the op itself.

    Raises:
        OpError: there is no such activation.
    """
    try:
        return _ACTIVATION_NUMBERS[name]
    except KeyError:
        raise OpError(f"there is no activation {name!r}; there are {', '.join(_ACTIVATION_NUMBERS)}") from None
