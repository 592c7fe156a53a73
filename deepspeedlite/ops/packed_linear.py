"""A linear layer for inference, whose weights lie as the products of few rows read them, whole or as integers.

Without `bits` that is torch's own layout, `[out, in]`, so products of many rows are torch's, on the same memory.

With `bits` a panel holds 16 outputs, and four bytes of one output lie beside those of the next:

    8 bits    weight uint8  [panels, in / 4, 16, 4]    integer + 128
    4 bits    weight uint8  [panels, in / 8, 16, 4]    integer + 8: of inputs i and i + 4 of 8 in the low, high half
    scales    bfloat16      [panels, groups, 16]

`in` is rounded up to whole groups, `out` to whole panels; what is added is 0. A vector of 16 outputs then needs one
scale for all inputs of a group, and none of its lanes has to be added up.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeedlite.ops import find_op
from deepspeedlite.ops.group_quantize import quantize
from deepspeedlite.runtime.errors import OpError

PANEL = 16
FEW_ROWS = 8
_MOST_PACKED_ROWS = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        self._most_numel = FEW_ROWS * self.in_features  # of inputs that have few rows
        if bits and weight.is_cpu and (quick := find_op("multiplies_bytes")) is not None and quick():
            # Products of 16-bit numbers are so quick that they make up for unpacking the weight, once rows are many.
            self._most_numel = sys.maxsize if dtype == torch.float32 else _MOST_PACKED_ROWS * self.in_features
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
        if dtype not in _DTYPES:
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
        if 0 < x.numel() <= self._most_numel and (op := self._few_row_product(x)) is not None:
            buffers = self._buffers  # as attributes of a module they take longer to find
            y = x.new_empty((*x.shape[:-1], self.out_features))
            op(
                x.contiguous(),
                buffers["weight"],
                buffers["scales"],
                buffers["bias"],
                y,
                self.bits or 0,
                self.group_size,
            )
            return y
        if self.scales is None:
            return F.linear(x, self.weight, self.bias)
        return self._in_tiles(x)

    def _few_row_product(self, x: Tensor) -> Any:
        """The op where it can be used for an input, else None: it has no gradients, and takes no float64."""
        if x.dtype not in _DTYPES or (x.requires_grad and torch.is_grad_enabled()):
            return None
        return find_op("few_row_product", "cpu" if x.is_cpu else x.device.type)

    def dequantized(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Outputs `[begin, end)` of the weight, `[outputs, in]`; a view without `bits`. `begin` is of whole panels."""
        end = self.out_features if end is None else min(end, self.out_features)
        if self.scales is None:
            return self.weight[begin:end]
        if begin >= end:
            return self.scales.new_empty((0, self.in_features), dtype=self.dtype)
        panels = slice(begin // PANEL, -(-end // PANEL))
        if (op := find_op("unpack_weight", self.weight.device.type)) is not None:
            weight = self.scales.new_empty((end - begin, self.in_features), dtype=self.dtype)
            op(self.weight[panels], self.scales[panels], weight, self.bits, self.group_size)
            return weight
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
    more = (0, -width % group_size, 0, -out % PANEL)
    padded = F.pad(weight, more) if any(more) else weight  # the head of a model is large enough without a copy
    quantized = quantize(padded, bits=bits, group_size=group_size, scale_dtype=torch.bfloat16)
    scales = quantized.scales.view(-1, PANEL, quantized.scales.shape[-1]).transpose(1, 2).contiguous()
    if bits == 8:
        integers = quantized.values.view(torch.uint8) ^ 0x80  # + 128, in no wider numbers on the way
    else:
        pairs = quantized.values ^ 0x88  # two's complement, of neighbours
        integers = torch.stack((pairs & 15, pairs >> 4), -1).view(-1, padded.shape[1] // 8, 2, 4)
        integers = integers[:, :, 0] | integers[:, :, 1] << 4
    return integers.view(-1, PANEL, integers.numel() // len(padded) // 4, 4).transpose(1, 2).contiguous(), scales


def _from_panels(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """The float32 weight of some panels, with what was added."""
    rows = weight.shape[0] * PANEL
    integers = weight.transpose(1, 2).reshape(rows, -1)
    if bits == 4:
        fours = integers.view(rows, -1, 4)
        integers = torch.stack((fours & 15, fours >> 4), 2).view(rows, -1)
    integers = integers.to(torch.float32) - (128 if bits == 8 else 8)
    by_row = scales.transpose(1, 2).reshape(rows, -1, 1)
    return (integers.view(rows, -1, group_size) * by_row.float()).view(rows, -1)
