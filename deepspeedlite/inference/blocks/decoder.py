"""The forward of a fused decoder: embeddings, blocks, final norm. The head on top stays the model's own.

transformers builds masks, asks configurations and wraps outputs at each token; here that is done once for each
forward, in as few operations as there can be, since a token of a small model takes few milliseconds in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deepspeedlite.inference.blocks.attention import Step, packed_mask
from deepspeedlite.inference.blocks.block import FusedBlock, final_norm
from deepspeedlite.inference.blocks.decode import DecodePlan
from deepspeedlite.inference.blocks.families import Family
from deepspeedlite.inference.blocks.parts import Norm, find
from deepspeedlite.inference.blocks.positions import RotaryTable, counted_positions, learned_positions
from deepspeedlite.inference.kv_cache import BufferPool, StaticKVCache, StaticKVLayer, layers_of
from deepspeedlite.runtime.errors import UnsupportedError

# transformers called it `past_key_values` until 5.23.
_CACHE = (
    "cache" if any(f.name == "cache" for f in fields(BaseModelOutputWithPastAndCrossAttentions)) else "past_key_values"
)
# What a call may not ask of a fused decoder, and why.
_REFUSED = {
    "output_attentions": "the weights of attention are never whole in a fused block",
    "encoder_hidden_states": "it has no attention to an encoder's states",
}


@dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """What a model's forward is made of, beside its blocks."""

    holder: nn.Module
    family: Family
    blocks: Sequence[FusedBlock]
    pool: BufferPool
    rotary: RotaryTable | None
    norm: Norm | None
    embedding_norm: Norm | None
    slopes: Tensor | None


class FusedDecoder:
    """The forward of the module that holds a decoder's blocks, in place of its own.

    Takes what that one took, by the same names and in the same order, and returns transformers' output.
    """

    def __init__(self, parts: DecoderParts) -> None:
        self._parts = parts
        self._config: Any = parts.holder.config
        # Positional arguments come in the order of the module's own forward.
        self._names = [name for name in inspect.signature(type(parts.holder).forward).parameters if name != "self"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One forward: `last_hidden_state [batch, tokens, hidden]`, the cache, and hidden states where asked for.

        Raises:
            UnsupportedError: the call asks for what fused blocks do not have.
        """
        if torch.compiler.is_compiling():
            # A compiler finds nothing to fuse here, and would look for minutes.
            return torch._dynamo.disable(self._forward)(args, kwargs)
        return self._forward(args, kwargs)

    @torch.no_grad()
    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs.update(zip(self._names, args))
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise UnsupportedError(f"{name} is not to be had of a fused model: {reason}. Do not fuse it")
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        use_cache = kwargs.get("use_cache")
        if cache is None and (self._config.use_cache if use_cache is None else use_cache):
            cache = StaticKVCache(self._parts.pool)
        x = self._embedded(kwargs)
        batch, tokens = x.shape[:2]
        layers = None if cache is None else layers_of(cache, self._parts.pool)
        if layers is not None:
            for layer in layers:
                layer.reserve(batch, tokens)
        x, step = self._placed(x, layers[0].length if layers else 0, kwargs, is_cached=layers is not None)
        wanted = kwargs.get("output_hidden_states")
        states: list[Tensor] | None = [] if (self._config.output_hidden_states if wanted is None else wanted) else None
        x = self._through_blocks(x, step, layers, states)
        ids = kwargs.get("input_ids")
        if ids is not None and ids.dim() > 2:  # choices, which are sequences to the blocks
            x = x.view(*ids.shape, -1)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x, hidden_states=None if states is None else tuple(states), **{_CACHE: cache}
        )
        wants_tuple = kwargs.get("return_dict") is False
        return output.to_tuple() if wants_tuple else output

    def _embedded(self, kwargs: dict[str, Any]) -> Tensor:
        parts, family = self._parts, self._parts.family
        ids, x = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (ids is None) == (x is None):
            raise ValueError("a fused model needs input_ids or inputs_embeds, and not both")
        embedding = find(parts.holder, family.embedding)
        if x is None:
            assert ids is not None
            x = embedding(ids.view(-1, ids.shape[-1]))
        if family.embeds_types and kwargs.get("token_type_ids") is not None:
            x = x + embedding(kwargs["token_type_ids"].view(x.shape[:2]))
        if parts.embedding_norm is not None:
            x = parts.embedding_norm(x)[0]
        project = family.project_in and find(parts.holder, family.project_in)
        return project(x) if project is not None and project else x

    def _placed(self, x: Tensor, start: int, kwargs: dict[str, Any], *, is_cached: bool) -> tuple[Tensor, Step]:
        """The embeddings, with their positions where those are added, and what blocks are to know."""
        parts, family = self._parts, self._parts.family
        tokens = x.shape[1]
        padding, whole = _masks(kwargs.get("attention_mask"), start + tokens)
        places = kwargs.get("position_ids")
        if places is not None:
            places = places[..., -tokens:]
            if not is_cached and padding is None and whole is None and not family.positions_skip_padding:
                whole = packed_mask(places)
        rotation = None
        if parts.rotary is not None:
            rotation = parts.rotary(places, start, tokens)
        elif family.position_table is not None:
            if places is None:
                skip = padding if family.positions_skip_padding else None
                places = counted_positions(start, tokens, skip, x.device)
            x = x + learned_positions(find(parts.holder, family.position_table), places, family.position_offset)
        return x, Step(start, tokens, rotation=rotation, padding=padding, whole=whole, slopes=parts.slopes)

    def _through_blocks(
        self, delta: Tensor, step: Step, layers: list[StaticKVLayer] | None, states: list[Tensor] | None
    ) -> Tensor:
        parts = self._parts
        stream: Tensor | None = None
        if layers is not None and states is None and DecodePlan.fits(parts.blocks, delta, step):
            plan = self._plan(delta, layers)
            delta, stream = plan.run(delta, step)
            # A norm has memory of its own; without one, what is returned would be written over by the next step.
            return self._ended(delta if parts.norm is not None else delta.clone(), stream, step, layers)
        keys, values = self._scratch(delta) if layers is None else (delta, delta)
        for index, block in enumerate(parts.blocks):
            if states is not None:
                states.append(delta if stream is None else delta + stream)
            if layers is not None:
                keys, values = layers[index].buffer_keys, layers[index].buffer_values
            delta, stream = block.forward(delta, stream, step, keys, values)
        x = self._ended(delta, stream, step, layers)
        if states is not None:
            states.append(x)
        return x

    def _plan(self, x: Tensor, layers: list[StaticKVLayer]) -> DecodePlan:
        blocks = self._parts.blocks
        return layers[0].lease.kept(
            x.shape[:2], lambda plan: plan.still_fits(blocks), lambda: DecodePlan(blocks, layers, x)
        )

    def _ended(self, delta: Tensor, stream: Tensor | None, step: Step, layers: list[StaticKVLayer] | None) -> Tensor:
        """The last sum and norm, in memory that is the caller's; what was cached counts from now on."""
        for layer in layers or ():
            layer.advance(step.tokens)
        x = final_norm(self._parts.norm, delta, stream)
        project = self._parts.family.project_out and find(self._parts.holder, self._parts.family.project_out)
        return project(x) if project is not None and project else x

    def _scratch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for one layer's keys and values where nothing is to be cached, for all layers in turn."""
        shape = self._parts.pool.shape
        size = (x.shape[0], max(shape.kv_heads), x.shape[1], shape.head_dim)
        return x.new_empty(size), x.new_empty(size)


def _masks(mask: Any, length: int) -> tuple[Tensor | None, Tensor | None]:
    """`(padding [batch, length], whole mask [batch, heads, tokens, length])` of what was given as attention mask."""
    if isinstance(mask, dict):  # by kind of layer; windows are the blocks' own
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None, None
    if mask.dim() != 2:
        return None, mask
    mask = mask if mask.dtype == torch.bool else mask != 0
    if mask.shape[1] < length:
        raise UnsupportedError(
            f"attention_mask is of {mask.shape[1]} positions, and with those cached there are {length}"
        )
    return mask[:, :length], None
