"""Block-sparse attention's GPU kernels, on fibers, or on a GPU, against dense attention in float64 and its gradients.

With waves of 32 products of 16-bit numbers are NVIDIA's, with waves of 64 AMD's; `plain` is a GPU without tensor cores.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gpu_kernels import DEVICES, Device
from paths import ROOT
from test_inference_gpu_kernels import DTYPES, FLOAT, INT32, INT64, POINTER, TENSOR, given, random, struct
from test_transformer_gpu_kernels import CDropout, dropout, factors, pointer
from torch import Tensor

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

SOURCE = str(ROOT / "csrc" / "sparse_attn" / "sparse_attn.cu")
CHeads = struct("CHeads", x=TENSOR, batch__head__token=INT64)
CBlocks = struct("CBlocks", starts__blocks__partial=POINTER)
CBias = struct("CBias", x=TENSOR, kind=INT32, batch__head__row__column=INT64)
CSparse = struct(
    "CSparse",
    q__k__v__out=CHeads,
    lse=POINTER,
    dout=CHeads,
    delta=POINTER,
    dq__dk__dv=CHeads,
    dpositions=POINTER,
    dpositions_batch__dpositions_head=INT64,
    by_row__by_column=CBlocks,
    list_batch__list_head=INT64,
    partial_masks=POINTER,
    mask__padding__positions=CBias,
    batch__heads__queries__keys__dim__block=INT64,
    scale=FLOAT,
    causal=INT32,
    dropout=CDropout,
)
ADDED, HIDES_ZEROS, SEEN = 1, 2, 3


class Case(NamedTuple):
    """What attention is asked for. Blocks of queries and keys, and what is between scores and weights."""

    block: int
    rows: int
    columns: int
    dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: int = 0
    padding: int = 0
    positions: int = 0
    ratio: float = 0.0
    lists: tuple[int, int] = (1, 1)  # batches and heads that have layouts of their own
    partial: bool = False
    plain: bool = False
    steps: bool = False  # heads beside each other in a token, and keys that two heads share


FP32, BF16, FP16 = DTYPES
CASES = (
    Case(16, 5, 7, 20, FP32, mask=ADDED, ratio=0.3, lists=(2, 2), partial=True),
    Case(16, 6, 6, 64, BF16, causal=True, padding=ADDED, steps=True),
    Case(16, 3, 3, 256, FP32, causal=True, positions=ADDED),
    Case(16, 4, 2, 130, FP16, mask=HIDES_ZEROS, padding=SEEN, ratio=0.5),
    Case(32, 3, 4, 64, BF16, mask=SEEN, positions=ADDED, ratio=0.2, lists=(1, 2), partial=True),
    Case(32, 3, 3, 33, FP32, causal=True, padding=HIDES_ZEROS, steps=True),
    Case(32, 2, 3, 7, BF16, ratio=0.1, plain=True),
    Case(64, 2, 2, 256, BF16, causal=True, ratio=0.25, partial=True),
    Case(64, 2, 3, 96, FP16, lists=(2, 1), positions=ADDED),
    Case(64, 2, 1, 40, FP16, mask=ADDED, plain=True, partial=True, steps=True),
    Case(128, 1, 2, 24, FP32, mask=SEEN, ratio=0.4),
    Case(128, 2, 1, 72, BF16, causal=True, padding=ADDED, lists=(1, 2)),
)
BATCH, HEADS = 2, 2


class Attention:
    """A case's tensors, the C struct of them, and what must come out."""

    def __init__(self, case: Case, device: Device) -> None:
        self.case, self.device = case, device
        self.queries, self.keys = case.rows * case.block, case.columns * case.block
        self.generator = torch.Generator().manual_seed(sum(case[:4]))
        self.layout = torch.rand(*case.lists, case.rows, case.columns, generator=self.generator) < 0.6
        self.layout[:, :, 0], self.layout[:, :, -1, 0] = case.rows == 1, True  # nothing, and surely something
        self.kept: list[Any] = []  # what the struct points to
        self.q, self.k, self.v, self.dout = (
            self.heads(tokens, seed) for seed, tokens in enumerate((self.queries, self.keys, self.keys, self.queries))
        )
        self.number = torch.full((*case.lists, case.rows, case.columns), -1, dtype=torch.int32)
        self.masks = torch.rand(4, case.block, case.block, generator=self.generator) < 0.7
        if case.partial:
            self.number = torch.randint(-1, 4, self.number.shape, generator=self.generator, dtype=torch.int32)
        shape = (BATCH, HEADS, self.queries, self.keys)
        self.biases = [
            self.bias(case.mask, (1, 1, *shape[2:])),
            self.bias(case.padding, (BATCH, 1, 1, self.keys)),
            self.bias(case.positions, (*case.lists, *shape[2:])),
        ]
        self.dropout = dropout(case.ratio)

    def heads(self, tokens: int, seed: int) -> Tensor:
        """(batch, heads, tokens, dim); with `steps` neither heads nor tokens lie side by side."""
        dim, dtype = self.case.dim, self.case.dtype
        if not self.case.steps:
            return random(BATCH, HEADS, tokens, dim, dtype=dtype, seed=seed)
        if seed == 1:
            return random(BATCH, 1, tokens, dim, dtype=dtype, seed=seed).expand(-1, HEADS, -1, -1)
        return random(BATCH, tokens, HEADS, dim + 3, dtype=dtype, seed=seed).transpose(1, 2)[..., 1 : dim + 1]

    def bias(self, kind: int, shape: tuple[int, ...]) -> tuple[int, Tensor | None]:
        if not kind:
            return 0, None
        seen = torch.rand(shape, generator=self.generator) < 0.8
        if kind == SEEN:
            return kind, seen
        numbers = random(*shape, dtype=self.case.dtype, seed=kind)
        return kind, numbers.masked_fill(~seen, -torch.inf if kind == ADDED else 0)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of float64 with all scores at once: out, the scores, and which rows see nothing."""
        case = self.case
        seen = torch.ones(*case.lists, case.rows, case.columns, case.block, case.block, dtype=torch.bool)
        seen[self.number >= 0] = self.masks[self.number[self.number >= 0].long()]
        seen = (seen & self.layout[..., None, None]).transpose(3, 4).flatten(4).flatten(2, 3)
        scores = q @ k.mT * 0.3 + positions
        if case.causal:
            seen = seen & torch.ones(self.queries, self.keys, dtype=torch.bool).tril()
        for kind, numbers in self.biases[:2]:
            if kind == ADDED:
                scores = scores + numbers.double()
            elif kind:
                seen = seen & (numbers != 0)
        scores = scores.masked_fill(~seen, -torch.inf)
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return weights * factors(self.dropout, *weights.shape) @ v, scores, nothing

    def lists(self, layout: Tensor, number: Tensor) -> ctypes.Structure:
        starts = torch.cat((torch.zeros(1), layout.sum(-1).flatten().cumsum(0))).int()
        kept = (starts, layout.nonzero()[:, -1].int(), number[layout].contiguous())
        self.kept.append(kept)
        return CBlocks(*(pointer(one) for one in kept[:2]), pointer(kept[2]) if self.case.partial else None)

    def described(self, tensor: Tensor | None) -> ctypes.Structure:
        return CHeads() if tensor is None else CHeads(given(tensor), *tensor.stride()[:3])

    def call(
        self, function: str, lse: Tensor, out: Tensor, grads: tuple[Tensor, ...] = (), delta=None, dpositions=None
    ) -> None:
        shape = (BATCH, HEADS, self.queries, self.keys)
        biases = []
        for kind, numbers in self.biases:
            steps = (0,) * 4 if numbers is None else numbers.expand(shape).stride()
            biases.append(CBias(given(numbers), kind, *steps))
        case, by_batch, by_head = self.case, *self.case.lists
        how = CSparse(
            *map(self.described, (self.q, self.k, self.v, out)),
            *(pointer(lse), self.described(self.dout if grads else None), pointer(delta)),
            *map(self.described, grads or (None,) * 3),
            *(pointer(dpositions), biases[-1].batch, biases[-1].head),
            *(self.lists(self.layout, self.number), self.lists(self.layout.mT, self.number.mT)),
            *(by_head if by_batch > 1 else 0, 1 if by_head > 1 else 0, pointer(self.masks)),
            *biases,
            *(BATCH, HEADS, self.queries, self.keys, case.dim, case.block, 0.3, case.causal, self.dropout),
        )
        if self.device.on_host:
            self.device.library.dsl_host_plain_products(case.plain)
        self.device.call(function, how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sparse")


@pytest.fixture(params=DEVICES)
def device(request, folder) -> Device:
    return Device.of(request.param, [SOURCE], folder)


def assert_near(found: Tensor, expected: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Weights are rounded to the dtype before the second product, and so are results."""
    eps = torch.finfo(dtype or found.dtype).eps
    bound = (2 * eps if eps > 1e-6 else 20 * eps) * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=bound, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.block}-{case.dim}-{case.dtype}"[:14])
def test_attention_and_its_gradients(device, case):
    how = Attention(case, device)
    wide = [tensor.double().requires_grad_() for tensor in (how.q, how.k, how.v)]
    _, relative = how.biases[-1]
    positions = (torch.zeros(()) if relative is None else relative).double().requires_grad_()
    expected, scores, nothing = how.dense(*wide, positions)
    expected.backward(how.dout.double())
    out = device.empty(BATCH, how.queries, HEADS, case.dim, dtype=case.dtype).transpose(1, 2)
    lse, delta = (device.empty(BATCH, HEADS, how.queries, dtype=torch.float32) for _ in range(2))
    how.call("dsl_gpu_sparse_forward", lse, out)
    assert_near(out, expected.detach(), "out")
    logarithms = scores.detach().logsumexp(-1).masked_fill(nothing[..., 0], torch.inf)
    torch.testing.assert_close(lse.double(), logarithms, rtol=1e-5, atol=2e-5)
    if case.rows > 1:
        assert nothing.any() and (out[nothing.expand_as(out)] == 0).all()
    grads = tuple(
        device.empty(BATCH, tokens, HEADS, case.dim, dtype=case.dtype).transpose(1, 2)
        for tokens in (how.queries, how.keys, how.keys)
    )
    dpositions = None if relative is None else device.empty(*relative.shape, dtype=torch.float32).zero_()
    how.call("dsl_gpu_sparse_backward", lse, out, grads, delta, dpositions)
    for name, found, leaf in zip(("dq", "dk", "dv"), grads, wide):
        assert_near(found, leaf.grad, name)
    if dpositions is not None:
        assert_near(dpositions, positions.grad, f"dpositions, {case.dtype}", case.dtype)
    assert (grads[0][nothing.expand_as(out)] == 0).all()
