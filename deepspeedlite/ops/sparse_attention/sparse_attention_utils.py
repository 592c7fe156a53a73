"""`SparseAttentionUtils`: what gives a BERT or RoBERTa of transformers sparse attention and long inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deepspeedlite.ops.sparse_attention.bert_sparse_self_attention import EncoderSparseSelfAttention
from deepspeedlite.ops.sparse_attention.sparsity_config import FixedSparsityConfig, SparsityConfig
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_dist

# RoBERTa's positions begin after its padding's.
_RESERVED = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}

Model = TypeVar("Model", bound=nn.Module)
Layers = TypeVar("Layers", bound=Iterable[nn.Module])


class SparseAttentionUtils:
    """Functions, all static."""

    @staticmethod
    def extend_position_embedding(model: Model, max_position: int) -> Model:
        """Give a model `max_position` positions: those it has, again and again. The model itself is changed.

        Raises:
            UnsupportedError: it is neither a BERT nor a RoBERTa.
            ConfigError: it has as many positions already.
        """
        base, reserved = _encoder_of(model)
        table = base.embeddings.position_embeddings
        held = table.weight.shape[0] - reserved
        if max_position <= held:
            raise ConfigError(f"max_position={max_position}, and the model has {held} positions already")
        rows = torch.arange(max_position, device=table.weight.device) % held + reserved
        old = table.weight.detach()
        base.embeddings.position_embeddings = nn.Embedding.from_pretrained(
            torch.cat([old[:reserved], old[rows]]),
            freeze=not table.weight.requires_grad,
            padding_idx=table.padding_idx,
        )
        for name, filled in (("position_ids", torch.arange), ("token_type_ids", torch.zeros)):
            buffer = getattr(base.embeddings, name, None)
            if buffer is not None:  # transformers cut these to the length of the input
                longer = filled(max_position + reserved, dtype=buffer.dtype, device=buffer.device)
                base.embeddings.register_buffer(name, longer.view(1, -1), persistent=False)
        _config_of(model).max_position_embeddings = max_position + reserved
        log_dist(f"positions: {held} -> {max_position}", ranks=[0])
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Tell a tokenizer that inputs of `max_position` tokens are no longer too long."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: Model, max_position: int, sparsity_config: SparsityConfig | None = None
    ) -> Model:
        """Put sparse self-attention into a model's encoder; its projections stay the parameters they were.

        Args:
            model: it is changed, and returned.
            max_position: the longest input. The position embeddings must be as many: `extend_position_embedding`.
            sparsity_config: the pattern; FixedSparsityConfig for the model's heads if left out.

        Raises:
            UnsupportedError: it is neither a BERT nor a RoBERTa, or a decoder.
        """
        base, reserved = _encoder_of(model)
        config = _config_of(model)
        config.max_position_embeddings = max_position + reserved
        SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
            config, base.encoder.layer, sparsity_config
        )
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any, layers: Layers, sparsity_config: SparsityConfig | None = None
    ) -> Layers:
        """Likewise in a list of layers that have `attention.self` with `query`, `key` and `value`.

        Each layer has random blocks of its own, of the pattern's seed and its place in the list.
        """
        pattern = sparsity_config if sparsity_config is not None else FixedSparsityConfig(config.num_attention_heads)
        for place, layer in enumerate(layers):
            attention: Any = layer.attention
            dense = attention.self
            own = copy.copy(pattern)
            if hasattr(own, "seed"):
                own.seed = own.seed + place
            with torch.device("meta"):  # its own projections are never used
                sparse = EncoderSparseSelfAttention(config, own)
            for name in ("query", "key", "value"):
                setattr(sparse, name, getattr(dense, name))
            sparse.sparse_self_attention.to(dense.query.weight.device)
            attention.self = sparse.train(dense.training)
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: Any,
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Pad a batch's sequences to a multiple of the block; what is None stays None, but for a mask that it needs.

        Args:
            block_size: the pattern's `block`.
            input_ids: `[batch, L]`, or None where there are `inputs_embeds`.
            attention_mask: `[batch, L]` of 1 and 0, or `[batch, 1, 1 or L, L]`. Numbers with none above 0 are added to
                scores, so that padding gets the least of their type; of others it gets 0. Made if padding needs one.
            token_type_ids: `[batch, L]`; padding is of type 0.
            position_ids: `[batch, L]`; padding is at `pad_token_id`, as DeepSpeed has it.
            inputs_embeds: `[batch, L, hidden]`; padding is what `model_embeddings` makes of padding tokens.
            pad_token_id: the padding token.
            model_embeddings: makes embeddings of `[batch, padding]` tokens; used with `inputs_embeds` alone.

        Returns:
            How many tokens were added, and the five tensors in the order of the arguments.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ConfigError("pad_to_block_size needs input_ids or inputs_embeds")
        batch, length = given.shape[:2]
        rest = -length % block_size
        if not rest:
            return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        if inputs_embeds is not None:
            padding = given.new_full((batch, rest), pad_token_id, dtype=torch.long)
            inputs_embeds = torch.cat([inputs_embeds, model_embeddings(padding)], dim=1)
        if attention_mask is None:
            attention_mask = given.new_ones((batch, length), dtype=torch.long)
        return (
            rest,
            None if input_ids is None else pad(input_ids, (0, rest), value=pad_token_id),
            _pad_mask(attention_mask, rest),
            None if token_type_ids is None else pad(token_type_ids, (0, rest), value=0),
            None if position_ids is None else pad(position_ids, (0, rest), value=pad_token_id),
            inputs_embeds,
        )

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """`[batch, L, ...]` without the last `pad_len` tokens."""
        return sequence_output[:, : sequence_output.shape[1] - pad_len]


def _config_of(model: Any) -> Any:
    return model.config


def _pad_mask(mask: Tensor, rest: int) -> Tensor:
    added = mask.is_floating_point() and not bool((mask > 0).any())
    hidden = torch.finfo(mask.dtype).min if added else 0
    rows = (0, rest) if mask.dim() == 4 and mask.shape[2] > 1 else ()
    return pad(mask, (0, rest, *rows), value=hidden)


def _encoder_of(model: Any) -> tuple[Any, int]:
    """The part of a model with `embeddings` and `encoder`, and how many rows of its positions are reserved."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    for name, reserved in (("bert", 0), ("roberta", 2)):
        if hasattr(model, name):
            return getattr(model, name), reserved
    if kind in _RESERVED and hasattr(model, "encoder"):
        return model, _RESERVED[kind]
    raise UnsupportedError(f"{type(model).__name__} is neither a BERT nor a RoBERTa; replace attention in its layers")
