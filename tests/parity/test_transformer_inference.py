"""Norms, rotary positions, attention over the cache and gates against float64, for every instruction set there is."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from pairwise import each_pair
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops import inference_reference as reference
from deepspeedlite.ops import transformer_inference as ops
from deepspeedlite.runtime.errors import OpError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_near(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal up to float32's arithmetic on numbers of about `scale`, and the rounding of the dtype."""
    eps = torch.finfo(found.dtype).eps
    expected = expected.to(found.dtype).double()  # what is too large for it is infinite
    torch.testing.assert_close(found.double(), expected, rtol=max(eps, 2e-6), atol=2e-6 * scale)


def check_norms(dtype: torch.dtype) -> None:
    for hidden, kind, with_residual in product((1, 7, 768, 1025), ("rms", "layer"), (False, True)):
        x, residual = random(3, 2, hidden, dtype=dtype), random(3, 2, hidden, dtype=dtype, seed=1)
        weight, bias = random(hidden, dtype=dtype, seed=2), random(hidden, seed=3)
        for unit_offset, shift in ((False, bias), (True, None)):
            given = {"residual": residual if with_residual else None, "kind": kind, "unit_offset": unit_offset}
            normed, summed = ops.add_norm(x, weight, shift, 1e-5, **given)
            assert torch.equal(summed, x + residual if with_residual else x)
            exact, _ = reference.add_norm(
                summed.double(),
                weight.double(),
                None if shift is None else shift.double(),
                1e-5,
                kind=kind,
                unit_offset=unit_offset,
            )
            if hidden > 1:
                assert_near(normed, exact, scale=4)


def check_rotary(dtype: torch.dtype) -> None:
    for (heads, kv_heads, dim, rotary_dim), interleaved in product(
        ((4, 4, 64, 64), (6, 2, 20, 10), (3, 1, 7, 0), (8, 2, 128, 96)), (False, True)
    ):
        batch, tokens, start = 2, 3, 5
        qkv = random(batch, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        cos, sin = (random(batch, tokens, max(rotary_dim, 2), seed=seed) for seed in (1, 2))
        positions = (cos, sin) if rotary_dim else (None, None)
        caches = [torch.full((batch, kv_heads, 11, dim), 7.0, dtype=dtype) for _ in range(2)]
        exact = [cache.double() for cache in caches]
        how = {"heads": heads, "kv_heads": kv_heads, "rotary_dim": rotary_dim, "interleaved": interleaved}
        q = ops.rotary_to_cache(qkv, *positions, *caches, start, **how)
        wide = [None if one is None else one.double() for one in positions]
        q_exact = reference.rotary_to_cache(qkv.double(), *wide, *exact, start, **how)
        assert_near(q, q_exact, scale=4)
        for cache, expected in zip(caches, exact):
            assert_near(cache, expected, scale=4)
        one_for_all = [None if one is None else one[:1] for one in positions]
        again = ops.rotary_to_cache(qkv[:1], *one_for_all, *(cache[:1] for cache in caches), start, **how)
        assert torch.equal(again, q[:1])


def attention_case(dtype: torch.dtype, shape: tuple[int, int, int, int, int], seed: int = 0) -> tuple[Tensor, ...]:
    heads, kv_heads, tokens, dim, length = shape
    q = random(2, heads, tokens, dim, dtype=dtype, seed=seed)
    room = length + 3
    keys, values = (random(2, kv_heads, room, dim, dtype=dtype, seed=seed + 1 + i) for i in range(2))
    return q, keys, values


SHAPES = (
    (4, 4, 1, 64, 1),
    (4, 2, 1, 64, 65),
    (12, 3, 2, 20, 130),  # a head's end in no vector
    (6, 1, 3, 7, 64),
    (8, 8, 8, 128, 600),  # two chunks
    (2, 2, 1, 80, 1500),
)


def check_attention(dtype: torch.dtype) -> None:
    for index, shape in enumerate(SHAPES):
        heads, _, tokens, dim, length = shape
        q, keys, values = attention_case(dtype, shape)
        mask = torch.rand(2, length + 2, generator=torch.Generator().manual_seed(index)) < 0.7
        mask[0, : length // 3], mask[1, : length - tokens], mask[:, length - tokens :] = False, True, True
        slopes = torch.arange(1, heads + 1) / heads
        plain = {"scale": dim**-0.5}
        for how in (
            plain,
            {**plain, "mask": mask},
            {**plain, "mask": mask[:, :length], "slopes": slopes},
            {**plain, "softcap": 2.0, "window": 70},
            {**plain, "window": 1},
        ):
            found = ops.decode_attention(q, keys, values, length, **how)
            exact = reference.decode_attention(q.double(), keys.double(), values.double(), length, **how)
            assert found.shape == (2, tokens, heads * dim) and found.dtype == dtype
            assert_near(found, exact, scale=2)


def check_gates(dtype: torch.dtype) -> None:
    large = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 3.0, -3.0, 12.0, -12.0, 50.0, -50.0, 200.0, -200.0])
    for name, width in product(ops.activations(), (1, 15, 1030)):
        x = torch.cat((4 * random(3 * 2 * width), large.repeat(2 * width))).to(dtype)
        exact = reference.activate(x.double(), name)
        assert_near(ops.activate(x, name), exact)
        rows = x.view(-1, 2 * width)
        assert_near(ops.gated(rows, name), reference.gated(rows.double(), name), scale=4)
    bad = torch.tensor([float("nan")] * 5 + [float("inf"), 1.0], dtype=dtype)
    for name in ops.activations():
        assert ops.activate(bad, name).isnan().tolist() == [True] * 5 + [False] * 2
        assert ops.activate(bad, name)[5].isinf()


CHECKS = {"norms": check_norms, "rotary": check_rotary, "attention": check_attention, "gates": check_gates}


@needs("c++")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHECKS)
def test_it_is_that_of_float64(name, dtype):
    CHECKS[name](dtype)


CHECK_ONE_ISA = f"""
{BOOT}
import torch, test_transformer_inference as tests
for check in tests.CHECKS.values():
    for dtype in tests.DTYPES:
        check(dtype)
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


@needs("c++")
def test_the_number_of_threads_changes_nothing():
    q, keys, values = attention_case(torch.bfloat16, (4, 2, 2, 64, 1700))
    x, before, found = random(64, 1024), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        normed, _ = ops.add_norm(x, None, None, 1e-6, kind="rms")
        found.append([ops.decode_attention(q, keys, values, 1700, scale=0.1), ops.gated(x, "silu"), normed])
    torch.set_num_threads(before)
    for one, *others in zip(*found):
        assert all(torch.equal(one, other) for other in others)


@each_pair(kv_heads=[1, 4], tokens=[1, 4], dtype=[torch.float32, torch.bfloat16], padded=[False, True])
def test_attention_is_torchs(kv_heads, tokens, dtype, padded):
    q, keys, values = attention_case(dtype, (4, kv_heads, tokens, 32, 40))
    seen = torch.ones(tokens, 40, dtype=torch.bool).tril(40 - tokens).expand(2, 1, tokens, 40).clone()
    mask = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        mask[1, :9] = False
        seen[1, ..., :9] = False
    found = ops.decode_attention(q, keys, values, 40, scale=32**-0.5, mask=mask if padded else None)
    each = [cache[:, :, :40].repeat_interleave(4 // kv_heads, 1) for cache in (keys, values)]
    expected = F.scaled_dot_product_attention(q, *each, attn_mask=seen).transpose(1, 2).flatten(2)
    close = 1e-5 if dtype == torch.float32 else 1e-2  # torch rounds its weights too
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_what_sees_nothing_is_zero_and_what_is_not_finite_stays_in_its_sequence():
    q, keys, values = attention_case(torch.float32, (2, 2, 1, 16, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    found = ops.decode_attention(q, keys, values, 9, scale=1.0, mask=mask)
    assert (found[0] == 0).all() and found[1].isfinite().all()
    keys[1, 0, 4, 3] = float("nan")
    spoiled = ops.decode_attention(q, keys, values, 9, scale=1.0)
    assert spoiled[1, 0, :16].isnan().all() and spoiled[1, 0, 16:].isfinite().all() and spoiled[0].isfinite().all()
    x = random(3, 40)
    x[1, 5] = float("inf")
    for kind in ("rms", "layer"):
        normed, _ = ops.add_norm(x, None, None, 1e-6, kind=kind)
        assert normed[0].isfinite().all() and normed[2].isfinite().all() and normed[1].isnan().any()


@needs("c++")
def test_slices_of_caches_and_other_layouts_are_taken():
    q, keys, values = attention_case(torch.float32, (4, 2, 1, 16, 30))
    expected = ops.decode_attention(q, keys, values, 30, scale=0.3)
    both = torch.stack((keys, values), 3).unbind(3)  # of one memory
    other_order = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values)]
    for caches in (both, other_order):
        assert torch.equal(ops.decode_attention(q, *caches, 30, scale=0.3), expected)
    x = random(6, 32)
    assert torch.equal(ops.activate(x[:, ::2], "gelu"), ops.activate(x[:, ::2].contiguous(), "gelu"))
    normed, _ = ops.add_norm(x[:, ::2], None, None, 1e-6, kind="rms", residual=x[:, 1::2])
    torch.testing.assert_close(normed, F.rms_norm(x[:, ::2] + x[:, 1::2], (16,), eps=1e-6))


def test_gradients_go_through_torch():
    x = random(3, 8).requires_grad_()
    ops.gated(x, "silu").sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_what_cannot_be_done_is_refused():
    q, keys, values = attention_case(torch.float32, (2, 2, 2, 8, 9))
    for length in (1, 13):
        with pytest.raises(OpError, match=f"length={length}, for 2 tokens and a cache of 12 tokens"):
            ops.decode_attention(q, keys, values, length, scale=1.0)
    how = {"heads": 2, "kv_heads": 2, "rotary_dim": 0, "interleaved": False}
    with pytest.raises(OpError, match="2 tokens at 11 do not fit into a cache of 12 tokens"):
        ops.rotary_to_cache(random(2, 2, 48), None, None, keys, values, 11, **how)
    with pytest.raises(OpError, match="no activation 'mish'; there are silu"):
        ops.gated(q, "mish")
    with pytest.raises(OpError, match="kind='batch'"):
        ops.add_norm(q, None, None, 1e-6, kind="batch")
    with pytest.raises((RuntimeError, ValueError), match=r"same shape|size"):
        ops.rotary_to_cache(random(2, 2, 48), None, None, keys, values[:, :, :3], 0, **how)
