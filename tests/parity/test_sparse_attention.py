"""Block-sparse attention against dense attention in float64 with the layout's mask, and against FlexAttention."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pairwise import covering
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from deepspeedlite.ops.sparse_attention import BlockLists, function, sparse_attention
from deepspeedlite.runtime.errors import OpError, UnsupportedError

pytestmark = needs("c++")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far numbers are from float64's, by norms: bfloat16 has its own rounding of P and dS.
FAR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def layout_of(rows: int, columns: int, heads: tuple[int, ...] = (1,), seed: int = 0) -> Tensor:
    """Half of the blocks, in runs and alone; the first row sees nothing and the last column is never seen."""
    kept = torch.rand(*heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[..., rows - 1, :] = True  # a global row
    kept[..., 0, :] = False
    if columns > 2:
        kept[..., -1] = False
    return kept


def masks_of(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    batch, heads, queries, keys = shape
    draw = torch.Generator().manual_seed(7)
    hidden = torch.rand(batch, 1, queries, keys, generator=draw) < 0.3
    hidden[0, 0, 20] = True  # a row that the layout keeps
    some = torch.rand(batch, keys, generator=draw) < 0.3
    return {
        "none": {},
        "seen": {"attn_mask": ~hidden, "key_padding_mask": ~some},
        "zeros hide": {"attn_mask": (~hidden[0, 0]).to(dtype) * 3, "key_padding_mask": (~some).long()},
        "added": {
            "attn_mask": torch.randn(queries, keys, generator=draw).masked_fill(hidden[0, 0], -torch.inf).to(dtype),
            "attn_mask_mode": "add",
            "key_padding_mask": torch.zeros(batch, keys).masked_fill(some, -10000.0),
        },
        "by rows": {"attn_mask": torch.randn(queries, 1, generator=draw).to(dtype), "attn_mask_mode": "add"},
        "positions": {"rpe": torch.randn(1, heads, queries, keys, generator=draw).to(dtype)},
        "all": {
            "attn_mask": (~hidden).mT.contiguous().mT,  # columns lie apart
            "key_padding_mask": torch.randn(batch, keys, generator=draw),
            "rpe": torch.randn(heads, queries, keys, generator=draw),
        },
    }[kind]


def dense(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, given: dict[str, Any], keep: Tensor | None = None
) -> Tensor:
    """In float64; `keep` is what dropout multiplies by. Where torch's own function can do it, it does."""
    shape = (*q.shape[:3], k.shape[2])
    bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~lists.seen, -torch.inf)
    if given.get("causal"):
        bias = bias.masked_fill(torch.ones(shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    padding = None if padding is None else padding[:, None, None]
    for one, mode in ((padding, "add"), (mask, given.get("attn_mask_mode", "mul"))):
        if one is not None and (one.dtype == torch.bool or mode == "mul"):
            bias = bias.masked_fill(one == 0, -torch.inf)
        elif one is not None:
            bias = bias + one.double()
    if "rpe" in given:
        bias = bias + given["rpe"].double()
    scale = given.get("scale")
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    nothing = (bias == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias.masked_fill(nothing, 0), -1)
    return weights.masked_fill(nothing, 0) * keep @ v


def far(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


def assert_as_dense(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensor | BlockLists, block: int, limit: float, **given: Any
) -> tuple[Tensor, ...]:
    """Results and gradients, which are returned."""
    given_tensors = [one.detach().requires_grad_() for one in (q, k, v)]
    exact = [one.detach().double().requires_grad_() for one in (q, k, v)]
    grad = numbers(*q.shape, seed=5, dtype=q.dtype)
    learned, exact_given = list(given_tensors), dict(given)
    if "rpe" in given:
        rpe = given["rpe"].detach().requires_grad_()
        exact_given["rpe"] = rpe.detach().double().requires_grad_()
        given["rpe"] = rpe
        learned.append(rpe)
        exact.append(exact_given["rpe"])
    out = sparse_attention(*given_tensors, layout, block, **given)
    lists = layout if isinstance(layout, BlockLists) else BlockLists.of(layout, block)
    expected = dense(*exact[:3], lists, exact_given)
    grads = torch.autograd.grad(out, learned, grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    for name, one, other in zip(("out", "dq", "dk", "dv", "drpe"), (out, *grads), (expected, *expected_grads)):
        assert one.dtype == q.dtype or name == "drpe"
        assert one.isfinite().all() and far(one, other) < limit, f"{name} is {far(one, other):.2e} away"
    nothing = expected.detach().abs().amax(-1) == 0
    assert nothing.any() and (out[nothing] == 0).all() and (grads[0][nothing] == 0).all()
    return (out, *grads)


CASES = covering(
    {
        "dtype": DTYPES,
        "block": (16, 32, 64, 128),
        "dim": (64, 40, 17),
        "masks": ("none", "seen", "zeros hide", "added", "by rows", "positions", "all"),
        "heads": ((1,), (2,), (2, 2)),
        "causal": (False, True),
    },
    always=[(torch.bfloat16, 128, 64, "all", (2,), True), (torch.float32, 16, 64, "none", (2,), False)],
)
CASES += (
    (torch.float32, 32, 256, "all", (2,), False),
    (torch.bfloat16, 16, 256, "none", (1,), True),
    (torch.float16, 16, 1, "none", (1,), False),
)


def check_cases(cases: list[tuple[Any, ...]]) -> None:
    for dtype, block, dim, masks, heads, causal in cases:
        queries, keys = (2 * block, 3 * block) if block > 32 else (128, 96)
        q = numbers(2, 2, queries, dim, dtype=dtype)
        k, v = numbers(2, 2, keys, dim, seed=1, dtype=dtype), numbers(2, 2, keys, dim, seed=2, dtype=dtype)
        given = masks_of(masks, (2, 2, queries, keys), dtype)
        try:
            layout = layout_of(queries // block, keys // block, heads)
            assert_as_dense(q, k, v, layout, block, FAR[dtype], causal=causal, **given)
        except AssertionError as error:
            raise AssertionError(
                f"{dtype}, block {block}, dim {dim}, masks {masks}, heads {heads}, {causal}"
            ) from error


@pytest.mark.parametrize("part", range(6))
def test_it_is_dense_attention_of_the_blocks(part):
    check_cases(CASES[part::6])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_does_the_same(isa):
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa, "OMP_NUM_THREADS": "1"}
    code = f'{BOOT}\nimport test_sparse_attention as t\nt.check_cases(t.CASES[::3])\nprint("good")'
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "good", done.stderr


def test_dropout_is_philoxs_by_an_elements_place(monkeypatch):
    """Backward drops what forward did: both are compared with P times what the paper's Philox says of every element."""
    for dtype, block, p in ((torch.float32, 16, 0.25), (torch.bfloat16, 32, 0.6), (torch.float32, 128, 0.5)):
        size = max(2 * block, 64)
        q, k, v = (numbers(2, 3, size, 32, seed=seed, dtype=dtype).requires_grad_() for seed in range(3))
        lists = BlockLists.of(layout_of(size // block, size // block), block)
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([-(2**62) + 12345, 2**40 + 7]))
        out = sparse_attention(q, k, v, lists, block, dropout_p=p)
        grad = numbers(*q.shape, seed=9, dtype=dtype)
        grads = torch.autograd.grad(out, (q, k, v), grad)
        words = philox_words(-(2**62) + 12345, 2**40 + 7, 2 * 3 * size * size).reshape(2, 3, size, size)
        keep = torch.from_numpy((words >= int(p * 2**32)) / (1 - p))
        exact = [one.detach().double().requires_grad_() for one in (q, k, v)]
        expected = dense(*exact, lists, {}, keep)
        for one, other in zip((out, *grads), (expected, *torch.autograd.grad(expected, exact, grad.double()))):
            assert far(one.detach(), other.detach()) < FAR[dtype]
    everything = sparse_attention(q, k, v, lists, block, dropout_p=1.0)
    assert (everything == 0).all()


def test_checkpointing_drops_the_same_again():
    q, k, v = (numbers(1, 2, 64, 16, seed=seed).requires_grad_() for seed in range(3))
    layout = torch.ones(4, 4)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, layout, 16, dropout_p=0.3)

    found = []
    for kept in (True, False):
        torch.manual_seed(3)
        out = attention(q, k, v) if kept else checkpoint(attention, q, k, v, use_reentrant=False)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert not torch.equal(attention(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 3), (4, 2)])
def test_the_number_of_threads_changes_no_bit(dtype, batch, heads):
    """Who does a head alone makes scores once; where threads are more than heads, gradients are made in two passes."""
    q, k, v = (numbers(batch, heads, 192, 48, seed=seed, dtype=dtype).requires_grad_() for seed in range(3))
    layout, found = layout_of(12, 12, (heads,)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = sparse_attention(q, k, v, layout, 16, causal=True)
            found.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(q))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))


def test_gradients_of_gradients_are_refused():
    q = numbers(1, 1, 16, 16).requires_grad_()
    out = sparse_attention(q, q, q, torch.ones(1, 1), 16)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    q, k, v = (numbers(1, 2, 64, 16, seed=seed).requires_grad_() for seed in range(3))
    for given in (
        {"layout": torch.zeros(4, 4)},
        {"attn_mask": torch.zeros(64, 64)},
        {"rpe": torch.full((64, 64), -torch.inf)},
    ):
        layout = given.pop("layout", torch.ones(4, 4))
        out = sparse_attention(q, k, v, layout, 16, **given)
        grads = torch.autograd.grad(out, (q, k, v), torch.full_like(q, 3.0))
        assert all((one == 0).all() for one in (out, *grads))
    v.data[0, 0, 3, 2] = torch.nan
    out = sparse_attention(q, k, v, torch.eye(4), 16)
    assert out[0, 0, :16, 2].isnan().all() and out[0, 0, 16:].isfinite().all() and out[0, 1].isfinite().all()
    q.data[0, 1, 40] = torch.nan
    out = sparse_attention(q, k, v, torch.eye(4), 16)
    assert out[0, 1, 40].isnan().all() and out[0, 1, 41:].isfinite().all()


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_a_scale_may_turn_scores_around(scale):
    q, k, v = (numbers(1, 2, 64, 16, seed=seed).mul(3).requires_grad_() for seed in range(3))
    out = sparse_attention(q, k, v, torch.ones(4, 4), 16, scale=scale, causal=True)
    exact = tuple(one.detach().double().requires_grad_() for one in (q, k, v))
    later = torch.ones(64, 64, dtype=torch.bool).triu(1)
    expected = (exact[0] @ exact[1].mT * scale).masked_fill(later, -torch.inf).softmax(-1) @ exact[2]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), exact)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_heads_may_lie_as_they_like():
    """[B, L, H, D] seen as [B, H, L, D], parts of one projection, keys that all heads share: the same."""
    block, layout = 16, layout_of(4, 4)
    qkv = numbers(2, 64, 3, 4, 24)
    q, k, v = (one.transpose(1, 2).requires_grad_() for one in qkv.unbind(2))
    out, *grads = assert_as_dense(q, k, v, layout, block, FAR[torch.float32])
    straight = assert_as_dense(*(one.contiguous() for one in (q, k, v)), layout, block, FAR[torch.float32])
    assert all(torch.equal(one, other) for one, other in zip((out, *grads), straight))
    assert out.transpose(1, 2).is_contiguous() and grads[0].transpose(1, 2).is_contiguous()
    shared = [one[:, :1].detach().clone().requires_grad_() for one in (k, v)]
    whole = [one.detach().expand(-1, 4, -1, -1).clone().requires_grad_() for one in shared]
    grad = numbers(*q.shape, seed=4).transpose(1, 2).contiguous().transpose(1, 2)
    found = sparse_attention(q, *(one.expand(-1, 4, -1, -1) for one in shared), layout, block)
    expected = sparse_attention(q, *whole, layout, block)
    assert torch.equal(found, expected)
    for one, other in zip(torch.autograd.grad(found, shared, grad), torch.autograd.grad(expected, whole, grad)):
        torch.testing.assert_close(one, other.sum(1, keepdim=True))
    odd = q.detach().mT.contiguous().mT  # a head's numbers lie apart: copied
    assert torch.equal(sparse_attention(odd, k, v, layout, block), out)
    with torch.no_grad():
        assert not sparse_attention(q, k, v, layout, block).requires_grad


@pytest.mark.parametrize("shape", [(64, 64), (2, 64, 64), (1, 1, 64, 64), (3, 1, 64, 64), (2, 1, 64), (3, 2, 64, 64)])
def test_gradients_of_positions_that_are_shared(shape):
    q, k, v = (numbers(3, 2, 64, 16, seed=seed) for seed in range(3))
    *_, found = assert_as_dense(q, k, v, layout_of(4, 4), 16, FAR[torch.float32], rpe=numbers(*shape, seed=8))
    assert found.shape == shape


def test_no_matrix_of_all_scores_is_made():
    """32,768 tokens: 4 GiB of scores in fp32, of which 1/512 are kept."""
    code = (
        "import resource, torch\nfrom deepspeedlite.ops.sparse_attention import BlockLists, sparse_attention\n"
        "q = torch.randn(1, 1, 32768, 16, requires_grad=True)\nlists = BlockLists.of(torch.eye(512), 64)\n"
        "sparse_attention(q[:, :, :64], q[:, :, :64], q[:, :, :64], torch.ones(1, 1), 64).sum().backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sparse_attention(q, q, q, lists, 64, causal=True).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
    )
    assert int(done.stdout) < 64 << 10, f"{done.stdout.strip()} KiB"  # nine tensors of 2 MiB, and what threads hold


def test_torch_does_it_where_the_op_cannot_be_had(monkeypatch):
    q, k, v = (numbers(2, 2, 64, 16, seed=seed) for seed in range(3))
    layout, masks = layout_of(4, 4, (2,)), masks_of("all", (2, 2, 64, 64), torch.float32)
    expected = assert_as_dense(q, k, v, layout, 16, FAR[torch.float32], causal=True, **masks)
    monkeypatch.setattr(function, "find_op", lambda *_: None)
    found = assert_as_dense(q, k, v, layout, 16, FAR[torch.float32], causal=True, **masks)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sparse_attention(q, k, v, layout, 16, dropout_p=0.5).isfinite().all()


def test_autocast_is_that_of_torchs_attention():
    q, k, v = (numbers(1, 1, 32, 16, seed=seed) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_attention(q, k, v, torch.ones(2, 2), 16).dtype == torch.bfloat16
    assert sparse_attention(q, k, v, torch.ones(2, 2), 16, scale=0.3).dtype == torch.float32
    for scale in (-0.5, 0.0, 2.0):
        found = sparse_attention(q, k, v, torch.ones(2, 2), 16, scale=scale)
        exact = dense(q.double(), k.double(), v.double(), BlockLists.of(torch.ones(2, 2), 16), {"scale": scale})
        assert far(found, exact) < FAR[torch.float32]


# --- FlexAttention ---------------------------------------------------------------------------------------------------


def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 40 + 16 * h)


DOCUMENTS = torch.tensor([[0] * 50 + [1] * 78, [0] * 100 + [1] * 28])


def documents(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return DOCUMENTS[b, q_idx] == DOCUMENTS[b, kv_idx]


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("mask_mod, batch, heads", [(window, None, 2), (documents, 2, None), (documents, 2, 2)])
def test_a_block_mask_of_flex_attention_is_taken_over(mask_mod, batch, heads, block):
    q, k, v = (numbers(2, 2, 128, 16, seed=seed) for seed in range(3))
    block_mask = create_block_mask(mask_mod, batch, heads, 128, 128, device="cpu", BLOCK_SIZE=block)
    lists = BlockLists.of_block_mask(block_mask)
    found = sparse_attention(q, k, v, lists, block)
    torch.testing.assert_close(found, flex_attention(q, k, v, block_mask=block_mask), rtol=1e-5, atol=1e-5)
    b, h, i, j = (torch.arange(n).view(-1, *(1,) * (3 - at)) for at, n in enumerate((2, 2, 128, 128)))
    expected = mask_mod(b, h, i, j).expand(2, 2, 128, 128)
    assert torch.equal(lists.seen.expand(2, 2, 128, 128), expected)
    back = lists.to_block_mask()
    assert torch.equal(BlockLists.of_block_mask(back).seen, lists.seen)
    torch.testing.assert_close(found, flex_attention(q, k, v, block_mask=back), rtol=1e-5, atol=1e-5)
    exact = [one.double().requires_grad_() for one in (q, k, v)]
    given = [one.clone().requires_grad_() for one in (q, k, v)]
    grads = torch.autograd.grad(sparse_attention(*given, lists, block), given, torch.ones_like(q))
    expected_grads = torch.autograd.grad(dense(*exact, lists, {}), exact, torch.ones_like(q).double())
    assert all(far(one, other) < FAR[torch.float32] for one, other in zip(grads, expected_grads))


def test_a_layout_becomes_a_block_mask():
    q, k, v = (numbers(2, 2, 128, 16, seed=seed) for seed in range(3))
    layout = layout_of(4, 4, (2,)) | torch.eye(4, dtype=torch.bool)
    lists = BlockLists.of(layout, 32)
    assert torch.equal(lists.layout[0], layout) and lists.density == layout.float().mean()
    found = flex_attention(q, k, v, block_mask=lists.to_block_mask())
    torch.testing.assert_close(sparse_attention(q, k, v, layout, 32), found, rtol=1e-5, atol=1e-5)
    for size in ((32, 64), 8):
        with pytest.raises(UnsupportedError, match=r"BlockMask of blocks"):
            BlockLists.of_block_mask(create_block_mask(window, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=size))
    with pytest.raises(UnsupportedError, match=r"for 100 queries and 100 keys"):
        BlockLists.of_block_mask(create_block_mask(window, 1, 1, 100, 100, device="cpu", BLOCK_SIZE=32))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_its_shapes():
    q, k = numbers(2, 4, 64, 16), numbers(2, 4, 128, 16)
    layout = torch.ones(4, 4)
    refused: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (r"q \[2, 4, 60, 16\].* block=16 must divide", (q[:, :, :60], q, q, layout, 16), {}),
        (r"layout \[batch, .*\] of \[1, 1, 4, 4\] for .* which are \[2, 4, 4, 8\]", (q, k, k, layout, 16), {}),
        (r"of \[1, 3, 4, 4\]", (q, q, q, torch.ones(3, 4, 4), 16), {}),
        (r"block=48 is none of 16, 32, 64, 128", (q, q, q, layout, 48), {}),
        (r"block=32, and BlockLists of 16", (q, q, q, BlockLists.of(layout, 16), 32), {}),
        (r"layout of shape \[4\]", (q, q, q, torch.ones(4), 16), {}),
        (r"k \[2, 3, 64, 16\].* they must be", (q, q[:, :3], q[:, :3], layout, 16), {}),
        (r"a head must have 1 to 256 numbers", (*[numbers(1, 1, 16, 264)] * 3, torch.ones(1, 1), 16), {}),
        (r"q is torch.float32, k torch.float16", (q, q.half(), q, layout, 16), {}),
        (r"q is torch.int64", (*[q.long()] * 3, layout, 16), {}),
        (r"attn_mask of shape \[64, 32\] does not broadcast to .*\[2, 4, 64, 64\]", (q, q, q, layout, 16),
         {"attn_mask": torch.ones(64, 32)}),
        (r"rpe of shape \[3, 64, 64\]", (q, q, q, layout, 16), {"rpe": torch.ones(3, 64, 64)}),
        (r"padding_mask of shape \[64\], not \[2, 64\]", (q, q, q, layout, 16), {"key_padding_mask": torch.ones(64)}),
        (r"attn_mask_mode='times'", (q, q, q, layout, 16), {"attn_mask_mode": "times"}),
        (r"rpe is on meta", (q, q, q, layout, 16), {"rpe": torch.ones(64, 64, device="meta")}),
        (r"q is on cpu, k on meta", (q, q.to("meta"), q, layout, 16), {}),
        (r"dropout_p=1.5", (q, q, q, layout, 16), {"dropout_p": 1.5}),
    ]  # fmt: skip
    for match, arguments, given in refused:
        with pytest.raises(OpError, match=match):
            sparse_attention(*arguments, **given)
    with pytest.raises(UnsupportedError, match="give it as rpe"):
        sparse_attention(q, q, q, layout, 16, attn_mask=torch.ones(64, 64, requires_grad=True), attn_mask_mode="add")


def philox_words(seed: int, stream: int, count: int) -> np.ndarray:
    """The first `count` words, four a block: Philox4x32-10 as Salmon et al. 2011 describe it."""
    low = np.uint64(0xFFFFFFFF)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    a, b = blocks & low, blocks >> np.uint64(32)
    c, d = (np.full_like(blocks, word) for word in (stream & 0xFFFFFFFF, stream >> 32 & 0xFFFFFFFF))
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(keys[0]),
            second & low,
            (first >> np.uint64(32)) ^ d ^ np.uint64(keys[1]),
            first & low,
        )
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack((a, b, c, d), -1).reshape(-1)[:count]
