"""Numbers as integers by groups: kernels against the same in torch, bit for bit, and how far numbers are moved."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from gpu_kernels import DEVICES, CTensor, Device
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor

from deepspeedlite.ops.group_quantize import Quantized, dequantize, dequantize_in_torch, quantize, quantize_in_torch
from deepspeedlite.runtime.errors import OpError

SOURCE = str(ROOT / "csrc" / "quantizer" / "quantizer.cu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (((3, 64), 64), ((2, 3, 100), 32), ((1,), 16), ((2, 7), 4), ((5, 2500), 2048), ((4, 0), 8))


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if x.numel() > 6:
        x[..., -3:] = 0.5  # the same, and what lies halfway between two steps
        x.view(-1)[:5] = torch.tensor([1e-30, 2.0, -2.0, 0.25, 1e-42])
    return x.to(dtype)


def assert_same(found: Quantized, expected: Quantized) -> None:
    for name in ("values", "scales", "minima"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    assert found[3:] == expected[3:]


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal up to a product and a sum that are rounded once, or each."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=1e-6, equal_nan=True)


def check_kernels() -> None:
    for (shape, group_size), dtype, bits, symmetric in product(SHAPES, DTYPES, (8, 4), (True, False)):
        for scale_dtype in (torch.float32, torch.bfloat16):
            how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
            x = numbers(shape, dtype)
            found = quantize(x, **how)
            assert_same(found, quantize_in_torch(x, **how))
            for out in DTYPES:
                assert_near(dequantize(found, out), dequantize_in_torch(found, out))


@needs("c++")
def test_kernels_do_what_torch_does():
    check_kernels()


@needs("c++")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_does_the_same(isa):
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa, "OMP_NUM_THREADS": "1"}
    code = f'{BOOT}\nimport test_quantizer\ntest_quantizer.check_kernels()\nprint("good")'
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "good", done.stderr


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_moves_by_more_than_half_a_step(bits, symmetric):
    x = torch.randn(7, 130)
    moved = (dequantize(quantize(x, bits=bits, group_size=32, symmetric=symmetric)) - x).abs()
    for some, others in zip(x.split(32, -1), moved.split(32, -1)):
        extent = some.abs().amax(-1) * 2 if symmetric else some.amax(-1) - some.amin(-1)
        assert (others <= extent[:, None] / (2**bits - 1) * 0.50001).all()
    assert torch.equal(
        dequantize(quantize(torch.full((3, 40), 7.25), bits=bits, symmetric=False)), torch.full((3, 40), 7.25)
    )
    assert torch.equal(dequantize(quantize(torch.zeros(3, 40), bits=bits)), torch.zeros(3, 40))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_spoils_its_group_alone(bits, symmetric):
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, 96)
        x[1, 40] = bad
        found = dequantize(quantize(x, bits=bits, group_size=32, symmetric=symmetric))
        assert found[1, 32:64].isnan().all()
        found[1, 32:64] = 0
        assert found.isfinite().all()


def test_what_cannot_be_done_is_refused_or_torchs():
    for how in ({"bits": 5}, {"group_size": 0}):
        with pytest.raises(OpError, match="bits must be 8 or 4"):
            quantize(torch.ones(4), **how)
    odd = quantize(torch.randn(9), bits=4, group_size=3)  # bytes with numbers of two groups
    assert dequantize(odd).shape == (9,) and odd.values.shape == (5,)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(dequantize(quantize(x), torch.float64), x, rtol=0, atol=0.02)
    assert torch.equal(quantize(torch.ones(8, 4).t()).values, quantize(torch.ones(4, 8)).values)


# --- on GPUs ----------------------------------------------------------------------------------------------------------


class CGroups(ctypes.Structure):
    _fields_ = [
        ("x", CTensor),
        ("values", ctypes.c_void_p),
        ("scales", CTensor),
        ("minima", CTensor),
        *((name, ctypes.c_int64) for name in ("rows", "width", "group", "groups", "value_bytes")),
        ("bits", ctypes.c_int32),
    ]


def c_tensor(tensor: Tensor | None) -> CTensor:
    return CTensor(None, 0) if tensor is None else CTensor(tensor.data_ptr(), DTYPES.index(tensor.dtype))


def c_groups(x: Tensor, quantized: Quantized) -> CGroups:
    width = x.shape[-1]
    values, groups = quantized.values, quantized.scales.shape[-1]
    tensors = (c_tensor(x), values.data_ptr(), c_tensor(quantized.scales), c_tensor(quantized.minima))
    return CGroups(*tensors, x.numel() // width, width, quantized.group_size, groups, values.shape[-1], quantized.bits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantizer")


@pytest.mark.parametrize("kind", [*DEVICES, "copied"])
def test_gpu_kernels_do_what_torch_does(folder, kind):
    device = Device.of(kind, [SOURCE], folder)
    for ((shape, group_size), dtype), bits, symmetric in product(zip(SHAPES[:5], 2 * DTYPES), (8, 4), (True, False)):
        x = numbers(shape, dtype)
        for scale_dtype in (torch.float32, torch.bfloat16):
            how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
            expected = quantize_in_torch(x, **how)
            tensors = [None if one is None else torch.zeros_like(one) for one in expected[:3]]
            found = Quantized(*tensors, *expected[3:])
            device.call("dsl_gpu_quantize", c_groups(x, found))
            assert_same(found, expected)
            back = torch.zeros_like(x)
            device.call("dsl_gpu_dequantize", c_groups(back, found))
            assert_near(back, dequantize_in_torch(found, dtype))
