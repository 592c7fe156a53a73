"""Which blocks of the attention matrix are computed: DeepSpeed's patterns, each a predicate over rows and columns.

A layout is an int64 tensor `[heads, L / block, L / block]` on the CPU: 1 where a block of queries (row) sees a block of
keys (column). A pattern says so in `visible`, for all rows and columns of a head at once; `make_layout` does what is
common. Layouts depend on the arguments alone, so every rank and every run makes the same ones without asking others.
Patterns of one's own derive from `SparsityConfig` and have a `visible`, or a `make_layout` as DeepSpeed's did.

Papers: Child et al. 2019 (fixed, arXiv:1904.10509), Beltagy et al. 2020 (Longformer, arXiv:2004.05150), Zaheer et al.
2020 (BigBird, arXiv:2007.14062).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_once

DIRECTIONS = ("bidirectional", "unidirectional")


class SparsityConfig:
    """What all patterns share.

    Args:
        num_heads: heads of the layer.
        block: queries, and keys, of a block.
        different_layout_per_head: whether heads have layouts of their own, where the pattern can tell them apart.

    Attributes:
        num_layout_heads: the layouts that are made; all heads share one unless `different_layout_per_head`.
        attention: "unidirectional" where no block sees a later one (each pattern's own argument). Inside a block of the
            diagonal all is visible: mask single tokens by `causal=True` or an `attn_mask`.
    """

    attention = "bidirectional"

    def __init__(self, num_heads: int, block: int = 16, different_layout_per_head: bool = False) -> None:
        self.num_heads = num_heads
        self.block = block
        self.different_layout_per_head = different_layout_per_head
        self.num_layout_heads = num_heads if different_layout_per_head else 1

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Which blocks head number `head` computes: bool `[n, n]`, from the numbers `row` [n, 1] and `column` [1, n].

        Blocks after the diagonal of a unidirectional pattern are taken away by `make_layout`.
        """
        raise UnsupportedError(
            f"{type(self).__name__} is no pattern: use FixedSparsityConfig or another one, or define visible() or "
            "make_layout() in a class of your own"
        )

    def make_layout(self, seq_len: int) -> torch.Tensor:
        """The layout of sequences of `seq_len` tokens: int64 `[num_heads, n, n]`, n = seq_len / block.

        Raises:
            ConfigError: (a ValueError) the length is no multiple of the block, or too short for the pattern.
        """
        layout = self.setup_layout(seq_len)
        blocks = torch.arange(layout.shape[1], device="cpu")  # also where a model is built on the meta device
        row, column = blocks[:, None], blocks[None, :]
        for head in range(self.num_layout_heads):
            seen = self.visible(head, row, column)
            layout[head] = seen & (column <= row) if self.attention == "unidirectional" else seen
        return self.check_and_propagate_first_head_layout(layout)

    def setup_layout(self, seq_len: int) -> torch.Tensor:
        """A layout of `seq_len` tokens with no block in it."""
        if seq_len % self.block or seq_len <= 0:
            raise ConfigError(f"a sequence of {seq_len} tokens is no multiple of block={self.block}; pad it to one")
        blocks = seq_len // self.block
        return torch.zeros(self.num_heads, blocks, blocks, dtype=torch.int64, device="cpu")

    def check_and_propagate_first_head_layout(self, layout: torch.Tensor) -> torch.Tensor:
        """The layout, with the first head's copied to all others where they share one."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout

    def _directed(self, attention: str, horizontal: bool = False) -> str:
        """`attention`, checked; DeepSpeed's error for another word is a NotImplementedError."""
        if attention not in DIRECTIONS:
            raise _DirectionError(f"attention={attention!r}; it is one of {', '.join(DIRECTIONS)}")
        if horizontal and attention != "bidirectional":
            raise ConfigError(
                "horizontal_global_attention lets blocks see later ones; it needs attention='bidirectional'"
            )
        return attention


class _DirectionError(ConfigError, NotImplementedError):
    """DeepSpeed's error for an unknown direction, and ours."""


class DenseSparsityConfig(SparsityConfig):
    """Every block: dense attention, to compare with."""

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Every block."""
        return torch.ones(row.numel(), column.numel(), dtype=torch.bool, device="cpu")


class FixedSparsityConfig(SparsityConfig):
    """Windows of blocks that see themselves, and blocks of each window that all others see.

    Args:
        num_local_blocks: blocks of a window; windows do not overlap, and the last may be short.
        num_global_blocks: consecutive blocks that represent a window; it divides `num_local_blocks`.
        attention: "bidirectional" or "unidirectional".
        horizontal_global_attention: whether those that represent a window see all blocks, too.
        num_different_global_patterns: head h takes the (1 + h mod this)-th group from a window's end; over 1 it needs
            `different_layout_per_head`.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        if num_global_blocks < 1 or num_local_blocks % num_global_blocks:
            raise ConfigError(f"{num_global_blocks=} does not divide {num_local_blocks=}")
        groups = num_local_blocks // num_global_blocks
        if num_different_global_patterns > 1 and not different_layout_per_head:
            raise ConfigError(f"{num_different_global_patterns=} needs different_layout_per_head=True")
        if num_different_global_patterns > groups:
            raise ConfigError(
                f"{num_different_global_patterns=}, but a window of {num_local_blocks} blocks has {groups} groups of "
                f"{num_global_blocks}"
            )
        self.num_local_blocks = num_local_blocks
        self.num_global_blocks = num_global_blocks
        self.attention = self._directed(attention, horizontal_global_attention)
        self.horizontal_global_attention = horizontal_global_attention
        self.num_different_global_patterns = num_different_global_patterns

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Blocks of the same window, and those that represent one."""
        window = self.num_local_blocks
        seen = (row // window == column // window) | self._represents(head, column, column.numel())
        return seen | self._represents(head, row, row.numel()) if self.horizontal_global_attention else seen

    def _represents(self, head: int, block: torch.Tensor, count: int) -> torch.Tensor:
        """Whether a block stands for its window among `count` blocks; in a short last window at its end if need be."""
        window, group = self.num_local_blocks, self.num_global_blocks
        first = window - (1 + head % self.num_different_global_patterns) * group
        whole = count - count % window
        short_first = min(whole + first, count - group)
        in_whole = (block < whole) & (block % window >= first) & (block % window < first + group)
        in_short = (block >= short_first) & (block < short_first + group)
        return in_whole | in_short if whole < count else in_whole


class _GlobalBlocks:
    """Blocks that are named: `starts[i]` alone, or from `starts[i]` up to `ends[i]`, which is not one of them."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int] | None) -> None:
        if ends is not None and len(starts) != len(ends):
            raise ConfigError(
                f"global_block_indices has {len(starts)} entries, and global_block_end_indices {len(ends)}"
            )
        self.ranges = [(start, start + 1) for start in starts] if ends is None else list(zip(starts, ends, strict=True))
        for start, end in self.ranges:
            if not 0 <= start < end:
                raise ConfigError(f"global blocks from {start} up to {end} are none; count from the first, 0")

    def has(self, block: torch.Tensor) -> torch.Tensor:
        """Whether a block is one of them."""
        found = torch.zeros_like(block, dtype=torch.bool)
        for start, end in self.ranges:
            found |= (block >= start) & (block < end)
        return found


class _Random:
    """For each row of blocks some others, drawn from the seed and the head alone."""

    def __init__(self, per_row: int, seed: int) -> None:
        self.per_row = per_row
        self.seed = seed

    def draw(self, head: int, count: int, unidirectional: bool) -> torch.Tensor:
        """In each row of `[count, count]` `per_row` different columns; where earlier ones are fewer, all of them."""
        if self.per_row > count:
            raise ConfigError(f"num_random_blocks={self.per_row}, and a row has {count} blocks")
        # torch's generator for the CPU gives the same numbers on all machines; heads must not share theirs.
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + head)
        rows = torch.arange(count, device="cpu")
        size = rows + 1 if unidirectional else torch.full_like(rows, count)
        chosen = torch.zeros(count, count, dtype=torch.bool, device="cpu")
        # Floyd's sampling without repeats (Bentley 1987, doi:10.1145/30401.315746), for all rows at once.
        for step in range(self.per_row):
            last = size - self.per_row + step  # below 0 in rows that have fewer: they need fewer steps
            share = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
            drawn = (share * (last + 1)).long().clamp(min=0)
            drawn = torch.where(chosen[rows, drawn], last, drawn)
            chosen[rows[last >= 0], drawn[last >= 0]] = True
        return chosen


class VariableSparsityConfig(SparsityConfig):
    """Windows of various sizes, named blocks that all others see, and random ones.

    Args:
        num_random_blocks: random blocks in each row.
        local_window_blocks: blocks of the first window, of the second, and so on; the last size repeats to the end.
        global_block_indices: blocks that all others see; those past the end of a sequence do not count.
        global_block_end_indices: where given, each index is the start of a range and this its end (exclusive).
        attention: "bidirectional" or "unidirectional".
        horizontal_global_attention: whether those blocks see all others, too.
        seed: random blocks change with it, and with nothing else.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Iterable[int] = (4,),
        global_block_indices: Iterable[int] = (0,),
        global_block_end_indices: Iterable[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = num_random_blocks
        self.local_window_blocks = list(local_window_blocks)
        if min(self.local_window_blocks, default=0) < 1:
            raise ConfigError(f"local_window_blocks={self.local_window_blocks} is no list of sizes of at least 1")
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = None if global_block_end_indices is None else list(global_block_end_indices)
        self.attention = self._directed(attention, horizontal_global_attention)
        self.horizontal_global_attention = horizontal_global_attention
        self.seed = seed
        _GlobalBlocks(self.global_block_indices, self.global_block_end_indices)  # says what is wrong with them now

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Blocks of the same window, named ones and random ones."""
        shared = _GlobalBlocks(self.global_block_indices, self.global_block_end_indices)
        seen = (self._window(row) == self._window(column)) | shared.has(column)
        if self.horizontal_global_attention:
            seen = seen | shared.has(row)
        one_way = self.attention == "unidirectional"
        return seen | _Random(self.num_random_blocks, self.seed).draw(head, column.numel(), one_way)

    def _window(self, block: torch.Tensor) -> torch.Tensor:
        """The number of a block's window."""
        ends = list(accumulate(self.local_window_blocks))
        listed = torch.bucketize(block, torch.tensor(ends, device="cpu"), right=True)
        return torch.where(block < ends[-1], listed, len(ends) + (block - ends[-1]) // self.local_window_blocks[-1])


class _Sliding(SparsityConfig):
    """What patterns with a sliding window share: a block sees those at most `num_sliding_window_blocks // 2` away."""

    num_sliding_window_blocks: int

    def _near(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if column.numel() < self.num_sliding_window_blocks:
            raise ConfigError(
                f"num_sliding_window_blocks={self.num_sliding_window_blocks}, and a row has {column.numel()} blocks"
            )
        return (row - column).abs() <= self.num_sliding_window_blocks // 2


class BigBirdSparsityConfig(_Sliding):
    """A sliding window, the first blocks, which see all and are seen by all, and random blocks.

    Args:
        num_random_blocks: random blocks in each row; unidirectional ones are of those before it.
        num_sliding_window_blocks: blocks of the window, its middle the block itself.
        num_global_blocks: how many of the first blocks.
        attention: "bidirectional" or "unidirectional".
        seed: random blocks change with it, and with nothing else.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = num_random_blocks
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.num_global_blocks = num_global_blocks
        self.attention = self._directed(attention)
        self.seed = seed

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Blocks nearby, the first ones and random ones."""
        count, first = column.numel(), self.num_global_blocks
        if count < first:
            raise ConfigError(f"num_global_blocks={first}, and a row has {count} blocks")
        seen = self._near(row, column) | (row < first) | (column < first)
        one_way = self.attention == "unidirectional"
        return seen | _Random(self.num_random_blocks, self.seed).draw(head, count, one_way)


class BSLongformerSparsityConfig(_Sliding):
    """Longformer in blocks: a sliding window, and named blocks, which see all and are seen by all.

    Args:
        num_sliding_window_blocks: blocks of the window, its middle the block itself.
        global_block_indices: the named blocks; those past the end of a sequence do not count.
        global_block_end_indices: where given, each index is the start of a range and this its end (exclusive).
        attention: "bidirectional" or "unidirectional".
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Iterable[int] = (0,),
        global_block_end_indices: Iterable[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = None if global_block_end_indices is None else list(global_block_end_indices)
        self.attention = self._directed(attention)
        _GlobalBlocks(self.global_block_indices, self.global_block_end_indices)  # says what is wrong with them now

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Blocks nearby, and named ones."""
        shared = _GlobalBlocks(self.global_block_indices, self.global_block_end_indices)
        return self._near(row, column) | shared.has(row) | shared.has(column)


class LocalSlidingWindowSparsityConfig(_Sliding):
    """A sliding window and nothing else.

    Args:
        num_sliding_window_blocks: blocks of the window, its middle the block itself; unidirectional ones, the default,
            have only the half before it.
        attention: "unidirectional" or "bidirectional".
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = "unidirectional",
    ) -> None:
        super().__init__(num_heads, block)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.attention = self._directed(attention)

    def visible(self, head: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Blocks nearby."""
        return self._near(row, column)


# The configuration's `sparse_attention.mode` -> the pattern.
PATTERNS: Mapping[str, type[SparsityConfig]] = {
    "dense": DenseSparsityConfig,
    "fixed": FixedSparsityConfig,
    "variable": VariableSparsityConfig,
    "bigbird": BigBirdSparsityConfig,
    "bslongformer": BSLongformerSparsityConfig,
    "local": LocalSlidingWindowSparsityConfig,
}


def arguments_of(section: Any) -> dict[str, Any]:
    """What the pattern of a configuration's `sparse_attention` section is made with, but for the number of heads.

    Keys that are null are left to the pattern's own defaults; keys of other patterns change nothing, which is said.
    """
    known = inspect.signature(PATTERNS[section.mode]).parameters
    for key in sorted(section.model_fields_set - known.keys() - {"mode"}):
        log_once(f'configuration: sparse_attention.{key}: changes nothing: mode "{section.mode}" does not read it')
    return {key: given for key in known if (given := getattr(section, key, None)) is not None}


def sparsity_of(section: Any, num_heads: int) -> SparsityConfig:
    """The pattern that a configuration's `sparse_attention` section describes, for layers of `num_heads` heads.

    Args:
        section: `engine.sparse_attention()`, or `load_config(...).sparse_attention`.
        num_heads: heads of a layer.

    Raises:
        ConfigError: its keys contradict each other.
    """
    pattern: Any = PATTERNS[section.mode]
    made: SparsityConfig = pattern(num_heads, **arguments_of(section))
    return made
