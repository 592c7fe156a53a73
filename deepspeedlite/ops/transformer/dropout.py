"""Dropout whose mask is made, never kept: a number's fate is a function of a seed, a stream and the number's place.

The bits are Philox4x32-10's (Salmon et al. 2011, SC11): the same on CPUs and GPUs, forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STREAMS = 4  # masks of one layer that one draw is enough for
_LOW = 0xFFFFFFFF


class Dropout(NamedTuple):
    """How numbers are dropped.

    Attributes:
        ratio: of numbers that become 0, from 0 to 1; the others are divided by 1 - ratio.
        seed: 64 bits.
        stream: 64 bits; masks of different streams have nothing in common.
    """

    ratio: float
    seed: int = 0
    stream: int = 0

    def other(self, ratio: float, index: int) -> Dropout:
        """With another ratio and the stream `index` (1 to 3) after this one."""
        return Dropout(ratio, self.seed, self.stream + index)


NO_DROPOUT = Dropout(0.0)


def draw_stream() -> int:
    """A stream of torch's generator of the CPU, and the three after it.

    So `torch.manual_seed` decides on masks, and `torch.utils.checkpoint`, which puts that generator's state back, gets
    the same ones again. Nothing waits for a GPU.
    """
    return int(torch.randint(2**60, (), dtype=torch.int64)) * _STREAMS


def kept(dropout: Dropout, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """What numbers 0 to `numel` are multiplied by, as kernels do: float32 `[numel]` of 0 and 1 / (1 - ratio)."""
    threshold = min(round(dropout.ratio * 2**32), _LOW)
    scale = 0.0 if dropout.ratio == 1 else 1 / (1 - dropout.ratio)
    if threshold == 0:
        return torch.full((numel,), scale, device=device)
    words = _philox(dropout.seed, dropout.stream, torch.arange((numel + 3) // 4, device=device)).view(-1)[:numel]
    return torch.where(words < threshold, 0.0, scale)


def _philox(seed: int, stream: int, blocks: Tensor) -> Tensor:
    """The four words of each block, `[blocks, 4]`: 32 bits in 64-bit integers."""
    a, b = blocks & _LOW, blocks >> 32 & _LOW
    c, d = torch.full_like(a, stream & _LOW), torch.full_like(a, stream >> 32 & _LOW)
    low, high = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # 64 bits, of which the highest counts as a sign
        a, b, c, d = (q >> 32 & _LOW) ^ b ^ low, q & _LOW, (p >> 32 & _LOW) ^ d ^ high, p & _LOW
        low, high = low + 0x9E3779B9 & _LOW, high + 0xBB67AE85 & _LOW
    return torch.stack([a, b, c, d], 1)
