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

from deepspeedlite.ops.packed_linear import PackedLinear
from deepspeedlite.runtime.text import counted

Fill = Callable[[nn.Module], None]

_LIKE_LINEAR = ("Linear", "Conv1D")  # exactly these: a subclass may do something else; the latter is transformers'


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
            packed = PackedLinear.pack(weight, module.bias, dtype=dtype, bits=bits, group_size=group_size)
            setattr(parent, name, QuantizedLinear(packed))
            quantized += 1
    lines = [f"{counted(quantized, 'linear layer')} quantized to {bits} bits"] if quantized else []
    return lines + [f"{counted(number, 'module')} not quantized: {reason}" for reason, number in left.items() if number]


def _why_not(module: Any, holders: Counter[int]) -> str | None:
    """None: it is to be quantized; empty: it is none of those that could be."""
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, PackedLinear)):
        return ""
    if kind not in _LIKE_LINEAR or not (
        type(module) is nn.Linear or type(module).__module__.startswith("transformers.")
    ):
        return f"{kind} is no plain linear layer"
    if holders[id(module.weight)] > 1:
        return "the weight is another module's too"
    return None
