"""What stands between a training transformer's products, against float64 and autograd, for every instruction set.

Masks of dropout are had by dropping ones; that they are Philox's bits is tested by themselves.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops import find_op
from deepspeedlite.ops.transformer import (
    Dropout,
    Norm,
    bias_gelu_linear,
    drop_add,
    drop_add_norm,
    dropout_attention,
    functions,
)
from deepspeedlite.ops.transformer import dropout as masks
from deepspeedlite.runtime.errors import OpError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NONE, SOME = Dropout(0.0), Dropout(0.3, 0x0123456789ABCDEF, 0x7EDCBA9876543210)
GUARD = 64


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def near(found: Tensor, expected: Tensor, steps: float = 1.0, sums: float = 1.0) -> None:
    """Equal up to `steps` roundings to the dtype, and float32's arithmetic on sums of numbers of about `sums`."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=max(steps * eps, 4e-6), atol=4e-6 * sums)


def mask_of(dropout: Dropout, *shape: int) -> Tensor:
    return drop_add(torch.ones(shape), None, None, dropout).double()


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_()


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if one is None else one.clone().requires_grad_() for one in tensors]


def grad_of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None and tensor.grad is not None
    return tensor.grad


# --- checks, each for one instruction set -----------------------------------------------------------------------------


def check_bits() -> None:
    for numel, ratio in ((1, 0.5), (5, 0.5), (4099, 0.1), (64, 0.999), (7, 1.0), (9, 0.0)):
        for seed, stream in ((0, 0), (-1, 2**62), (0x299F31D0A4093822, 0x0370734413198A2E)):
            dropout = Dropout(ratio, seed, stream)
            assert torch.equal(drop_add(torch.ones(numel), None, None, dropout), masks.kept(dropout, numel))
    rows = drop_add(torch.ones(40, 1030), None, None, SOME)  # in which rows begin within blocks of four
    assert torch.equal(rows, masks.kept(SOME, rows.numel()).view_as(rows))
    assert abs((rows == 0).double().mean() - SOME.ratio) < 0.01


def exact_sum(x: Tensor, bias: Any, residual: Any, mask: Tensor) -> Tensor:
    exact = (x if bias is None else x + bias) * mask
    return exact if residual is None else exact + residual


def check_norms(dtype: torch.dtype) -> None:
    for (rows, hidden), dropout, invertible, (with_bias, with_residual) in product(
        ((1, 1), (3, 7), (33, 100), (70, 1030)), (NONE, SOME), (False, True), ((True, True), (False, False))
    ):
        x, residual, g, h = (random(rows, hidden, dtype=dtype, seed=seed) for seed in range(4))
        bias, weight, shift = (random(hidden, dtype=dtype, seed=seed) for seed in (4, 5, 6))
        weight = (weight.sign() * (weight.abs() + 0.5)).to(dtype)
        given = leaves(x, bias if with_bias else None, residual if with_residual else None, weight, shift)
        exact = [leaf(one) for one in given]
        how = {"bias": given[1], "residual": given[2], "dropout": dropout, "invertible": invertible}
        summed, normed = drop_add_norm(given[0], Norm(given[3], given[4], 1e-5), **how)
        mask = mask_of(dropout, rows, hidden)
        sums = exact_sum(*exact[:3], mask)
        near(summed, sums, sums=8)
        sums = sums + (summed.double() - sums).detach()  # of which the norm is
        expected = F.layer_norm(sums, (hidden,), exact[3], exact[4], 1e-5)
        near(normed, expected, sums=8)
        only_normed = drop_add_norm(given[0], Norm(given[3], given[4], 1e-5), keep_sum=False, **how)
        assert only_normed[0] is None and torch.equal(only_normed[1], normed)
        if hidden == 1:
            continue
        if summed is given[0]:  # torch adds its gradient, in the dtype
            normed.backward(h)
            expected.backward(h.double())
        else:
            torch.autograd.backward([summed, normed], [g, h])
            torch.autograd.backward([sums, expected], [g.double(), h.double()])
        # What is made again from rounded numbers is off by their roundings, times the slope of the norm.
        steps, size = (16, 32 * 8) if invertible else (2, 32)
        loose = torch.finfo(dtype).eps / 4e-6 if invertible and dtype != torch.float32 else 0
        for name, one, other in zip(("x", "bias", "residual", "weight", "shift"), given, exact):
            if one is not None:
                many = 8 if name in ("bias", "weight", "shift") else 1
                near(grad_of(one), grad_of(other), steps=steps, sums=size * many + loose * many)


def check_sums_alone(dtype: torch.dtype) -> None:
    for (rows, hidden), dropout in product(((2, 3), (37, 260)), (NONE, SOME)):
        x, residual, g = (random(rows, hidden, dtype=dtype, seed=seed) for seed in range(3))
        given = leaves(x, random(hidden, seed=3), residual)
        exact = [leaf(one) for one in given]
        found = drop_add(*given, dropout)
        expected = (exact[0] + exact[1]) * mask_of(dropout, rows, hidden) + exact[2]
        near(found, expected, sums=4)
        found.backward(g)
        expected.backward(g.double())
        for one, other in zip(given, exact):
            near(grad_of(one), grad_of(other), sums=16)


def check_gelus(dtype: torch.dtype) -> None:
    forward, backward = (functions._op(name, random(1), False) for name in ("bias_gelu", "bias_gelu_backward"))
    for (rows, width), dropout, tanh_form in product(((1, 1), (5, 63), (67, 1100)), (NONE, SOME), (False, True)):
        x, g = 3 * random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
        bias, out, again = random(width, dtype=dtype, seed=2), torch.empty_like(x), torch.empty_like(x)
        exact = [leaf(x), leaf(bias)]
        value = exact[0] + exact[1]
        expected = F.gelu(value, approximate="tanh" if tanh_form else "none") * mask_of(dropout, rows, width)
        expected.backward(g.double())
        forward(x, bias, out, tanh_form, *dropout)
        near(out, expected, sums=2)
        grad_bias, parts = torch.empty(width), torch.empty(-(-rows // functions.PART) * width)
        backward(g, x, bias, g, grad_bias, parts, again, tanh_form, *dropout)  # over what it is given
        near(g, grad_of(exact[0]), sums=4)
        near(grad_bias, grad_of(exact[1]), sums=64)
        assert torch.equal(again, out)


def check_gelu_products(dtype: torch.dtype) -> None:
    for dropout, recompute in product((NONE, SOME), (False, True)):
        given = leaves(random(35, 20, dtype=dtype), random(20, dtype=dtype, seed=1), random(7, 20, dtype=dtype))
        exact = [leaf(one) for one in given]
        found = bias_gelu_linear(*given, dropout=dropout, recompute=recompute)
        expected = (F.gelu(exact[0] + exact[1]) * mask_of(dropout, 35, 20)) @ exact[2].t()
        g = random(35, 7, dtype=dtype)
        found.backward(g)
        expected.backward(g.double())
        loose = torch.finfo(dtype).eps / 4e-6
        near(found, expected, steps=4, sums=8 * loose)
        for one, other in zip(given, exact):
            near(grad_of(one), grad_of(other), steps=4, sums=16 * loose)


def mask_cases(batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor | None]:
    seen = random(1, 1, queries, keys) > -1
    seen[..., 0] = True
    apart = random(keys, batch, 1, 1, seed=9).permute(1, 2, 3, 0)  # with steps between keys
    return [None, random(batch, 1, 1, keys, dtype=dtype), seen, random(batch, heads, queries, keys), apart]


def check_softmax(dtype: torch.dtype) -> None:
    softmax, backward = (
        functions._op("masked_softmax", random(1), False),
        functions._op("masked_softmax_backward", random(1), False),
    )
    shape = (2, 3, 5)
    for keys, dropout in product((1, 13, 64, 1030), (NONE, SOME)):
        for mask in mask_cases(*shape, keys, dtype):
            scores, g = (3 * random(*shape, keys, dtype=dtype, seed=seed) for seed in range(2))
            exact = leaf(scores)
            wide = exact * 0.7
            if mask is not None:
                wide = wide.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else wide + mask.double()
            kept = mask_of(dropout, *shape, keys)
            expected = wide.softmax(-1)
            probs, dropped = torch.empty_like(scores), torch.empty_like(scores)
            softmax(scores, mask, probs, dropped, 0.7, *dropout)
            near(probs, expected, steps=2)
            near(dropped, expected * kept, steps=2)
            over = scores.clone()
            softmax(over, mask, None, over, 0.7, *dropout)
            assert torch.equal(over, dropped)
            (expected * kept).backward(g.double())
            backward(g, probs, g, 0.7, *dropout)  # over what it is given
            near(g, grad_of(exact), steps=8, sums=8 * max(1.0, torch.finfo(dtype).eps / 4e-6))


def check_attention(dtype: torch.dtype) -> None:
    batch, tokens, heads, dim = 2, 19, 3, 8
    loose = 8 * torch.finfo(dtype).eps / 4e-6
    for dropout, recompute in product((NONE, SOME), (False, True)):
        qkv, g = random(batch, tokens, 3 * heads * dim, dtype=dtype), random(batch, tokens, heads * dim, dtype=dtype)
        mask = torch.where(random(batch, 1, 1, tokens) > 1, -10000.0, 0.0)
        given, exact = qkv.clone().requires_grad_(), leaf(qkv)
        found = dropout_attention(given, heads, mask=mask, dropout=dropout, recompute=recompute)
        q, k, v = exact.view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
        probs = (q @ k.transpose(-1, -2) / dim**0.5 + mask.double()).softmax(-1)
        expected = (probs * mask_of(dropout, *probs.shape)) @ v
        expected = expected.transpose(1, 2).reshape(batch, tokens, -1)
        near(found, expected, steps=4, sums=loose)
        found.backward(g)
        expected.backward(g.double())
        near(grad_of(given), grad_of(exact), steps=8, sums=2 * loose)


CHECKS = (check_norms, check_sums_alone, check_gelus, check_gelu_products, check_softmax, check_attention)


def check_everything() -> None:
    check_bits()
    for check, dtype in product(CHECKS, DTYPES):
        check(dtype)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_do_what_autograd_does_in_float64(check, dtype):
    check(dtype)


@needs("c++")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_does_the_same(isa):
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa, "OMP_NUM_THREADS": "1"}
    code = f'{BOOT}\nimport test_transformer_kernels\ntest_transformer_kernels.check_everything()\nprint("good")'
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "good", done.stderr


@pytest.mark.slow
def test_torch_does_the_same_where_there_is_no_op(monkeypatch):
    monkeypatch.setattr(functions, "find_op", lambda *_: None)
    for check in CHECKS:
        check(torch.float32)


def test_random_bits_are_philoxs():
    """Random123's known answers for Philox4x32-10."""
    for seed, stream, block, expected in (
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        (-1, -1, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        signed = block - 2**64 if block >= 2**63 else block
        found = masks._philox(seed, stream, torch.tensor([signed]))[0]
        assert [f"{word:08x}" for word in found.tolist()] == expected.split()
    check_bits()


@needs("c++")
def test_the_number_of_threads_changes_no_bit():
    def run() -> list[Tensor]:
        given = leaves(
            random(300, 200), random(200, seed=1), random(300, 200, seed=2), random(200), random(200, seed=3)
        )
        summed, normed = drop_add_norm(
            given[0], Norm(given[3], given[4], 1e-5), bias=given[1], residual=given[2], dropout=SOME
        )
        x, bias, weight = leaves(random(300, 200), random(200, seed=4), torch.eye(200))
        active = bias_gelu_linear(x, bias, weight, dropout=SOME)
        torch.autograd.backward([summed, normed, active], [random(300, 200, seed=seed) for seed in (5, 6, 7)])
        softened = torch.empty(4, 3, 25, 40)
        functions._op("masked_softmax", x, False)(random(4, 3, 25, 40), None, None, softened, 1.0, *SOME)
        return [summed, normed, active, softened, *(grad_of(one) for one in (*given, x, bias))]

    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))


@needs("c++")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_tensors_is_written(dtype):
    guarded: list[Tensor] = []

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        numel = torch.Size(shape).numel()
        guarded.append(torch.full((numel + 2 * GUARD,), -77.0, dtype=like))
        return guarded[-1][GUARD : GUARD + numel].view(shape)

    for rows, width in ((1, 1), (35, 67), (3, 1025)):
        x, g, w = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1), random(width)
        floats = {"like": torch.float32}
        mean, rstd = empty(rows, **floats), empty(rows, **floats)
        summed, normed = empty(rows, width), empty(rows, width)
        find_op("drop_norm")(x, w, x, w, w, summed, normed, mean, rstd, 1e-5, *SOME)
        parts = -(-rows // functions.PART)
        sums = [empty(width, **floats) for _ in range(3)]
        find_op("drop_norm_backward")(
            *(g, g, summed, None, w, w, mean, rstd, empty(rows, width), empty(rows, width)),
            *(*sums, empty(parts * 3 * width, **floats), *SOME),
        )
        find_op("bias_gelu")(x, w, empty(rows, width), True, *SOME)
        find_op("bias_gelu_backward")(
            *(g, x, w, empty(rows, width), empty(width, **floats), empty(parts * width, **floats)),
            *(empty(rows, width), False, *SOME),
        )
        scores = x.view(1, 1, rows, width)
        probs, dropped = empty(1, 1, rows, width), empty(1, 1, rows, width)
        find_op("masked_softmax")(scores, None, probs, dropped, 1.0, *SOME)
        find_op("masked_softmax_backward")(g.view_as(probs), probs, empty(1, 1, rows, width), 1.0, *SOME)
    for buffer in guarded:
        assert (buffer[:GUARD] == -77).all() and (buffer[-GUARD:] == -77).all()


def test_what_is_not_a_number_spoils_its_row_alone():
    x, weight = random(4, 70), torch.ones(70)
    for bad in (math.nan, math.inf):
        x[1, 40] = bad
        _, normed = drop_add_norm(x, Norm(weight, weight, 1e-5), bias=weight)
        assert normed[1].isnan().all() and normed[[0, 2, 3]].isfinite().all()
        probs = torch.empty(1, 1, 4, 70)
        functions._op("masked_softmax", x, False)(x.view_as(probs), None, probs, None, 1.0, *NONE)
        assert probs[0, 0, 1].isnan().all() and probs[0, 0, [0, 2, 3]].isfinite().all()
    active = bias_gelu_linear(torch.tensor([[math.nan, 1.0]]), None, torch.eye(2))
    assert active.isnan().all()  # by the product
    qkv = random(1, 3, 6).requires_grad_()
    nothing = dropout_attention(qkv, 1, mask=torch.zeros(1, 1, 3, 3, dtype=torch.bool), dropout=SOME)
    nothing.sum().backward()
    assert (nothing == 0).all() and (grad_of(qkv) == 0).all()


def test_the_largest_numbers_have_slopes_of_gelu():
    """Also where their squares are infinite."""
    x = torch.tensor([3e38, 1e25, -1e25, -3e38] * 5).view(2, 10).requires_grad_()
    bias_gelu_linear(x, None, torch.eye(10), tanh_form=True).sum().backward()
    assert torch.equal(grad_of(x), (x > 0).float())


def test_scores_that_fp16_holds_once_they_are_scaled():
    qkv = (random(1, 5, 3 * 64) * 90).half()
    q, k, _ = qkv.double().view(5, 3, 64).unbind(1)
    assert (q @ k.T).abs().max() > 65504
    wide = leaf(qkv)
    qkv.requires_grad_()
    found, expected = (dropout_attention(one, 1) for one in (qkv, wide))
    for one in (found, expected):
        one.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0.5)
    assert grad_of(qkv).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_where_there_are_no_tokens(shape):
    qkv = torch.zeros(*shape, 12, requires_grad=True)
    mixed = dropout_attention(qkv, 2, dropout=SOME)
    mixed.sum().backward()
    assert mixed.shape == (*shape, 4) and grad_of(qkv).shape == qkv.shape
    bias = torch.ones(12, requires_grad=True)
    drop_add(qkv, bias, None, SOME).sum().backward()
    assert (grad_of(bias) == 0).all()


def test_all_or_nothing_may_be_dropped():
    x = random(3, 8)
    assert torch.equal(drop_add(x, None, x, Dropout(1.0)), x)
    assert torch.equal(drop_add(x, torch.zeros(8), None, Dropout(0.0)), x)


def test_weights_of_zero_can_be_inverted_around():
    x, weight, shift = leaves(random(5, 12), random(12, seed=1), random(12, seed=2))
    with torch.no_grad():
        weight[3] = 0
    drop_add_norm(x, Norm(weight, shift, 1e-5), invertible=True)[1].backward(random(5, 12, seed=3))
    for one in (x, weight, shift):
        assert grad_of(one).isfinite().all()
    assert grad_of(weight)[3] == 0


@needs("c++")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stochastic_mode_stays_near(dtype):
    """Sums in another order, variances in one pass, exponentials to 2^-17: no more than that."""
    exactly, anyhow = (functions._op("masked_softmax", random(1), stochastic) for stochastic in (False, True))
    assert exactly is not anyhow and anyhow is find_op("stochastic_masked_softmax")
    scores = 3 * random(2, 2, 70, 133, dtype=dtype)
    found = []
    for op in (exactly, anyhow):
        found.append(torch.empty_like(scores))
        op(scores, None, None, found[-1], 1.0, *SOME)
    assert torch.equal(found[0] == 0, found[1] == 0), "other numbers were dropped"
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1], found[0], rtol=max(2**-15, eps), atol=2**-24)
    if dtype == torch.float32:
        assert not torch.equal(*found), "it does nothing of its own"
    results: list[list[Tensor]] = []
    for stochastic in (False, True):
        given = leaves(
            *(random(300, 200, dtype=dtype), random(200, dtype=dtype, seed=1), random(300, 200, dtype=dtype, seed=2)),
            *(random(200, dtype=dtype, seed=seed) for seed in (3, 4)),
        )
        x, bias, weight = leaves(random(300, 200, dtype=dtype), random(200, dtype=dtype), torch.eye(200, dtype=dtype))
        how = {"dropout": SOME, "stochastic": stochastic}
        pair = drop_add_norm(given[0], Norm(given[3], given[4], 1e-5), bias=given[1], residual=given[2], **how)
        active = bias_gelu_linear(x, bias, weight, **how)
        torch.autograd.backward([*pair, active], [random(300, 200, dtype=dtype, seed=seed) for seed in (5, 6, 7)])
        results.append([*pair, active, *(grad_of(one) for one in (*given, x, bias))])
    for one, other in zip(*results):
        assert torch.equal(one == 0, other == 0)
        torch.testing.assert_close(
            other, one, rtol=2 * eps, atol=max(2e-5, 0.5 * eps) * one.detach().abs().max().item()
        )


def test_what_does_not_go_together_is_refused():
    x, weight = random(4, 8), torch.ones(8)
    with pytest.raises(OpError, match=r"the residual is \[4, 9\]"):
        drop_add_norm(x, Norm(weight, weight, 1e-5), residual=random(4, 9))
    with pytest.raises(OpError, match=r"drop_add_norm: bias is \[7\]"):
        drop_add_norm(x, Norm(weight, weight, 1e-5), bias=torch.ones(7))
    with pytest.raises(OpError, match=r"x is \[4, 8\] of torch.int64"):
        drop_add(x.long(), None, None, NONE)
    with pytest.raises(OpError, match=r"the weight is \[8, 8\] of torch.bfloat16"):
        bias_gelu_linear(x, None, torch.eye(8, dtype=torch.bfloat16))
    with pytest.raises(OpError, match="for 5 heads"):
        dropout_attention(random(2, 3, 24), 5)
    for mask, said in (
        (torch.ones(2, 4), r"lie over scores \[2, 2, 3, 3\]"),
        (torch.ones(2, 3, dtype=torch.int64), "make it bool"),
        (torch.ones(2, 1, 1, 3, requires_grad=True), "detach it"),
    ):
        with pytest.raises(OpError, match=said):
            dropout_attention(random(2, 3, 24), 2, mask=mask, dropout=SOME)


@needs("c++")
def test_the_op_names_the_tensor_that_is_wrong():
    x = random(4, 8)
    for arguments, said in (
        ((x, None, None, x[0], x[0], None, x, None, None), "a norm needs weight, shift, mean and rstd"),
        ((x, x[:, 0], None, None, None, x, None, None, None), "bias is not contiguous"),
        ((x, None, None, None, None, x[:2], None, None, None), "summed has 16 elements, not 32"),
        ((x, None, None, None, None, x.double(), None, None, None), "summed must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=said):
            find_op("drop_norm")(*arguments, 1e-5, *NONE)
