"""Self-attention of BERT under a sparsity pattern: DeepSpeed's module, and one for models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deepspeedlite.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
from deepspeedlite.ops.sparse_attention.sparsity_config import FixedSparsityConfig, SparsityConfig
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError

_LENGTH = 2048  # of what DeepSpeed's module takes


class BertSparseSelfAttention(nn.Module):
    """Projections to queries, keys and values, and `SparseSelfAttention` of them.

    Args:
        config: has `hidden_size` and `num_attention_heads`, and may have `max_position_embeddings`.
        sparsity_config: the pattern; FixedSparsityConfig for the model's heads if left out.
        max_seq_length: the longest sequence; 2,048 or the model's positions, whichever is more, if left out.
        dropout_p: the share of attention weights that are dropped in training.

    Raises:
        ConfigError: (a ValueError) the heads do not divide the hidden size, or the pattern is for other heads.
    """

    def __init__(
        self,
        config: Any,
        sparsity_config: SparsityConfig | None = None,
        max_seq_length: int | None = None,
        *,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        heads = config.num_attention_heads
        if config.hidden_size % heads:
            raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={config.hidden_size}")
        pattern = sparsity_config if sparsity_config is not None else FixedSparsityConfig(num_heads=heads)
        if pattern.num_heads != heads:
            raise ConfigError(f"the pattern is for {pattern.num_heads} heads, and the model has {heads}")
        self.num_attention_heads = heads
        self.attention_head_size = config.hidden_size // heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        longest = max_seq_length or max(_LENGTH, getattr(config, "max_position_embeddings", 0))
        self.sparse_self_attention = SparseSelfAttention(
            pattern, max_seq_length=-(-longest // pattern.block) * pattern.block, dropout_p=dropout_p
        )

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """`[batch, L, hidden]` -> `[batch, heads, L, dim]`."""
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The context, `[batch, L, hidden]`.

        Args:
            hidden_states: `[batch, L, hidden]`, L a multiple of the block.
            attention_mask: added to the scores of keys: `[batch, L]`, or with dimensions of 1 between.
        """
        projected = (self.transpose_for_scores(each(hidden_states)) for each in (self.query, self.key, self.value))
        context = self.sparse_self_attention(*projected, key_padding_mask=attention_mask)
        return context.transpose(1, 2).reshape(*hidden_states.shape[:-1], self.all_head_size)


class EncoderSparseSelfAttention(BertSparseSelfAttention):
    """What takes the place of `attention.self` in encoders of transformers: their masks, any length, their dropout."""

    def __init__(
        self, config: Any, sparsity_config: SparsityConfig | None = None, max_seq_length: int | None = None
    ) -> None:
        if getattr(config, "is_decoder", False):
            raise UnsupportedError("is_decoder=True: sparse attention takes the place of an encoder's self-attention")
        super().__init__(config, sparsity_config, max_seq_length, dropout_p=config.attention_probs_dropout_prob)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The context and, where transformers return the attention weights, None: there is no such matrix.

        Args:
            hidden_states: `[batch, L, hidden]`.
            attention_mask: `[batch, L]` of 1 and 0, or what transformers make of one: bool or added numbers,
                `[batch, 1, 1 or L, L]`, whose rows are the same.
            *args: what else models give their attention, which is passed over.
            **kwargs: likewise.
        """
        length = hidden_states.shape[1]
        rest = -length % self.sparse_self_attention.sparsity_config.block
        mask = None if attention_mask is None else _of_keys(attention_mask, hidden_states.dtype)
        if rest:
            if mask is None:
                mask = hidden_states.new_zeros(hidden_states.shape[:2])
            mask = pad(mask, (0, rest), value=-torch.inf)
            hidden_states = pad(hidden_states, (0, 0, 0, rest))
        return super().forward(hidden_states, mask)[:, :length], None


def _of_keys(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of each key, `[batch, L]`, of a mask as transformers have them."""
    if mask.dim() == 4:
        row = mask[:, :1, :1]
        # An expanded mask repeats one row in memory; where there are more, they must be alike.
        if mask.stride(2) and mask.shape[2] > 1 and not torch.equal(row.expand_as(mask), mask):
            raise UnsupportedError("an attention mask that differs between queries; sparse attention takes one of keys")
        mask = row[:, 0, 0]
    if mask.is_floating_point():
        return mask.to(dtype)
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, -torch.inf)
