"""Making a model's blocks fused: whether a row of the table fits, the blocks, and what surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspeedlite.inference.blocks.block import FusedBlock, FusedEncoderBlock
from deepspeedlite.inference.blocks.decoder import DecoderParts, FusedDecoder
from deepspeedlite.inference.blocks.families import BY_HOLDER, Family
from deepspeedlite.inference.blocks.parts import (
    Geometry,
    Norm,
    Packing,
    SplitLinear,
    activation_of,
    find,
    packed_like,
    take_parts,
)
from deepspeedlite.inference.blocks.positions import RotaryTable, alibi_slopes
from deepspeedlite.inference.kv_cache import BufferPool, CacheShape
from deepspeedlite.parallel.tensor import ColumnParallelLinear
from deepspeedlite.runtime.errors import UnsupportedError

# A head's errors go straight into the probabilities, and it is one matrix of many: it is kept with no fewer bits.
_FEWEST_BITS_OF_A_HEAD = 8
# Whose weights are read as those of `nn.Linear`, by class.
_LINEAR = ("Linear", "Conv1D", "ColumnParallelLinear", "RowParallelLinear")
# How an encoder's model makes masks that torch's attention takes.
_MASKS_OF = ("sdpa", "eager")


class Fusion:
    """How one model is fused; see `fuse` for the arguments."""

    def __init__(
        self, *, packing: Packing, max_tokens: int, batch: int, fill: Callable[[nn.Module], None] | None = None
    ) -> None:
        self._packing, self._fill = packing, fill
        self._max_tokens, self._batch = max_tokens, batch

    def fuse_blocks(self, name: str, holder: Any) -> str:
        """Fuse the blocks of one module that holds some; a line about it."""
        family = BY_HOLDER[type(holder).__name__]
        layers = find(holder, family.layers)
        where = f"{name or type(holder).__name__}.{family.layers}"
        reason = misfit(family, holder, layers)
        if reason is None and self._fill is None and any(param.is_meta for param in holder.parameters()):
            reason = "its weights are not loaded"
        if reason is not None:
            return f"{where}: left as it is, since {reason}"
        for index, layer in enumerate(layers):
            self._load(layer)
            parts = take_parts(layer, family, holder.config, self._packing)
            if family.is_encoder:
                _become(layer, FusedEncoderBlock(parts))
            else:
                layers[index] = FusedBlock(parts)
        self._load(holder)
        if family.is_encoder:
            holder.forward = _EncoderForward(holder).forward
        else:
            self._surround(family, holder, layers)
        return f"{where}: {len(layers)} {family.layer} fused"

    def fuse_head(self, model: nn.Module, head: Any) -> list[str]:
        """Pack the product that ends a decoder; a line about it, or none where there is no head."""
        name = next((name for name, module in model.named_modules() if module is head), None)
        if head is None or name is None:
            return []
        if type(head) not in (nn.Linear, ColumnParallelLinear):
            return [f"{name}: left as it is, since it is a {type(head).__name__}"]
        self._load(head)
        bits = self._packing.bits and max(self._packing.bits, _FEWEST_BITS_OF_A_HEAD)
        packing = replace(self._packing, bits=bits)
        parent, _, attribute = name.rpartition(".")
        packed: Any = packed_like(head, head.weight, head.bias, packing)
        product = packed.packed if isinstance(packed, SplitLinear) else packed
        if not bits:
            # An embedding that the head is tied to goes where the head's weight has gone: they are there once.
            head.weight.data = product.weight
        setattr(model.get_submodule(parent), attribute, packed)
        return [f"{name}: packed"]

    def _load(self, module: nn.Module) -> None:
        """Have what is still without values in a module filled."""
        if self._fill is not None:
            self._fill(module)

    def _surround(self, family: Family, holder: Any, blocks: Any) -> None:
        """Give the module that holds the blocks its forward."""
        dtype = self._packing.dtype
        device = blocks[0].qkv.weight.device
        shapes: list[Geometry] = [block.geometry for block in blocks]
        shape = CacheShape(
            kv_heads=tuple(each.kv_heads for each in shapes), head_dim=shapes[0].head_dim, dtype=dtype, device=device
        )
        norm = find(holder, family.final_norm)
        embedding_norm = family.embedding_norm and find(holder, family.embedding_norm)
        parts = DecoderParts(
            holder=holder,
            family=family,
            blocks=blocks,
            pool=BufferPool(shape, batch=self._batch, tokens=self._max_tokens),
            rotary=_rotary_of(family, holder, dtype),
            norm=norm and Norm(norm, dtype, unit_offset=family.unit_offset),
            embedding_norm=Norm(embedding_norm, dtype, unit_offset=False) if embedding_norm else None,
            slopes=_slopes_of(family, holder.config, blocks[0], device),
        )
        holder.forward = FusedDecoder(parts).forward


class _EncoderForward:
    """An encoder's own forward, which must not be asked for what its blocks no longer have."""

    def __init__(self, holder: nn.Module) -> None:
        self._holder = holder

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions"):
            raise UnsupportedError("the weights of attention are never whole in a fused block. Do not fuse the model")
        return type(self._holder).forward(self._holder, *args, **kwargs)


def misfit(family: Family, holder: Any, layers: Any) -> str | None:
    """Why the family's row does not describe these blocks; None where it does."""
    config = holder.config
    if not type(holder).__module__.startswith("transformers."):
        return f"{type(holder).__qualname__} is not transformers' own"
    if not len(layers):
        return "it holds none"
    strangers = {type(layer).__name__ for layer in layers} - {family.layer}
    if strangers:
        return f"it holds {', '.join(sorted(strangers))}"
    for key, wanted in family.only_if:
        if getattr(config, key, None) not in (wanted, None):
            return f"{key} is {getattr(config, key)!r}"
    if not family.is_encoder and not getattr(config, "is_causal", True):
        return "is_causal is False"
    if family.is_encoder and config._attn_implementation not in _MASKS_OF:
        return f"its attention is {config._attn_implementation!r}, not {' or '.join(_MASKS_OF)}"
    if activation_of(layers[0], family) is None:
        return f"no kernel is for the activation {type(find(layers[0], family.activation)).__name__}"
    for layer in layers:
        for path in (*family.qkv, family.out, *family.up, family.down):
            linear = find(layer, path)
            if type(linear).__name__ not in _LINEAR:
                return f"{path} is a {type(linear).__name__}"
            if getattr(linear, "parts", None) is not None:
                return f"{path} is split over ranks by itself, and not with the rest of its half of the block"
    return None


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """What is not packed becomes of the blocks' dtype, and needs no gradients."""
    for param in model.parameters():
        param.requires_grad_(False)
        if param.is_floating_point() and param.dtype != dtype:
            param.data = param.data.to(dtype)


def _become(layer: nn.Module, block: FusedEncoderBlock) -> None:
    """`layer` keeps its identity, which transformers' hooks go by; all that it has is the block."""
    for child in list(layer._modules):
        delattr(layer, child)
    layer.fused = block
    layer.forward = block.encode


def _rotary_of(family: Family, holder: nn.Module, dtype: torch.dtype) -> RotaryTable | None:
    if family.positions != "rotary":
        return None
    positions = int(getattr(holder.config, "max_position_embeddings", 0) or 0)
    return RotaryTable(find(holder, family.rotary), positions, dtype)


def _slopes_of(family: Family, config: Any, block: FusedBlock, device: torch.device) -> Tensor | None:
    """ALiBi's, of the heads that this rank has."""
    if family.positions != "alibi":
        return None
    heads = block.geometry.heads
    first = heads * block.out.rank if isinstance(block.out, SplitLinear) else 0
    return alibi_slopes(int(config.num_attention_heads))[first : first + heads].to(device)
