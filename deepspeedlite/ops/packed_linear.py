"""A linear layer for inference, whose weights lie as the products of few rows read them, whole or as integers.

Without `bits` that is torch's own layout, `[out, in]`, so products of many rows are torch's, on the same memory.

With `bits` a panel holds 16 outputs, and the numbers of an input pair lie beside each other, output by output:

    8 bits    weight int8   [panels, in / 2, 16, 2]      panel, pair, output, which of the pair
    4 bits    weight uint8  [panels, in / 8, 16, 2, 2]   as words of 16 bits: word (output, p) holds the inputs
                            2 j + p of 8, at bits 4 j; two's complement
    scales    bfloat16      [panels, groups, 16]

`in` is rounded up to whole groups, `out` to whole panels; what is added is 0. A vector of 16 outputs then needs one
scale for all inputs of a group, and none of its lanes has to be added up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeedlite.ops.quantizer import quantize
from deepspeedlite.runtime.errors import OpError

PANEL = 16
FEW_ROWS = 8
_TILE_NUMEL = 1 << 22  # weights that are dequantized at a time for products of many rows


class PackedLinear(nn.Module):
    """y = x W^T + b, without gradients. Made by `pack`.

    Attributes:
        in_features, out_features: as of `nn.Linear`.
        weight: see the module; a buffer, as are the others.
        scales: None without `bits`.
        bias: `[out]` or None.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bits: int | None,
        group_size: int,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.bits, self.group_size = dtype, bits, group_size
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        bits: int | None = None,
        group_size: int = 64,
    ) -> PackedLinear:
        """From `weight [out, in]` and `bias [out]`, for inputs of `dtype` (the weight's).

        Without `bits` the weight is not copied where it already has that dtype and is contiguous.

        Raises:
            OpError: no such `bits`, `dtype` or `group_size` (whole multiples of 8), or the weight is not a matrix.
        """
        dtype = dtype or weight.dtype
        if weight.dim() != 2:
            raise OpError(f"PackedLinear.pack: a weight of shape {tuple(weight.shape)} is not [out, in]")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise OpError(f"PackedLinear.pack: dtype={dtype}; it must be torch.float32, bfloat16 or float16")
        if bits not in (None, 8, 4) or group_size < 8 or group_size % 8:
            raise OpError(
                f"PackedLinear.pack: bits={bits}, group_size={group_size}; bits must be None, 8 or 4, and a group "
                "whole multiples of 8"
            )
        shape = (weight.shape[0], weight.shape[1])
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        if bits is None:
            packed, scales = weight.detach().to(dtype).contiguous(), None
        else:
            packed, scales = _panels(weight.detach(), bits, group_size)
        return cls(packed, scales, bias, shape=shape, dtype=dtype, bits=bits, group_size=group_size)

    @property
    def weight_bytes(self) -> int:
        """What one product reads of weights and scales."""
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, in x's dtype, which should be `dtype`."""
        if self.scales is None:
            return F.linear(x, self.weight, self.bias)
        return self._in_tiles(x)

    def dequantized(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Outputs `[begin, end)` of the weight, `[outputs, in]`; a view without `bits`. `begin` is of whole panels."""
        end = self.out_features if end is None else min(end, self.out_features)
        if self.scales is None:
            return self.weight[begin:end]
        panels = slice(begin // PANEL, -(-end // PANEL))
        weight = _from_panels(self.weight[panels], self.scales[panels], self.bits or 8, self.group_size)
        return weight[: end - begin, : self.in_features].to(self.dtype)

    def extra_repr(self) -> str:
        what = self.dtype if self.bits is None else f"int{self.bits} by {self.group_size}, {self.dtype}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {what}"

    def _in_tiles(self, x: Tensor) -> Tensor:
        step = max(_TILE_NUMEL // self.in_features // PANEL, 1) * PANEL
        parts = [F.linear(x, self.dequantized(at, at + step)) for at in range(0, self.out_features, step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias


def _panels(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    out, width = weight.shape
    padded = F.pad(weight, (0, -width % group_size, 0, -out % PANEL))
    quantized = quantize(padded, bits=bits, group_size=group_size, scale_dtype=torch.bfloat16)
    scales = quantized.scales.view(-1, PANEL, quantized.scales.shape[-1]).transpose(1, 2).contiguous()
    if bits == 8:
        return quantized.values.view(-1, PANEL, padded.shape[1] // 2, 2).transpose(1, 2).contiguous(), scales
    pairs = quantized.values.view(-1, PANEL, padded.shape[1] // 8, 4)  # of the neighbours 2 j and 2 j + 1
    even, odd = pairs & 15, pairs >> 4
    words = [each[..., 0::2] | each[..., 1::2] << 4 for each in (even, odd)]
    return torch.stack(words, -2).transpose(1, 2).contiguous(), scales


def _from_panels(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """The float32 weight of some panels, with what was added."""
    rows = weight.shape[0] * PANEL
    if bits == 8:
        integers = weight.transpose(1, 2).reshape(rows, -1)
    else:
        nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(-2)  # [panels, in / 8, 16, 2, 4]
        integers = nibbles.permute(0, 2, 1, 4, 3).reshape(rows, -1)
        integers = (integers ^ 8).to(torch.int8) - 8
    by_row = scales.transpose(1, 2).reshape(rows, -1, 1)
    return (integers.view(rows, -1, group_size) * by_row.float()).view(rows, -1)
