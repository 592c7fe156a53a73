"""Products of few rows with a weight matrix, whole and packed, against float64, for every instruction set there is."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor

from deepspeedlite.ops import packed_linear
from deepspeedlite.ops.packed_linear import PackedLinear
from deepspeedlite.runtime.errors import OpError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (16, 64), (33, 100), (100, 333), (64, 768))  # [out, in]: around vectors, panels and groups
WHOLE_STEPS = 32639  # of a group's largest number, where rows are made whole numbers of 16 bits


def layer(out: int, width: int, dtype: torch.dtype, bits: int | None, group_size: int = 64) -> PackedLinear:
    generator = torch.Generator().manual_seed(out * 1009 + width)
    weight, bias = torch.randn(out, width, generator=generator), torch.randn(out, generator=generator)
    return PackedLinear.pack(weight, bias, dtype=dtype, bits=bits, group_size=group_size)


def exact_weight(packed: PackedLinear) -> Tensor:
    if packed.scales is None:
        return packed.weight.double()
    weight = packed_linear._from_panels(packed.weight, packed.scales, packed.bits, packed.group_size)
    return weight[: packed.out_features, : packed.in_features].double()


def rounding(x: Tensor, weight: Tensor, group_size: int) -> Tensor:
    """What rows lose where they are multiplied as whole numbers: at most half a step of each number's group."""
    lost = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for some, others in zip(x.double().split(group_size, -1), weight.split(group_size, -1)):
        lost += some.abs().amax(-1, keepdim=True) / WHOLE_STEPS / 2 * others.abs().sum(-1)
    return lost


def check_products(bits: int | None, dtype: torch.dtype) -> None:
    for (out, width), group_size in product(SHAPES, (64, 8, 264) if bits else (64,)):
        packed = layer(out, width, dtype, bits, group_size)
        weight = exact_weight(packed)
        for rows in (1, 2, 3, 5, 8, 19):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
            found, expected = packed(x).double(), x.double() @ weight.T + packed.bias.double()
            sums = x.double().abs() @ weight.abs().T + packed.bias.double().abs()
            allowed = 1e-6 * sums + torch.finfo(dtype).eps * (expected.abs() + (sums if rows > 8 else 0))
            if bits and group_size <= 256:
                allowed += rounding(x, weight, group_size)
            assert ((found - expected).abs() <= allowed).all(), (bits, dtype, out, width, rows)


@needs("c++")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_products_are_those_of_float64(bits, dtype):
    check_products(bits, dtype)


CHECK_ONE_ISA = f"""
{BOOT}
import torch, test_packed_linear as tests
for bits in (None, 8, 4):
    for dtype in tests.DTYPES:
        tests.check_products(bits, dtype)
    tests.check_what_is_not_finite(bits)
tests.test_dequantized_weights_are_what_was_packed()
print("good")
"""


@needs("c++")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_does_the_same(isa):
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ONE_ISA], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "good", done.stderr


def check_what_is_not_finite(bits: int | None) -> None:
    """A NaN or an infinity spoils its own row, and no other."""
    packed = layer(50, 192, torch.float32, bits)
    for bad in (float("nan"), float("inf"), float("-inf"), 3e38):
        x = torch.randn(3, 192)
        before = packed(x)
        x[1, 70] = bad
        after = packed(x)
        assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
        if bad != 3e38:
            assert not after[1].isfinite().any(), (bits, bad)
    assert torch.equal(packed(torch.zeros(2, 192)), packed.bias.expand(2, 50))
    small = torch.full((1, 192), 1e-42)  # its groups' scales have no finite inverse
    torch.testing.assert_close(packed(small), packed.bias.expand(1, 50), rtol=0, atol=1e-36)


@needs("c++")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_is_not_finite_spoils_its_own_row_alone(bits):
    check_what_is_not_finite(bits)


@needs("c++")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_threads_and_other_rows_change_nothing(bits):
    packed, x = layer(333, 256, torch.bfloat16, bits), torch.randn(8, 256).bfloat16()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(packed(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(packed(x[2:7]), results[0][2:7]), "5 rows are computed as 8 are"


def test_dequantized_weights_are_what_was_packed():
    for bits, dtype, (out, width) in product((None, 8, 4), DTYPES, SHAPES):
        packed = layer(out, width, dtype, bits)
        assert torch.equal(packed.dequantized(), exact_weight(packed).to(dtype))
        assert torch.equal(packed.dequantized(16, 48), exact_weight(packed)[16:48].to(dtype))


@pytest.mark.parametrize(("bits", "steps"), [(8, 127.5), (4, 7.5)])
def test_packing_moves_no_weight_by_more_than_half_a_step(bits, steps):
    weight = torch.randn(40, 130)
    packed = PackedLinear.pack(weight, bits=bits, group_size=32)
    for some, others in zip(weight.split(32, -1), packed.dequantized().split(32, -1)):
        step = some.abs().amax(-1, keepdim=True) / steps * (1 + 2**-7)  # scales are bfloat16, rounded up
        assert ((some - others).abs() <= 0.501 * step).all()
    assert packed.weight_bytes == packed.weight.nbytes + packed.scales.nbytes
    assert packed.weight.nbytes == 48 * 160 * bits // 8


def test_many_rows_leading_dimensions_gradients_and_other_layouts():
    for bits in (None, 8, 4):
        packed, x = layer(33, 100, torch.float32, bits), torch.randn(2, 3, 5, 100)
        expected = x.double() @ exact_weight(packed).T + packed.bias.double()
        torch.testing.assert_close(
            packed(x).double(), expected, rtol=1e-3 if bits else 1e-5, atol=3e-3 if bits else 1e-4
        )
        torch.testing.assert_close(packed(x[0, 0]), packed(x)[0, 0], rtol=1e-3, atol=3e-3)
        assert packed(x[:, :, 0].transpose(0, 1)[:2]).shape == (2, 2, 33), "not contiguous"
        assert packed(x[:0]).shape == (0, 3, 5, 33)
        few = x[0, 0].clone().requires_grad_()
        packed(few).sum().backward()
        torch.testing.assert_close(few.grad[0].double(), exact_weight(packed).sum(0), rtol=1e-4, atol=1e-4)


def test_state_dicts_moves_and_copies_keep_it():
    packed = layer(33, 100, torch.bfloat16, 4)
    other = layer(33, 100, torch.bfloat16, 4)
    other.weight.zero_()
    other.load_state_dict(packed.state_dict())
    x = torch.randn(2, 100).bfloat16()
    assert torch.equal(other(x), packed(x)) and "int4 by 64" in repr(packed)
    assert sum(p.numel() for p in packed.parameters()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": 8, "group_size": 12}, "whole multiples of 8"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments, message):
    with pytest.raises(OpError, match=message):
        PackedLinear.pack(torch.ones(8, 8), **arguments)
    with pytest.raises(OpError, match="not \\[out, in\\]"):
        PackedLinear.pack(torch.ones(8))
