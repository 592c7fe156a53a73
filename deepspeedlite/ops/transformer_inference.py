"""What stands between a transformer's products when it generates: norms, positions, the cache, attention, gates.

Each function is one kernel where the op `transformer_inference` can be had, and plain torch (`inference_reference`)
where not. All take float32, bfloat16 and float16, compute in float32, and have no gradients.
"""

from __future__ import annotations

from torch import Tensor

from deepspeedlite.ops import inference_reference as reference
from deepspeedlite.ops.packed_linear import PackedLinear
from deepspeedlite.runtime.errors import OpError

__all__ = ["PackedLinear", "activate", "activations", "add_norm", "decode_attention", "gated", "rotary_to_cache"]

_KINDS = ("rms", "layer")


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
    return reference.decode_attention(
        q, keys, values, length, scale=scale, mask=mask, slopes=slopes, softcap=softcap, window=window
    )


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of every number, in x's dtype.

    Raises:
        OpError: there is no such activation.
    """
    _check_activation(activation)
    return reference.activate(x, activation)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`[..., 2 * inter]` -> `[..., inter]`: the activation of the first half, times the second.

    Raises:
        OpError: there is no such activation.
    """
    _check_activation(activation)
    return reference.gated(gate_up, activation)


def _check_activation(name: str) -> None:
    if name not in reference.ACTIVATIONS:
        raise OpError(f"there is no activation {name!r}; there are {', '.join(reference.ACTIVATIONS)}")
