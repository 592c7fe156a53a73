"""Numbers as integers of 8 or 4 bits, by groups of neighbours that share a scale.

A tensor's last dimension is cut into groups of `group_size`; the last may be shorter. With b bits:

    symmetric     x = q * scale             q in [-2^(b-1), 2^(b-1) - 1]    scale = max|x| / (2^(b-1) - 1/2)
    asymmetric    x = q * scale + minimum   q in [0, 2^b - 1]               scale = (max - min) / (2^b - 1)

The half in the first makes all 2^b steps of use while no number is further than half a step from its own. Integers are
rounded to the nearest, ties to even. A group that has a NaN or an infinity comes back as NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops import find_op
from deepspeedlite.runtime.errors import OpError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Quantized(NamedTuple):
    """A tensor as integers; `[..., n]` is its shape, `groups` is n / group_size, rounded up.

    Attributes:
        values: 8 bits: `[..., n]`, int8, or uint8 where asymmetric. 4 bits: `[..., (n + 1) / 2]`, uint8, of two
            neighbours the first in the low half, two's complement where symmetric.
        scales: `[..., groups]`, float32 unless asked for otherwise.
        minima: the same shape; None where symmetric.
        numel: n.
        bits: 8 or 4.
        group_size: numbers that share a scale.
    """

    values: Tensor
    scales: Tensor
    minima: Tensor | None
    numel: int
    bits: int
    group_size: int


def quantize(
    x: Tensor, *, bits: int = 8, group_size: int = 64, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """`x`, of any shape and floating dtype, by groups along its last dimension.

    Scales are rounded up to `scale_dtype` before they are used: a smaller one would cut off the largest number.

    Raises:
        OpError: `bits` is not 8 or 4, or `group_size` is not positive.
    """
    if bits not in (8, 4) or group_size < 1:
        raise OpError(f"quantize: bits={bits}, group_size={group_size}; bits must be 8 or 4, and a group not empty")
    n = x.shape[-1]
    if (op := _op("quantize_groups", x, bits, group_size)) is not None:
        shape, groups = x.shape[:-1], -(-n // group_size)
        scales = x.new_empty((*shape, groups), dtype=scale_dtype)
        minima = None if symmetric else torch.empty_like(scales)
        integer = torch.int8 if bits == 8 and symmetric else torch.uint8
        values = x.new_empty((*shape, n if bits == 8 else (n + 1) // 2), dtype=integer)
        op(x.contiguous(), values, scales, minima, bits, group_size)
        return Quantized(values, scales, minima, n, bits, group_size)
    return quantize_in_torch(x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantize` was given, as near as its integers are; arithmetic in float32."""
    values, op = quantized.values, None
    if dtype in _DTYPES:
        op = _op("dequantize_groups", quantized.scales, quantized.bits, quantized.group_size)
    if op is not None:
        out = quantized.scales.new_empty((*values.shape[:-1], quantized.numel), dtype=dtype)
        op(values, quantized.scales, quantized.minima, out, quantized.bits, quantized.group_size)
        return out
    return dequantize_in_torch(quantized, dtype)


def quantize_in_torch(
    x: Tensor, *, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """What `quantize` does, in torch."""
    n = x.shape[-1]
    grouped = _groups(x.to(torch.promote_types(x.dtype, torch.float32)), group_size)
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        minima = None
        scales = grouped.abs().amax(-1) / (high + 0.5)
    else:
        low, high = 0, 2**bits - 1
        minimum, maximum = grouped.aminmax(dim=-1)
        minima = minimum.to(scale_dtype)
        scales = (maximum - minima.to(grouped.dtype)).clamp(min=0) / high
    scales = _rounded_up(torch.where(scales.isfinite(), scales, torch.nan), scale_dtype)
    steps = scales.to(grouped.dtype)
    inverse = torch.where(steps > 0, 1 / steps, 0.0).unsqueeze(-1)
    shifted = grouped if minima is None else grouped - minima.to(grouped.dtype).unsqueeze(-1)
    whole = (shifted * inverse).round().nan_to_num(0.0).clamp(low, high)
    integers = whole.to(torch.int8 if symmetric else torch.uint8).flatten(-2)[..., :n].contiguous()
    return Quantized(integers if bits == 8 else _halves(integers), scales, minima, n, bits, group_size)


def dequantize_in_torch(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `dequantize` does, in torch."""
    integers = quantized.values
    if quantized.bits == 4:
        integers = _wholes(integers, quantized.minima is None)[..., : quantized.numel]
    grouped = _groups(integers.to(torch.float32), quantized.group_size)
    grouped = grouped * quantized.scales.to(torch.float32).unsqueeze(-1)
    if quantized.minima is not None:
        grouped = grouped + quantized.minima.to(torch.float32).unsqueeze(-1)
    return grouped.flatten(-2)[..., : quantized.numel].to(dtype)


def _op(name: str, floats: Tensor, bits: int, group_size: int) -> Any:
    """The op where it takes such numbers, else None."""
    odd = bits == 4 and group_size % 2 == 1
    if floats.dtype not in _DTYPES or odd or (floats.requires_grad and torch.is_grad_enabled()):
        return None
    return find_op(name, floats.device.type)


def _rounded_up(scales: Tensor, dtype: torch.dtype) -> Tensor:
    near = scales.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.to(scales.dtype) < scales, above, near)


def _groups(x: Tensor, group_size: int) -> Tensor:
    """`[..., groups, group_size]`; what the last group lacks is its last number again, which changes no extreme."""
    missing = -x.shape[-1] % group_size
    if missing:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), -1)
    return x.unflatten(-1, (-1, group_size))


def _halves(integers: Tensor) -> Tensor:
    """Two integers of 4 bits in a byte."""
    padded = F.pad(integers, (0, integers.shape[-1] % 2)).view(torch.uint8)
    return padded[..., 0::2] & 15 | padded[..., 1::2] << 4


def _wholes(halves: Tensor, signed: bool) -> Tensor:
    """What `_halves` was given, and one more where that was odd; int8, or uint8 where not signed."""
    both = torch.stack((halves & 15, halves >> 4), -1).flatten(-2)
    return ((both ^ 8).to(torch.int8) - 8) if signed else both
