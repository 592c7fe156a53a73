"""Where tokens stand: tables of rotary cosines and sines, learned positions, ALiBi's slopes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Whose frequencies depend on how long the sequence is: they are asked each time.
_CHANGING = ("dynamic", "longrope")


class RotaryTable:
    """Cosines and sines of a model's own rotary module, by position.

    They are computed once by that module, so every scaling that it knows (linear, Llama 3's, YaRN) is what the model
    was trained with; where the frequencies change with the length, the module is asked in each forward.

    Args:
        module: `module(x, position_ids) -> (cos, sin)`, each `[batch, tokens, rotary_dim]` in x's dtype.
        positions: what the first table is made for; it grows.
        dtype: of the tables.
    """

    def __init__(self, module: nn.Module, positions: int, dtype: torch.dtype) -> None:
        self._module = module
        self._changes = getattr(module, "rope_type", "default") in _CHANGING
        self._dtype = dtype
        self._device = next(iter(module.buffers())).device
        self._positions, self._cos, self._sin = 0, torch.empty(0), torch.empty(0)
        if not self._changes:
            self._grow(positions)

    def __call__(self, position_ids: Tensor | None, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """`[batch or 1, tokens, rotary_dim]` twice. Without `position_ids` positions count from `start`."""
        end = start + tokens
        if self._changes:
            if position_ids is None:
                position_ids = torch.arange(start, end, device=self._device)[None]
            return self._ask(position_ids)
        if end > self._positions:
            self._grow(max(end, 2 * self._positions))
        if position_ids is None:
            return self._cos[None, start:end], self._sin[None, start:end]
        return self._cos[position_ids], self._sin[position_ids]

    @torch.no_grad()
    def _ask(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.empty(0, dtype=self._dtype, device=self._device)
        return self._module(x, position_ids)

    def _grow(self, positions: int) -> None:
        cos, sin = self._ask(torch.arange(positions, device=self._device)[None])
        self._positions, self._cos, self._sin = positions, cos[0], sin[0]


def counted_positions(start: int, tokens: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """`[batch or 1, tokens]`: places among the tokens that are no padding (-1 at padding), or from `start` on."""
    if padding is None:
        return torch.arange(start, start + tokens, device=device)[None]
    counted = padding.long()
    return (counted.cumsum(-1) * counted - 1)[:, start:]


def learned_positions(table: Any, position_ids: Tensor, offset: int) -> Tensor:
    """`[batch or 1, tokens, hidden]`."""
    return F.embedding(position_ids + offset if offset else position_ids, table.weight)


def alibi_slopes(heads: int) -> Tensor:
    """`[heads]` of ALiBi (Press et al. 2021, arXiv:2108.12409, section 3): a geometric series.

    For a number of heads that is no power of two, the series of the power below it, then every other one of twice as
    many.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / below) for head in range(heads - below)]
    return torch.tensor(slopes)
