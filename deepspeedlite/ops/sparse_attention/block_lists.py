"""Which blocks of an attention's scores are kept, as lists: what kernels read, and worth keeping of a layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepspeedlite.runtime.errors import OpError, UnsupportedError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLists:
    """A layout of blocks, by rows and by columns. Make one with `of` or `of_block_mask`, once for many calls.

    Attributes:
        block: queries, and keys, of a block.
        batches: 1, or the batch's size where every sequence has a layout of its own.
        heads: 1, or the number of heads where every head has.
        rows: blocks of queries; `columns` blocks of keys.
        columns: as `rows`.
        starts: int32, `[batches * heads * rows + 1]`: where in `blocks` each row begins.
        blocks: int32, `[kept]`: the columns of a row's blocks, ascending.
        column_starts: the same by columns, with rows in `column_blocks`.
        column_blocks: as `blocks`.
        partial: int32, `[kept]`: which of `masks` a block has, or -1; None where no block has one.
        column_partial: the same beside `column_blocks`.
        masks: bool, `[some, block, block]`: what is seen of a block that is not seen as a whole.
    """

    block: int
    batches: int
    heads: int
    rows: int
    columns: int
    starts: Tensor
    blocks: Tensor
    column_starts: Tensor
    column_blocks: Tensor
    partial: Tensor | None = None
    column_partial: Tensor | None = None
    masks: Tensor | None = None

    @classmethod
    def of(cls, layout: Tensor, block: int) -> BlockLists:
        """Of a layout `[rows, columns]`, `[heads or 1, rows, columns]` or `[batch or 1, heads or 1, rows, columns]`.

        Args:
            layout: bool or numbers; a block is kept where it is not 0.
            block: 16, 32, 64 or 128.

        Raises:
            OpError: of another shape or block size.
        """
        if block not in BLOCK_SIZES:
            raise OpError(f"sparse_attention: block={block} is none of {', '.join(map(str, BLOCK_SIZES))}")
        if not 2 <= layout.dim() <= 4 or not layout.numel():
            raise OpError(
                f"sparse_attention: a layout of shape {list(layout.shape)}; it must be [rows, columns] of blocks, with "
                "heads before them, or batch and heads"
            )
        return cls._of(layout[(None,) * (4 - layout.dim())] != 0, block)

    @classmethod
    def of_block_mask(cls, block_mask: BlockMask) -> BlockLists:
        """Of a FlexAttention `BlockMask`; its `mask_mod` is asked for the positions of its partial blocks alone.

        (torch.nn.attention.flex_attention.create_block_mask; a `score_mod` has no counterpart here.)

        Raises:
            UnsupportedError: its blocks are not square, of a size that kernels lack, or do not divide the lengths.
        """
        size, (queries, keys) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
        block = size[0]
        if size[1] != block or block not in BLOCK_SIZES or queries % block or keys % block:
            raise UnsupportedError(
                f"sparse_attention: a BlockMask of blocks {tuple(size)} for {queries} queries and {keys} keys; blocks "
                f"must be squares of {', '.join(map(str, BLOCK_SIZES))} that divide both"
            )
        partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = torch.zeros_like(partial)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        at = partial.nonzero()
        masks = _seen(block_mask.mask_mod, at, block)
        whole, empty = masks.flatten(1).all(-1), ~masks.flatten(1).any(-1)
        number = torch.full(partial.shape, -1, dtype=torch.int32, device=partial.device)
        odd = ~(whole | empty)
        number[tuple(at[odd].T)] = torch.arange(int(odd.sum()), dtype=torch.int32, device=partial.device)
        full[tuple(at[whole].T)] = True
        return cls._of(full | (number >= 0), block, number, masks[odd])

    @classmethod
    def _of(cls, kept: Tensor, block: int, number: Tensor | None = None, masks: Tensor | None = None) -> BlockLists:
        if masks is None or number is None or not len(masks):
            number = masks = None
        starts, blocks = _lists(kept)
        column_starts, column_blocks = _lists(kept.mT)
        return cls(
            block=block,
            batches=kept.shape[0],
            heads=kept.shape[1],
            rows=kept.shape[2],
            columns=kept.shape[3],
            starts=starts,
            blocks=blocks,
            column_starts=column_starts,
            column_blocks=column_blocks,
            partial=None if number is None else number[kept],
            column_partial=None if number is None else number.mT[kept.mT],
            masks=None if masks is None else masks.contiguous(),
        )

    @property
    def density(self) -> float:
        """The share of blocks that are kept."""
        return self.blocks.numel() / (self.batches * self.heads * self.rows * self.columns)

    @property
    def layout(self) -> Tensor:
        """Bool, `[batches, heads, rows, columns]`."""
        kept = torch.zeros(
            self.batches * self.heads * self.rows, self.columns, dtype=torch.bool, device=self.blocks.device
        )
        kept[self._row_of_each, self.blocks.long()] = True
        return kept.view(self.batches, self.heads, self.rows, self.columns)

    @property
    def seen(self) -> Tensor:
        """Bool, `[batches, heads, queries, keys]`: the layout position by position. For small ones."""
        found = self.layout.repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)
        if self.partial is None or self.masks is None:
            return found
        tiles = found.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block)).transpose(-2, -3).flatten(0, 2)
        has = self.partial >= 0
        tiles[self._row_of_each[has], self.blocks[has].long()] = self.masks[self.partial[has].long()]
        split = tiles.view(self.batches, self.heads, self.rows, self.columns, self.block, self.block)
        return split.transpose(-2, -3).flatten(-2).flatten(2, 3)

    def to(self, device: torch.device) -> BlockLists:
        """These lists on a device; themselves where they are there."""
        if self.blocks.device == device:
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def to_block_mask(self) -> BlockMask:
        """The same for FlexAttention: full blocks, and partial ones where not all positions are seen.

        Its `mask_mod` knows the whole layout, since FlexAttention asks nothing else where it is not compiled.
        """
        from torch.nn.attention.flex_attention import BlockMask

        kept, block, batches, heads = self.layout, self.block, self.batches, self.heads
        number, masks = (
            torch.full(kept.shape, -1, dtype=torch.int64, device=kept.device),
            kept.new_ones(1, block, block),
        )
        if self.partial is not None and self.masks is not None:
            number[kept] = self.partial.long()
            masks = self.masks
        partial = number >= 0

        def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            of = (b % batches, h % heads, q_idx // block, kv_idx // block)
            return kept[of] & (~partial[of] | masks[number[of].clamp(min=0), q_idx % block, kv_idx % block])

        return BlockMask.from_kv_blocks(
            *_ordered(partial),
            *_ordered(kept & ~partial),
            BLOCK_SIZE=self.block,
            mask_mod=seen,
            seq_lengths=(self.rows * self.block, self.columns * self.block),
        )

    @property
    def _row_of_each(self) -> Tensor:
        """int64, `[kept]`: the row of each block, counted through all lists."""
        return torch.repeat_interleave(self.starts.diff().long())


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row begins, and the columns of all."""
    counts = kept.sum(-1).flatten()
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=kept.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return starts, kept.nonzero()[:, -1].to(torch.int32)


def _dense(counts: Tensor, indices: Tensor) -> Tensor:
    """FlexAttention's counts `[B, H, rows]` and indices `[B, H, rows, columns]` as a bool layout."""
    places = torch.arange(indices.shape[-1], device=indices.device)
    used = places < counts.unsqueeze(-1)
    kept = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool, device=indices.device)
    kept.scatter_(-1, torch.where(used, indices.long(), indices.shape[-1]), True)
    return kept[..., :-1].contiguous()


def _ordered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """What `_dense` takes."""
    order = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)
    return kept.sum(-1).to(torch.int32), order.to(torch.int32)


def _seen(mask_mod: Any, at: Tensor, block: int) -> Tensor:
    """What a mask_mod says of the positions of blocks at `[some, (batch, head, row, column)]`."""
    if not len(at):
        return torch.zeros(0, block, block, dtype=torch.bool, device=at.device)
    inside = torch.arange(block, device=at.device)
    of_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    of_block = torch.vmap(of_keys, in_dims=(None, None, 0, None))
    each = torch.vmap(of_block)(at[:, 0], at[:, 1], at[:, 2:3] * block + inside, at[:, 3:] * block + inside)
    return each.to(torch.bool).expand(len(at), block, block)
