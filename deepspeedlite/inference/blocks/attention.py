"""Attention of fused blocks: what one forward knows of positions and masks, and prompts through torch's attention.

A decode step (one to eight tokens) is one kernel over the cache. Prompts are torch's `scaled_dot_product_attention`,
which needs no mask where there is no padding and nothing in the cache yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.inference.blocks.parts import Geometry
from deepspeedlite.ops.transformer_inference import decode_attention

# What the kernel of decode steps takes; more are a prompt.
MOST_DECODED = 8


class Step:
    """What one forward does to every block: where its tokens stand, and what they may see.

    Attributes:
        start: positions that are in the cache already, of all sequences of the batch.
        length: and with this forward's `tokens`.
        cos: `[batch or 1, tokens, rotary_dim]` with `sin`, or None.
        rotary_dim: the numbers of a head that are turned.
        padding: bool `[batch, length]`, True where there is a token; None where there is one everywhere.
        whole: a mask `[batch or 1, heads or 1, tokens, length or more]`, bool or added to scores, in place of all
            else.
        slopes: `[heads]`, of ALiBi.
    """

    def __init__(
        self,
        start: int,
        tokens: int,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        padding: Tensor | None = None,
        whole: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        self.start, self.tokens, self.length = start, tokens, start + tokens
        self.cos: Tensor | None = None if rotation is None else rotation[0]
        self.sin: Tensor | None = None if rotation is None else rotation[1]
        self.rotary_dim = 0 if self.cos is None else self.cos.shape[-1]
        self.padding, self.whole, self.slopes = padding, whole, slopes
        self.is_decode = tokens <= MOST_DECODED and whole is None
        if padding is not None and self.is_decode:
            # Where padding is on its right, positions in the cache are not those that ALiBi counts; and of several
            # tokens one may be padding that sees nothing.
            self.is_decode = tokens == 1 and (slopes is None or not _has_gaps(padding))
        # For each window that a block has: the same for all of its kind.
        self._masks: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def mask(self, window: int, like: Tensor) -> Tensor | None:
        """For torch's attention: bool, or in `like`'s dtype to be added; None where a causal mask says it all."""
        key = (window, like.dtype)
        if key not in self._masks:
            self._masks[key] = self._mask(window, like)
        return self._masks[key]

    def _mask(self, window: int, like: Tensor) -> Tensor | None:
        if self.whole is not None:
            return self._of_whole(window, like)
        narrow = window if 0 < window < self.length else 0
        if self.start == 0 and self.padding is None and not narrow and self.slopes is None:
            return None
        mask = self._seen(narrow, like.device)
        if self.padding is not None:
            mask = mask & self.padding[:, None, None, :]
            mask = self._never_empty(mask)
        return mask if self.slopes is None else self._biased(mask, like)

    def _seen(self, window: int, device: torch.device) -> Tensor:
        """`[tokens, length]`: keys that are no later than the query, and in its window."""
        queries = torch.arange(self.start, self.length, device=device)[:, None]
        keys = torch.arange(self.length, device=device)
        seen = keys <= queries
        return seen & (keys > queries - window) if window else seen

    def _never_empty(self, mask: Tensor) -> Tensor:
        """Padding that sees nothing sees itself: a softmax over nothing is NaN, and that times 0 is NaN later."""
        queries = torch.arange(self.start, self.length, device=mask.device)[:, None]
        itself = queries == torch.arange(self.length, device=mask.device)
        return mask | (itself & ~mask.any(-1, keepdim=True))

    def _biased(self, mask: Tensor, like: Tensor) -> Tensor:
        """ALiBi's bias, by a key's place among the tokens of its sequence, and minus infinity where it is not seen."""
        assert self.slopes is not None
        if self.padding is None:
            places = torch.arange(self.length, device=like.device)[None]
        else:
            counted = self.padding.long()
            places = (counted.cumsum(-1) - 1) * counted
        bias = (self.slopes[:, None] * places[:, None, :]).to(like.dtype)[:, :, None, :]
        return bias.masked_fill(~mask, float("-inf"))

    def _of_whole(self, window: int, like: Tensor) -> Tensor:
        assert self.whole is not None
        mask = self.whole[..., : self.length]
        if mask.dtype == torch.bool:
            mask = self._never_empty(mask)
        if window:
            seen = self._seen(window, like.device)
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        if self.slopes is not None:
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            return self._biased(mask, like)
        return mask if mask.dtype == torch.bool else mask.to(like.dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, step: Step, geometry: Geometry) -> Tensor:
    """`[batch, tokens, heads * dim]` of q `[batch, heads, tokens, dim]` over a cache `[batch, kv_heads, most,
    dim]`.
    """
    if step.is_decode:
        return decode_attention(
            *(q, keys, values, step.length),
            scale=geometry.scale,
            mask=step.padding,
            slopes=step.slopes,
            softcap=geometry.softcap,
            window=geometry.window,
        )
    seen_keys, seen_values = keys[:, :, : step.length], values[:, :, : step.length]
    return whole_attention(q, seen_keys, seen_values, step.mask(geometry.window, q), geometry)


def whole_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, geometry: Geometry, *, is_causal: bool = True
) -> Tensor:
    """As `attend`, through torch, over all keys. `is_causal` is what a mask of None means."""
    if geometry.softcap:
        attended = _capped(q, keys, values, mask, geometry)
    else:
        attended = F.scaled_dot_product_attention(
            *(q, keys, values, mask),
            is_causal=mask is None and is_causal,
            scale=geometry.scale,
            enable_gqa=geometry.heads != geometry.kv_heads,
        )
    return attended.transpose(1, 2).flatten(2)


def _capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, geometry: Geometry) -> Tensor:
    """With scores that are softly capped, which torch's attention does not have."""
    groups = geometry.heads // geometry.kv_heads
    keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    scores = (q @ keys.transpose(-1, -2)) * geometry.scale
    scores = torch.tanh(scores / geometry.softcap) * geometry.softcap
    if mask is None:
        tokens, length = scores.shape[-2:]
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values


def packed_mask(position_ids: Tensor) -> Tensor | None:
    """A whole mask for several texts in one sequence, each of which begins where positions do not count on; or None.

    Args:
        position_ids: `[batch, tokens]`.
    """
    begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if not bool(begins.any()):
        return None
    text = begins.cumsum(-1)
    tokens = text.shape[-1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=text.device).tril()
    return (text[:, None, :, None] == text[:, None, None, :]) & causal


def _has_gaps(padding: Tensor) -> bool:
    """Whether padding follows a token."""
    return bool((padding[:, 1:] < padding[:, :-1]).any())
