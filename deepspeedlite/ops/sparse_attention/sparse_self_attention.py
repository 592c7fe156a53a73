"""`SparseSelfAttention`: attention of queries, keys and values under a pattern, with DeepSpeed's masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from deepspeedlite.ops.sparse_attention.block_lists import BlockLists
from deepspeedlite.ops.sparse_attention.function import sparse_attention
from deepspeedlite.ops.sparse_attention.sparsity_config import FixedSparsityConfig, SparsityConfig
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_once

MODES = ("add", "mul")


class SparseSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(dim) + rpe + masks) v over the blocks of a pattern; the others are never computed.

    Args:
        sparsity_config: the pattern; FixedSparsityConfig(num_heads=4) if left out.
        key_padding_mask_mode: "add": the mask is added to the scores as it is; "mul": keys where it is 0 are hidden.
        attn_mask_mode: likewise of `attn_mask`.
        max_seq_length: the longest sequence; a multiple of the pattern's block. Shorter ones see the first blocks of
            its layout.
        mpu: taken for GPT-NeoX's sake, which lets it spread the layout; ranks make the same one anyway.
        dropout_p: the share of attention weights that are dropped in training.
        causal: whether a token sees none after it, inside the diagonal's blocks too; without an `attn_mask` of L x L.

    Attributes:
        master_layout: a buffer, bool `[heads, n, n]` for `max_seq_length` tokens. It is saved with the module, so that
            a model that was trained with random blocks keeps its own, DeepSpeed's too.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
        mpu: Any = None,
        *,
        dropout_p: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, mode in (("key_padding_mask_mode", key_padding_mask_mode), ("attn_mask_mode", attn_mask_mode)):
            if mode not in MODES:
                raise ConfigError(f"{name}={mode!r}; it is one of {', '.join(MODES)}")
        self.sparsity_config = sparsity_config if sparsity_config is not None else FixedSparsityConfig(num_heads=4)
        self.key_padding_mask_mode = key_padding_mask_mode
        self.attn_mask_mode = attn_mask_mode
        self.dropout_p = dropout_p
        self.causal = causal
        self.master_layout: Tensor
        self.register_buffer("master_layout", self.sparsity_config.make_layout(max_seq_length).bool())
        self._lists: dict[int, BlockLists] = {}  # by the length of a sequence; of the layout as it is now

    def get_layout(self, L: int) -> Tensor:  # noqa: N803  DeepSpeed's name
        """The layout of sequences of `L` tokens: bool `[heads, L / block, L / block]` on the CPU.

        Raises:
            ConfigError: (a ValueError) `L` is no multiple of the block, or more than `max_seq_length`.
        """
        block = self.sparsity_config.block
        blocks, rest = divmod(L, block)
        if rest:
            raise ConfigError(
                f"a sequence of {L} tokens is no multiple of block={block}; pad it, as by "
                "SparseAttentionUtils.pad_to_block_size"
            )
        if blocks > self.master_layout.shape[-1]:
            longest = self.master_layout.shape[-1] * block
            raise ConfigError(f"a sequence of {L} tokens, and max_seq_length={longest}; make the module with more")
        return self.master_layout[:, :blocks, :blocks].cpu()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The context, `[batch, heads, L, dim]` as `query`.

        Args:
            query: `[batch, heads, L, dim]`.
            key: likewise, or with the last two dimensions the other way round.
            value: as `query`.
            rpe: relative position bias, `[batch or 1, heads, L, L]`, added to the scaled scores.
            key_padding_mask: `[batch, L]`, or with dimensions of 1 between; or `[batch, heads, L]`.
            attn_mask: `[L, L]`, or with dimensions of 1 before.

        Raises:
            ConfigError: a length that does not fit the layout.
            UnsupportedError: keys or values of another shape than the queries.
        """
        batch, heads, length, _ = query.shape
        if key.shape[2] != length:
            key = key.transpose(2, 3)
        if key.shape != query.shape or value.shape != query.shape:
            raise UnsupportedError(
                f"queries {[*query.shape]}, keys {[*key.shape]}, values {[*value.shape]}: block-sparse attention is "
                "self-attention, in which all have one shape"
            )
        if key_padding_mask is not None:
            by_head = tuple(key_padding_mask.shape) == (batch, heads, length)
            shape = (batch, heads, length) if by_head else (batch, length)
            key_padding_mask = _flat(key_padding_mask, self.key_padding_mask_mode, shape)
        if attn_mask is not None:
            attn_mask = _flat(attn_mask, self.attn_mask_mode, (length, length))
        return sparse_attention(
            query,
            key,
            value,
            self._lists_of(length, query.device),
            self.sparsity_config.block,
            rpe=rpe,
            key_padding_mask=key_padding_mask,
            key_padding_mask_mode=self.key_padding_mask_mode,
            attn_mask=attn_mask,
            attn_mask_mode=self.attn_mask_mode,
            causal=self.causal,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def _lists_of(self, length: int, device: torch.device) -> BlockLists:
        if length not in self._lists:
            layout = self.get_layout(length)
            shared = torch.equal(layout, layout[:1].expand_as(layout))  # one list for all heads is quicker to read
            lists = BlockLists.of(layout[:1] if shared else layout, self.sparsity_config.block)
            self._lists[length] = lists.to(device)
        return self._lists[length]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._lists.clear()  # another layout may have come


def _flat(mask: Tensor, mode: str, shape: tuple[int, ...]) -> Tensor:
    """A mask of these dimensions, as DeepSpeed reads one: where masks are added, True is 1."""
    if mask.numel() != math.prod(shape):
        raise ConfigError(f"a mask of shape {[*mask.shape]}, where one of {[*shape]} is meant")
    if mask.dtype == torch.bool and mode == "add":
        log_once('a mask of true and false adds 1 and 0 to the scores and hides nothing; make the module with "mul"')
        mask = mask.float()
    return mask.reshape(shape)
