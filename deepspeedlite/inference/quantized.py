"""Weights of 8 or 4 bits for any model: its linear layers become quantized ones, of whatever fused blocks have left.

Only weights are quantized, by groups of inputs that have one scale; activations and sums are what they were. Embeddings
stay as they are, and so does a linear layer whose weight another module has too (a head tied to an embedding).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeedlite.host.text import counted
from deepspeedlite.ops.packed_linear import PackedLinear
from deepspeedlite.parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from deepspeedlite.parallel.tensor.collectives import gather_out, slice_in, sum_out

Fill = Callable[[nn.Module], None]

# Exactly these: a subclass may do something else. Those after the first are transformers'.
_LIKE_LINEAR = ("Linear", "Conv1D", "FalconLinear")
_PARTS = (ColumnParallelLinear, RowParallelLinear)


class QuantizedLinear(nn.Module):
    """A linear layer without gradients, whose weight is kept in `packed`."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._like = torch.empty(self.out_features, self.in_features, dtype=packed.dtype, device="meta")

    @property
    def weight(self) -> Tensor:
        """Without values: models ask for its shape, dtype and device's kind. `packed.dequantized()` has values."""
        return self._like

    @property
    def bias(self) -> Tensor | None:
        """`[out]`, or None."""
        return self.packed.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        out: Tensor = self.packed(x)
        return out


class QuantizedPart(QuantizedLinear):
    """One rank's part of a linear layer that is split over ranks.

    Args:
        packed: the product; without the bias, where outputs are summed over the ranks.
        layer: what it stands for.
    """

    def __init__(self, packed: PackedLinear, layer: ColumnParallelLinear | RowParallelLinear) -> None:
        super().__init__(packed)
        self._sums = isinstance(layer, RowParallelLinear)
        self._bias = layer.bias if self._sums else None
        self._group, self._parts = layer.group, layer.parts

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own."""
        if not self._sums:
            out = super().forward(x)
            return out if self._parts is None else gather_out(out, self._group, self._parts)
        if self._parts is not None:
            x = slice_in(x, self._group, self._parts)
        out = sum_out(super().forward(x), self._group)
        return out if self._bias is None else out + self._bias


@torch.no_grad()
def quantize_linears(
    model: nn.Module, *, bits: int, group_size: int, dtype: torch.dtype, fill: Fill | None = None
) -> list[str]:
    """Quantize the linear layers of `model` in place, one after the other.

    Args:
        model: what is in it of fused blocks stays as it is.
        bits: 8 or 4.
        group_size: inputs that have one scale.
        dtype: of activations.
        fill: gives a module's own parameters their values, where they lie on the meta device.

    Returns:
        Lines that say what was quantized, and what was not and why.
    """
    holders = Counter(id(param) for part in model.modules() for param in part._parameters.values() if param is not None)
    quantized = 0
    left: dict[str, int] = {}
    for parent in list(model.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, module in children:
            if not isinstance(getattr(module, "weight", None), nn.Parameter) or module.weight.dim() != 2:
                continue
            reason = _why_not(module, holders)
            if reason is not None:
                left[reason] = left.get(reason, 0) + bool(reason)
                continue
            if fill is not None:
                fill(module)
            weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
            bias = None if isinstance(module, RowParallelLinear) else module.bias
            packed = PackedLinear.pack(weight, bias, dtype=dtype, bits=bits, group_size=group_size)
            made = QuantizedPart(packed, module) if isinstance(module, _PARTS) else QuantizedLinear(packed)
            setattr(parent, name, made)
            quantized += 1
    lines = [f"{counted(quantized, 'linear layer')} quantized to {bits} bits"] if quantized else []
    return lines + [f"{counted(number, 'module')} not quantized: {reason}" for reason, number in left.items() if number]


def _why_not(module: Any, holders: Counter[int]) -> str | None:
    """None: it is to be quantized; empty: it is none of those that could be."""
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, VocabParallelEmbedding, PackedLinear)):
        return ""
    is_theirs = kind in _LIKE_LINEAR and type(module).__module__.startswith("transformers.")
    if not (type(module) is nn.Linear or is_theirs or isinstance(module, _PARTS)):
        return f"{kind} is no plain linear layer"
    if holders[id(module.weight)] > 1:
        return "the weight is another module's too"
    return None
