"""What a fused block is made of, read from a module of transformers: packed products, norms, the shape of attention.

Weights are taken out of the module matrix by matrix: as soon as one is packed, the module holds a stand-in without
memory, so a model is never there twice. What several matrices become one (q, k, v; gate, up) is there twice while it
is joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepspeedlite.inference.blocks.families import ACTIVATIONS, Family, Residual
from deepspeedlite.inference.blocks.huge_pages import HugePages
from deepspeedlite.ops.transformer_inference import PackedLinear, activations, add_norm
from deepspeedlite.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from deepspeedlite.parallel.tensor.collectives import gather_out, sum_out
from deepspeedlite.runtime.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How weights are kept."""

    dtype: torch.dtype
    bits: int | None = None
    group_size: int = 64
    pages: HugePages = field(default_factory=HugePages)

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """A product of `weight [out, in]`."""
        packed = PackedLinear.pack(weight, bias, dtype=self.dtype, bits=self.bits, group_size=self.group_size)
        self.pages.move(packed)
        return packed


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a block's attention on this rank."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0
    window: int = 0


class Norm(nn.Module):
    """A norm over the last dimension, and the sum before it; see `add_norm`."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, unit_offset: bool) -> None:
        super().__init__()
        self.kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        self.eps = float(module.eps if hasattr(module, "eps") else module.variance_epsilon)  # type: ignore[arg-type]
        self.unit_offset = unit_offset
        self.register_buffer("weight", _buffer(module.weight, dtype))
        self.register_buffer("bias", _buffer(getattr(module, "bias", None), dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(normed, x + residual)`."""
        return add_norm(
            *(x, self.weight, self.bias, self.eps),
            kind=self.kind,
            residual=residual,
            unit_offset=self.unit_offset,
        )


class SplitLinear(nn.Module):
    """A packed product of which every rank of a group has a part; its output is whole on every rank.

    Args:
        packed: this rank's part; where outputs are added up, without the bias.
        layer: what it stands for: inputs that are shared out (`RowParallelLinear`), or outputs.
    """

    bias: Tensor | None

    def __init__(self, packed: PackedLinear, layer: RowParallelLinear | ColumnParallelLinear) -> None:
        super().__init__()
        self.packed = packed
        self._group, self._parts = layer.group, layer.parts
        self._sums = isinstance(layer, RowParallelLinear)
        self.register_buffer("bias", _buffer(layer.bias, packed.dtype) if self._sums else None)

    @property
    def rank(self) -> int:
        """Which part this is."""
        return self._group.rank

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in, or this rank's]` -> `[..., out]`."""
        y = self.packed(x)
        if not self._sums:
            return y if self._parts is None else gather_out(y, self._group, self._parts)
        y = sum_out(y, self._group)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """All of one block."""

    residual: Residual
    norms: Sequence[Norm]
    qkv: nn.Module
    qk_norms: Sequence[Norm]
    out: nn.Module
    up: nn.Module
    is_gated: bool
    activation: str
    down: nn.Module
    geometry: Geometry


def find(module: Any, path: str) -> Any:
    """What is at `path`, attributes joined by dots; None where the last one is absent."""
    *parents, last = path.split(".")
    for name in parents:
        module = getattr(module, name)
    return getattr(module, last, None)


def take_parts(layer: nn.Module, family: Family, config: Any, packing: Packing) -> BlockParts:
    """A block's parts, whose weights are gone from `layer` afterwards."""
    dtype = packing.dtype
    geometry = geometry_of(layer, family, config)
    norms = [Norm(find(layer, path), dtype, unit_offset=family.unit_offset) for path in family.norms]
    qk_norms = [find(layer, path) for path in family.qk_norms or ()]
    by_head = geometry.head_dim if family.qkv_by_head else None
    return BlockParts(
        residual=residual_of(family, config),
        norms=norms,
        qkv=_joined(layer, family.qkv, packing, by_head=by_head),
        qk_norms=[Norm(norm, dtype, unit_offset=False) for norm in qk_norms if norm is not None],
        out=_reduced(layer, family.out, packing),
        up=_joined(layer, family.up, packing),
        is_gated=family.gated,
        activation=activation_of(layer, family) or "",
        down=_reduced(layer, family.down, packing),
        geometry=geometry,
    )


def residual_of(family: Family, config: Any) -> Residual:
    """Where a model's norms stand, which some families leave to the configuration."""
    if family.residual_unless is not None and not getattr(config, family.residual_unless[0]):
        return family.residual_unless[1]
    return family.residual


def activation_of(layer: nn.Module, family: Family) -> str | None:
    """The kernels' name of a block's activation; None where they have none."""
    name = ACTIVATIONS.get(type(find(layer, family.activation)).__name__)
    return name if name in activations() else None


def geometry_of(layer: nn.Module, family: Family, config: Any) -> Geometry:
    """The heads that this rank's weights have, and what attention does with them."""
    attention = find(layer, family.attention)
    head_dim = int(getattr(attention, family.head_dim))
    rows = [_rows(find(layer, path)) for path in family.qkv]
    if len(rows) == 3:
        heads, kv_heads = rows[0] // head_dim, rows[1] // head_dim
    else:
        whole = int(config.num_attention_heads)
        groups = 1 if family.qkv_by_head else whole // int(getattr(config, "num_key_value_heads", None) or whole)
        kv_heads = rows[0] // head_dim // (groups + 2)
        heads = kv_heads * groups
    window = None
    if family.window is not None:
        _, of_config, key = family.window.rpartition("config.")
        window = getattr(config if of_config else attention, key, None)
    return Geometry(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(getattr(attention, family.scale)),
        softcap=float((family.softcap and getattr(attention, family.softcap, None)) or 0.0),
        window=int(window or 0),
    )


def _is_conv1d(linear: nn.Module) -> bool:
    """GPT-2's layers keep their weights as `[in, out]`."""
    return type(linear).__name__ == "Conv1D"


def _rows(linear: nn.Module) -> int:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.shape[1] if _is_conv1d(linear) else weight.shape[0]


def _buffer(tensor: Any, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def _take(layer: nn.Module, path: str) -> tuple[Tensor, Tensor | None, Any]:
    """A linear layer's weight `[out, in]` and bias, and the layer, of which a stand-in is left."""
    linear = find(layer, path)
    parent, _, name = path.rpartition(".")
    setattr(find(layer, parent) if parent else layer, name, nn.Identity())
    weight = linear.weight.detach()
    return (weight.t() if _is_conv1d(linear) else weight), linear.bias, linear


def _joined(layer: nn.Module, paths: Sequence[str], packing: Packing, *, by_head: int | None = None) -> PackedLinear:
    """One product for several that have the same input. `by_head`: head_dim, where q, k and v lie so, head after
    head.
    """
    taken = [_take(layer, path)[:2] for path in paths]
    weights = [weight for weight, _ in taken]
    biases = [bias for _, bias in taken]
    del taken
    if len({bias is None for bias in biases}) != 1:
        raise UnsupportedError(f"of {', '.join(paths)} some have a bias and some have none")
    if by_head is not None:
        weights = [_stacked(weight, by_head) for weight in weights]
        biases = [None if bias is None else _stacked(bias, by_head) for bias in biases]
    weight = weights[0] if len(weights) == 1 else torch.cat([each.to(packing.dtype) for each in weights])
    del weights
    bias = None if biases[0] is None else torch.cat([each.detach() for each in biases if each is not None])
    return packing.pack(weight, bias)


def _stacked(rows: Tensor, head_dim: int) -> Tensor:
    """From q, k, v of head 0, q, k, v of head 1 ... to all queries, all keys, all values."""
    return rows.view(-1, 3, head_dim, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _reduced(layer: nn.Module, path: str, packing: Packing) -> nn.Module:
    """The product that ends a half of the block; where ranks have a part of its inputs each, with their sum."""
    weight, bias, linear = _take(layer, path)
    return packed_like(linear, weight, bias, packing)


def packed_like(linear: Any, weight: Tensor, bias: Tensor | None, packing: Packing) -> nn.Module:
    """A product that does what `linear` does, with its weight `[out, in]`."""
    if not isinstance(linear, (RowParallelLinear, ColumnParallelLinear)):
        return packing.pack(weight, bias)
    return SplitLinear(packing.pack(weight, None if isinstance(linear, RowParallelLinear) else bias), linear)
