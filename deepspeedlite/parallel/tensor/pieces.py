"""Which part of a whole tensor a rank keeps: ranges along one dimension, and whether it is kept transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Range = tuple[int, int]


class Piece(NamedTuple):
    """A rank's part of a tensor of `shape`: `ranges` along `dim`; then transposed, if `transposed`."""

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[Range, ...]
    transposed: bool = False

    @property
    def length(self) -> int:
        """Of the part, along `dim`."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Of the part, as it is kept."""
        shape = (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])
        return shape[::-1] if self.transposed else shape

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a tensor: a copy in memory of its own, or a tensor on the meta device of one there."""
        if whole.is_meta:
            return torch.empty(self.kept_shape, dtype=whole.dtype, device="meta")
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        part = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        part = part.t() if self.transposed else part
        return part.contiguous() if part.data_ptr() != whole.data_ptr() or not part.is_contiguous() else part.clone()


def balanced(length: int, size: int) -> list[int]:
    """How many of `length` each of `size` ranks has: as equal as can be, the first ones one more."""
    return [length // size + (rank < length % size) for rank in range(size)]


def own_range(length: int, size: int, rank: int) -> Range:
    """Where a rank's part begins and ends."""
    parts = balanced(length, size)
    return sum(parts[:rank]), sum(parts[: rank + 1])


def of_blocks(lengths: Sequence[Range], offsets: Sequence[int]) -> tuple[Range, ...]:
    """Ranges within blocks that stand one after another, each of which begins at its offset."""
    return tuple((start + offset, stop + offset) for (start, stop), offset in zip(lengths, offsets))
