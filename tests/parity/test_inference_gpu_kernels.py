"""The GPU kernels between and in a transformer's products, on fibers or on a GPU, against float64.

They are called through their C ABI, as bindings do. What they write lies between guards that must stay as they were.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import pytest
import torch
from gpu_kernels import DEVICES, CTensor, Device
from paths import ROOT
from test_packed_linear import exact_weight, layer
from torch import Tensor

from deepspeedlite.ops import inference_reference as reference
from deepspeedlite.ops.packed_linear import PackedLinear

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

SOURCES = sorted(str(file) for file in (ROOT / "csrc" / "transformer_inference").glob("*.cu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSOR, INT64, INT32, FLOAT, POINTER = CTensor, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


def struct(name: str, **fields: object) -> type[ctypes.Structure]:
    """A struct of the C ABI: fields by name, several of a type joined by two underscores."""
    each = [(one, kind) for names, kind in fields.items() for one in names.split("__")]
    return type(name, (ctypes.Structure,), {"_fields_": each})


CNorm = struct(
    "CNorm", x__residual__weight__bias__normed__summed=TENSOR, hidden=INT64, eps=FLOAT, layer__unit_offset=INT32
)
CRotary = struct(
    "CRotary",
    qkv__cos__sin=TENSOR,
    cos_batch__cos_token=INT64,
    q__keys__values=TENSOR,
    kv_batch__kv_head__kv_token__tokens__heads__kv_heads__dim__rotary_dim=INT64,
    interleaved=INT32,
)
CAttention = struct(
    "CAttention",
    q=POINTER,
    queries=TENSOR,
    scale=FLOAT,
    keys__values=TENSOR,
    kv_batch__kv_head__kv_token=INT64,
    out=TENSOR,
    mask=POINTER,
    mask_batch=INT64,
    slopes=POINTER,
    heads__kv_heads__tokens__dim__length__window=INT64,
    softcap=FLOAT,
    chunks=INT64,
    parts=POINTER,
)
CGate = struct("CGate", x__out=TENSOR, width=INT64, activation__gated=INT32)
CProduct = struct(
    "CProduct",
    x=POINTER,
    x_stride__rows__width__out=INT64,
    bits=INT32,
    weight=TENSOR,
    scales=POINTER,
    group=INT64,
    bias__y=TENSOR,
    high__low__sums__integers_scales=POINTER,
    input=TENSOR,
    columns=INT64,
)


def given(tensor: Tensor | None) -> CTensor:
    number = DTYPES.index(tensor.dtype) if tensor is not None and tensor.dtype in DTYPES else 0
    return CTensor(None if tensor is None else tensor.data_ptr(), number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(params=DEVICES)
def device(request, folder) -> Device:
    return Device.of(request.param, SOURCES, folder)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_near(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    eps = torch.finfo(found.dtype).eps
    expected = expected.to(found.dtype).double()  # what is too large for it is infinite
    torch.testing.assert_close(found.double(), expected, rtol=max(eps, 4e-6), atol=4e-6 * scale)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(device, dtype, kind):
    for hidden, with_residual in product((7, 128, 333), (False, True)):
        x, residual = random(3, hidden, dtype=dtype), random(3, hidden, dtype=dtype, seed=1)
        weight, bias = random(hidden, dtype=dtype, seed=2), random(hidden, seed=3) if kind == "layer" else None
        normed, summed = (device.empty(3, hidden, dtype=dtype) for _ in range(2))
        tensors = (x, residual if with_residual else None, weight, bias, normed, summed if with_residual else None)
        how = CNorm(*map(given, tensors), hidden, 1e-5, kind == "layer", kind == "rms")
        device.call("dsl_gpu_norm", how, INT64(3))
        kept = x + residual if with_residual else x
        assert not with_residual or torch.equal(summed, kept)
        wide = [None if one is None else one.double() for one in (kept, weight, bias)]
        assert_near(normed, reference.add_norm(*wide, 1e-5, kind=kind, unit_offset=kind == "rms")[0], scale=4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_positions_on_the_way_to_the_cache(device, dtype, interleaved):
    for heads, kv_heads, dim, rotary_dim in ((4, 2, 16, 16), (3, 1, 10, 6), (2, 2, 7, 0)):
        batch, tokens, start, room = 2, 3, 2, 6
        qkv = random(batch, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        positions = [random(1, tokens, rotary_dim, seed=seed) if rotary_dim else None for seed in (1, 2)]
        q = device.empty(batch, heads, tokens, dim, dtype=dtype)
        caches = [device.empty(batch, kv_heads, room, dim, dtype=dtype).fill_(5) for _ in range(2)]
        exact = [cache.double() for cache in caches]
        written = [given(cache[:, :, start:]) for cache in caches]
        shape = (kv_heads * room * dim, room * dim, dim, tokens, heads, kv_heads, dim, rotary_dim)
        how = CRotary(given(qkv), *map(given, positions), 0, rotary_dim, given(q), *written, *shape, interleaved)
        device.call("dsl_gpu_rotary", how, INT64(batch))
        wide = [None if one is None else one.double() for one in positions]
        kinds = {"heads": heads, "kv_heads": kv_heads, "rotary_dim": rotary_dim, "interleaved": interleaved}
        assert_near(q, reference.rotary_to_cache(qkv.double(), *wide, *exact, start, **kinds), scale=4)
        for cache, expected in zip(caches, exact):
            assert_near(cache, expected, scale=4)


ATTENTION = (  # heads, kv_heads, tokens, dim, length
    ((4, 4, 1, 64, 33), {}),
    ((6, 2, 3, 20, 70), {"slopes": True, "masked": True}),
    ((10, 1, 1, 16, 550), {"softcap": 2.0, "window": 40}),
    ((2, 2, 2, 130, 600), {"masked": True}),
)


@pytest.mark.parametrize(("shape", "extras"), ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_attention_over_the_cache(device, dtype, shape, extras):
    (heads, kv_heads, tokens, dim, length), batch, room = shape, 2, shape[-1] + 3
    q = random(batch, heads, tokens, dim, dtype=dtype)
    keys, values = (random(batch, kv_heads, room, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    mask = slopes = None
    if extras.get("masked"):
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.6
        mask[0] = False  # this sequence sees nothing
    if extras.get("slopes"):
        slopes = torch.arange(1.0, heads + 1) / heads
    softcap, window, chunks = extras.get("softcap", 0.0), extras.get("window", 0), -(-length // 512)
    out = device.empty(batch, tokens, heads * dim, dtype=dtype)
    parts = device.empty(batch * heads * tokens * chunks * (dim + 2), dtype=torch.float32)
    how = CAttention(
        *(None, given(q), 0.3, given(keys), given(values), kv_heads * room * dim, room * dim, dim, given(out)),
        *(None if mask is None else mask.data_ptr(), length, None if slopes is None else slopes.data_ptr()),
        *(heads, kv_heads, tokens, dim, length, window, softcap, chunks, parts.data_ptr()),
    )
    device.call("dsl_gpu_attention", how, INT64(batch))
    wide = (q.double(), keys.double(), values.double())
    exact = reference.decode_attention(
        *wide, length, scale=0.3, mask=mask, slopes=slopes, softcap=softcap, window=window
    )
    assert_near(out, exact, scale=4)


@pytest.mark.parametrize("number", range(len(reference.ACTIVATIONS)))
def test_activations_and_gates(device, number):
    name = list(reference.ACTIVATIONS)[number]
    for dtype in DTYPES:
        x = torch.cat((random(3, 2 * 70) * 4, torch.tensor([0.0, 30.0, -30.0, 90.0, -90.0]).repeat(1, 28).view(1, 140)))
        x = x.to(dtype)
        out = device.empty(4, 70, dtype=dtype)
        device.call("dsl_gpu_gate", CGate(given(x), given(out), 70, number, 1), INT64(out.numel()))
        assert_near(out, reference.gated(x.double(), name), scale=100)
        out = device.empty(4, 140, dtype=dtype)
        device.call("dsl_gpu_gate", CGate(given(x), given(out), x.numel(), number, 0), INT64(x.numel()))
        assert_near(out, reference.activate(x.double(), name), scale=10)


def c_product(packed: PackedLinear, x: Tensor | None, y: Tensor | None) -> ctypes.Structure:
    width = packed.in_features
    if packed.scales is not None:
        width += -width % packed.group_size
    scales = None if packed.scales is None else packed.scales.data_ptr()
    return CProduct(
        *(None, 0, 0 if x is None else len(x), width, packed.out_features, packed.bits or 0, given(packed.weight)),
        *(scales, packed.group_size, given(packed.bias), given(y), None, None, None, None, given(x)),
        packed.in_features,
    )


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_few_rows_and_packed_weights_made_whole(device, dtype, bits):
    for (out, width), rows in product(((1, 1), (16, 64), (33, 100), (20, 320)), (1, 3, 8)):
        packed, x = layer(out, width, dtype, bits, 32), random(rows, width, dtype=dtype)
        y = device.empty(rows, out, dtype=dtype)
        device.call("dsl_gpu_product", c_product(packed, x, y))
        expected = x.double() @ exact_weight(packed).T + packed.bias.double()
        assert_near(y, expected, scale=10)
        if bits:
            whole = device.empty(out, width, dtype=dtype)
            device.call("dsl_gpu_unpack", c_product(packed, None, None), given(whole))
            assert torch.equal(whole, exact_weight(packed).to(dtype))
