"""The GPU kernels, executed: compiled for the host (csrc/common/gpu_on_host.h) and, where there is one, for the GPU.

Both are called through the C ABI with the same tensors, so a test body does not know where it runs. Expected values are
computed in float64. Every tensor lies between guards that must stay as they were.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from pathlib import Path

import pytest
import torch
from gpu_kernels import ALL_BLOCKS, CSRC, GPU, CTensor, compile_for_gpu, compile_for_host, gpu_or_skip
from torch import Tensor

from deepspeedlite.ops.adam import Adam, adam_in_torch

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

KERNELS = sorted(str(file) for file in (CSRC / "gpu_optim").glob("*.cu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBER = {dtype: number for number, dtype in enumerate(DTYPES)}
BLOCK_NUMEL = 4096
SIZES = (0, 1, 3, 4, 9, 255, 1024, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1, 9999)


def struct(name: str, floats: str, ints: str = "") -> type[ctypes.Structure]:
    """A C struct of gpu_optim.h: `dsl_on_device`'s pointers, then these floats and 32-bit integers."""
    pointers = [(key, ctypes.c_void_p) for key in ("lr_on_device", "grad_factor", "found_inf")]
    numbers = [(key, ctypes.c_float) for key in floats.split()] + [(key, ctypes.c_int32) for key in ints.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pointers + numbers})


MOMENTS = "lr grad_scale beta2 one_minus_beta1 one_minus_beta2 log_beta1 log_beta2 eps weight_decay"
CAdam = struct("CAdam", MOMENTS, "decoupled bias_correction")
CLion = struct("CLion", "lr grad_scale one_minus_beta1 one_minus_beta2 weight_decay")
CLamb = struct("CLamb", MOMENTS + " min_coeff max_coeff", "eps_inside_sqrt bias_correction")


def betas(beta1: float, beta2: float) -> dict[str, float]:
    logs = {"log_beta1": math.log(beta1), "log_beta2": math.log(beta2)}
    return {"beta2": beta2, "one_minus_beta1": 1 - beta1, "one_minus_beta2": 1 - beta2, **logs}


class Gpu:
    """The kernels on some device, and tensors for them."""

    def __init__(self, library: Path, wave: int | None) -> None:
        self.library = ctypes.CDLL(str(library))
        self.on_host = wave is not None
        self.device = "cpu" if self.on_host else "cuda"
        self.guarded: list[tuple[Tensor, int, int]] = []
        if self.on_host:
            self.library.dsl_host_failure.restype = ctypes.c_char_p
            self.library.dsl_host_configure(wave, 0, ALL_BLOCKS)

    def tensor(self, values: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """`values` on the device, `offset` elements away from a boundary of 16 bytes."""
        before = 64 + offset
        buffer = torch.full((before + values.numel() + 64,), -77.0, dtype=dtype, device=self.device)
        assert buffer.data_ptr() % 16 == 0
        buffer[before : before + values.numel()] = values.flatten().to(self.device, dtype)
        self.guarded.append((buffer, before, before + values.numel()))
        return buffer[before : before + values.numel()]

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def call(self, function: str, roles: list[list[Tensor] | None], *rest) -> None:
        """Call it on lists of tensors, one per role; tensors among `rest` go by address, structs by reference."""
        self.start(function, roles, *rest)
        for buffer, begin, end in self.guarded:
            assert (buffer[:begin] == -77).all() and (buffer[end:] == -77).all(), f"{function} wrote outside a tensor"

    def start(self, function: str, roles: list[list[Tensor] | None], *rest) -> None:
        count = len(roles[0])
        table = (CTensor * (count * len(roles)))()
        for index in range(count):
            for role, tensors in enumerate(roles):
                if tensors is not None:
                    tensor = tensors[index]
                    table[index * len(roles) + role] = CTensor(tensor.data_ptr(), NUMBER[tensor.dtype])
        numel = (ctypes.c_int64 * count)(*(tensor.numel() for tensor in roles[0]))
        arguments = [
            ctypes.c_void_p(one.data_ptr())
            if isinstance(one, Tensor)
            else ctypes.byref(one)
            if isinstance(one, ctypes.Structure)
            else one
            for one in rest
        ]
        stream = None if self.on_host else ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, function)(table, numel, ctypes.c_int64(count), *arguments, stream)
        failure = self.library.dsl_host_failure().decode() if self.on_host else ""
        assert not error, f"{function}: error {error} {failure}"
        if not self.on_host:
            torch.cuda.synchronize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def libraries(folder) -> dict[str, Path]:
    return {}


@pytest.fixture(params=["wave32", "wave64", GPU])
def gpu(request, libraries, folder) -> Gpu:
    kind = "cuda" if request.param == "cuda" else "host"
    if kind == "cuda":
        gpu_or_skip()
    if kind not in libraries:
        compiled = compile_for_gpu if kind == "cuda" else compile_for_host
        libraries[kind] = compiled(KERNELS, folder / f"{kind}.so")
    return Gpu(libraries[kind], {"wave32": 32, "wave64": 64}.get(request.param))


def random_lists(gpu: Gpu, dtypes: list[torch.dtype], sizes=SIZES, seed: int = 0) -> list[list[Tensor]]:
    """One list per dtype, each with every size at every alignment; callers make second moments positive."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            gpu.tensor(torch.randn(numel, generator=generator), dtype, offset)
            for numel in sizes
            for offset in (0, 1 + role % 3, 4)
        ]
        for role, dtype in enumerate(dtypes)
    ]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double().cpu() for tensor in tensors]


def assert_close(found: list[Tensor], expected: list[Tensor], scale: float = 1.0) -> None:
    """Equal up to the rounding of the dtype and of arithmetic in fp32 on numbers of about `scale`."""
    for one, other in zip(found, expected):
        rounding = max(torch.finfo(one.dtype).eps, 1e-6)
        torch.testing.assert_close(one.double().cpu(), other, rtol=4 * rounding, atol=4 * rounding * scale)


# --- Adam -------------------------------------------------------------------------------------------------------------

ADAM_KEYS = ("lr", "grad_scale", "eps", "weight_decay", "decoupled", "bias_correction")
HOW = Adam(step=3, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.5)


def c_adam(how: Adam, **on_device: Tensor) -> ctypes.Structure:
    return CAdam(
        **{name: tensor.data_ptr() for name, tensor in on_device.items()},
        **betas(how.beta1, how.beta2),
        **{key: getattr(how, key) for key in ADAM_KEYS},
    )


def check_adam(gpu: Gpu, how: Adam, param, grad, state, copy, amsgrad: bool = False, sizes=SIZES) -> None:
    params, grads, exp_avgs, exp_avg_sqs, most = random_lists(gpu, [param, grad, state, state, state], sizes)
    for tensor in exp_avg_sqs + most:
        tensor.abs_()
    copies = random_lists(gpu, [copy], sizes)[0] if copy else None
    exact = [doubles(list_) for list_ in (params, grads, exp_avgs, exp_avg_sqs, most)]
    steps = [gpu.number(how.step)] * len(params)
    roles = [params, grads, exp_avgs, exp_avg_sqs, most if amsgrad else None, copies, steps]
    gpu.call("dsl_gpu_adam_update", roles, c_adam(how))
    adam_in_torch(*exact[:4], exact[4] if amsgrad else [], [], *how)
    for found, expected in zip((params, exp_avgs, exp_avg_sqs, most), (exact[0], *exact[2:])):
        assert_close(found, expected)
    if copies:
        assert all(torch.equal(one, p.to(copy)) for one, p in zip(copies, params))


@pytest.mark.parametrize("grad", DTYPES)
def test_adam_on_fp32_masters_writes_the_model_dtype(gpu, grad):
    check_adam(gpu, HOW, torch.float32, grad, torch.float32, grad if grad != torch.float32 else torch.bfloat16)


@pytest.mark.parametrize(("param", "state"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_adam_on_16_bit_parameters(gpu, param, state):
    check_adam(gpu, HOW, param, param, state, None)


@pytest.mark.parametrize(
    "how",
    [
        HOW._replace(decoupled=False),
        HOW._replace(bias_correction=False, weight_decay=0.0),
        HOW._replace(step=100_000, beta2=0.999, grad_scale=1.0),
        HOW._replace(step=1, beta2=0.9999),
    ],
)
def test_adam_variants(gpu, how):
    check_adam(gpu, how, torch.float32, torch.float32, torch.float32, None, amsgrad=how.step == 3, sizes=(5, 1000))


def test_adam_over_more_tensors_than_one_launch_takes(gpu):
    check_adam(gpu, HOW, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, sizes=[*range(60), 5000])


def test_adam_reads_its_numbers_from_the_device_and_skips_where_infinities_were_found(gpu):
    """As in a captured graph: nothing but what lies in device memory changes from one launch to the next."""
    params, grads, exp_avgs, exp_avg_sqs = random_lists(gpu, [torch.float32] * 4, (7, 3000))
    for tensor in exp_avg_sqs:
        tensor.abs_()
    step, lr, factor, found = gpu.number(0), gpu.number(0), gpu.number(0), gpu.number(1)
    exact = [doubles(list_) for list_ in (params, grads, exp_avgs, exp_avg_sqs)]
    c = c_adam(HOW, lr_on_device=lr, grad_factor=factor, found_inf=found)
    roles = [params, grads, exp_avgs, exp_avg_sqs, None, None, [step] * len(params)]
    before = [tensor.clone() for list_ in roles[:4] for tensor in list_]
    gpu.call("dsl_gpu_adam_update", roles, c)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for list_ in roles[:4] for t in list_)))
    found.fill_(0)
    for number in (1, 2):
        step.fill_(number)
        lr.fill_(0.1 * number)
        factor.fill_(0.25 * number)
        gpu.call("dsl_gpu_adam_update", roles, c)
        how = HOW._replace(step=number, lr=0.1 * number, grad_scale=HOW.grad_scale * 0.25 * number)
        adam_in_torch(*exact, [], [], *how)
    for one, other in zip((params, exp_avgs, exp_avg_sqs), (exact[0], exact[2], exact[3])):
        assert_close(one, other)


def test_what_is_not_finite_stays_where_it_is(gpu):
    for bad in (float("nan"), float("inf")):
        params, grads, exp_avgs, exp_avg_sqs, most = random_lists(gpu, [torch.float32] * 5, (3000,))
        for tensor in (*exp_avg_sqs, *most):
            tensor.abs_()
        grads[1][777] = bad
        params[2][778] = float("inf")
        roles = [params, grads, exp_avgs, exp_avg_sqs, most, None, [gpu.number(1)] * 3]
        gpu.call("dsl_gpu_adam_update", roles, c_adam(HOW))
        assert [(~tensor.isfinite()).nonzero().flatten().tolist() for tensor in params] == [[], [777], [778]]
        assert exp_avgs[2].isfinite().all(), "an infinite weight does not reach its moments"
        assert not most[1][777].isfinite(), "AMSGrad's maximum does not hide it"


# --- Lion -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", DTYPES)
def test_lion(gpu, grad):
    params, grads, exp_avgs = random_lists(gpu, [torch.float32, grad, torch.float32])
    copies = random_lists(gpu, [torch.bfloat16])[0]
    grads[-1].zero_()
    exp_avgs[-1].zero_()
    grads[-2][3] = float("nan")
    exact = [doubles(list_) for list_ in (params, grads, exp_avgs)]
    lr, decay, scale, beta1, beta2 = 0.01, 0.1, 0.5, 0.9, 0.99
    numbers = {"one_minus_beta1": 1 - beta1, "one_minus_beta2": 1 - beta2}
    how = CLion(lr=lr, grad_scale=scale, weight_decay=decay, **numbers)
    gpu.call("dsl_gpu_lion_update", [params, grads, exp_avgs, copies], how)
    for p, g, m in zip(*exact):
        mixed = beta1 * m + (1 - beta1) * scale * g
        p.copy_(p * (1 - lr * decay) - lr * torch.where(mixed.isnan(), mixed, mixed.sign()))
        m.copy_(beta2 * m + (1 - beta2) * scale * g)
    for found, expected in zip((params, exp_avgs), (exact[0], exact[2])):
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.double().cpu(), other, rtol=1e-6, atol=1e-6, equal_nan=True)
    for copy, param in zip(copies, params):
        torch.testing.assert_close(copy, param.bfloat16(), rtol=0, atol=0, equal_nan=True)
    before = [param.clone() for param in params]
    how.found_inf = (found := gpu.number(1)).data_ptr()
    gpu.call("dsl_gpu_lion_update", [params, grads, exp_avgs, copies], how)
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(before, params)), found


# --- LAMB -------------------------------------------------------------------------------------------------------------


def scratch(gpu: Gpu, tensors: list[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    blocks = sum(-(-tensor.numel() // BLOCK_NUMEL) for tensor in tensors)
    partials = gpu.tensor(torch.zeros(rows * blocks), torch.float32)
    return partials, gpu.tensor(torch.zeros(rows * len(tensors)), torch.float32)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("grad", DTYPES)
def test_lamb(gpu, grad, inside):
    sizes = (*SIZES, *range(20, 50), 3 * BLOCK_NUMEL)  # more tensors than one launch takes
    params, grads, exp_avgs, exp_avg_sqs = random_lists(gpu, [torch.float32, grad, torch.float32, torch.float32], sizes)
    copies = random_lists(gpu, [torch.float16], sizes)[0]
    for index, tensor in enumerate(exp_avg_sqs):
        tensor.abs_()
        params[index].mul_([0.0, 1e-3, 1.0, 1e3][index % 4])  # ratios 1 (no weights), at both limits, and between
    exact = [doubles(list_) for list_ in (params, grads, exp_avgs, exp_avg_sqs)]
    lr, decay, scale, eps, step, low, high = 0.01, 0.1, 0.5, 1e-6, 2, 0.05, 8.0
    beta1, beta2 = 0.9, 0.999
    how = CLamb(lr=lr, grad_scale=scale, eps=eps, weight_decay=decay, min_coeff=low, max_coeff=high)
    for key, value in {**betas(beta1, beta2), "eps_inside_sqrt": inside, "bias_correction": True}.items():
        setattr(how, key, value)
    partials, norms = scratch(gpu, params, 2)
    gpu.call("dsl_gpu_lamb_moments", [params, grads, exp_avgs, exp_avg_sqs], how, partials, norms)
    steps = [gpu.number(step)] * len(params)
    gpu.call("dsl_gpu_lamb_apply", [params, exp_avgs, exp_avg_sqs, copies, steps], how, norms)
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    for index, (p, g, m, v) in enumerate(zip(*exact)):
        m.copy_(beta1 * m + (1 - beta1) * scale * g)
        v.copy_(beta2 * v + (1 - beta2) * (scale * g) ** 2)
        u = m / ((v + eps).sqrt() if inside else v.sqrt() + eps) + decay * p
        found = norms.view(2, -1)[:, index].double().cpu()
        torch.testing.assert_close(found, torch.stack([p.norm(), u.norm()]), rtol=1e-5, atol=1e-7)
        ratio = (p.norm() / u.norm()).clamp(low, high) if p.norm() > 0 and u.norm() > 0 else 1.0
        update = lr * correction * ratio * u
        torch.testing.assert_close(
            params[index].double().cpu(),
            p - update,
            rtol=1e-5,
            atol=1e-5 * float((p.abs() + 1).mean()) if len(p) else 0,
        )
    for found, expected in zip((exp_avgs, exp_avg_sqs), exact[2:]):
        assert_close(found, expected)
    assert all(torch.equal(copy, param.half()) for copy, param in zip(copies, params))
    before = [tensor.clone() for tensor in (*params, *exp_avgs)]
    how.found_inf = (found := gpu.number(1)).data_ptr()
    gpu.call("dsl_gpu_lamb_moments", [params, grads, exp_avgs, exp_avg_sqs], how, partials, norms)
    gpu.call("dsl_gpu_lamb_apply", [params, exp_avgs, exp_avg_sqs, copies, steps], how, norms)
    assert all(torch.equal(a, b) for a, b in zip(before, (*params, *exp_avgs))), found


# --- scale, cast, overflow, norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_casts_and_finds_what_is_not_finite(gpu, dtype, out):
    sizes = (*SIZES, *range(100, 130))
    inputs = random_lists(gpu, [dtype], sizes)[0]
    outputs = random_lists(gpu, [out], sizes)[0] if out else None
    found = gpu.number(0)

    def scale(factor: float, on_device: Tensor | None) -> None:
        gpu.call("dsl_gpu_scale", [inputs, outputs], ctypes.c_float(factor), on_device, found)

    scale(0.5, gpu.number(0.25))
    assert found == 0
    if outputs:
        for one, other in zip(inputs, outputs):
            torch.testing.assert_close(other, (one.float() * 0.125).to(out), rtol=0, atol=0)
    for index, bad in ((-1, float("nan")), (-2, float("-inf")), (8, float("inf"))):
        kept = inputs[index][-1].clone()
        inputs[index][-1] = bad
        found.zero_()
        scale(1.0, None)
        assert found == 1, bad
        inputs[index][-1] = kept
    found.zero_()
    scale(1e5, None)
    assert (found == 1) == (out == torch.float16), "what overflows in being narrowed counts too"


def test_tensors_of_several_dtypes_in_one_list(gpu):
    each = random_lists(gpu, list(DTYPES))
    inputs = [tensor for trio in zip(*each) for tensor in trio]
    each = random_lists(gpu, [torch.float16, torch.float32, torch.bfloat16])
    outputs = [tensor for trio in zip(*each) for tensor in trio]
    gpu.call("dsl_gpu_scale", [inputs, outputs], ctypes.c_float(0.5), None, None)
    assert all(torch.equal(other, (one.float() * 0.5).to(other.dtype)) for one, other in zip(inputs, outputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2norm(gpu, dtype):
    tensors = random_lists(gpu, [dtype], (*SIZES, *range(100, 220), 20 * BLOCK_NUMEL))[0]
    partials, norms = scratch(gpu, tensors, 1)
    gpu.call("dsl_gpu_l2norm", [tensors], partials, norms)
    torch.testing.assert_close(
        norms.double().cpu(), torch.stack([t.norm() for t in doubles(tensors)]), rtol=1e-5, atol=0
    )
    tensors[0 if tensors[0].numel() else 4][0] = float("inf")
    tensors[-1][3] = float("nan")
    gpu.call("dsl_gpu_l2norm", [tensors], partials, norms)
    assert norms[4].isinf() and norms[-1].isnan() and norms[:4].isfinite().all()
    first = norms.clone()
    gpu.call("dsl_gpu_l2norm", [tensors], partials, norms)
    assert torch.equal(norms[:-1], first[:-1]), "the same in every run"


def test_every_16_bit_number_is_widened_and_narrowed_as_torch_does(gpu):
    everything = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        halves = everything.view(dtype)
        bits = halves.float().view(torch.int32)
        middle = bits + (1 << (12 if dtype == torch.float16 else 15))  # halfway to the next, and a hair beside that
        for values in (halves.float(), middle.view(torch.float32), (middle + 1).view(torch.float32)):
            for source, target in ((dtype, torch.float32), (torch.float32, dtype)):
                given = gpu.tensor(values, source)
                got = gpu.tensor(torch.zeros(65536), target)
                gpu.start("dsl_gpu_scale", [[given], [got]], ctypes.c_float(1), None, None)
                torch.testing.assert_close(got, given.to(target), rtol=0, atol=0, equal_nan=True)


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.slow
def test_elements_beyond_2_to_the_31(gpu):
    """On the host only the last blocks of each grid are run, in address space that is mostly not there."""
    numel = 2**31 + BLOCK_NUMEL + 3
    blocks = -(-numel // BLOCK_NUMEL)
    if gpu.on_host:
        gpu.library.dsl_host_configure(32, blocks - 2, ALL_BLOCKS)
        p, g, m, v = (sparse(numel, torch.bfloat16) for _ in range(4))
    else:
        p, g, m, v = (torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    for tensor in (p, g, m, v):
        tensor[-5000:] = torch.arange(1, 5001).remainder(250) / 16
    expected = [tensor[-4098:].double().cpu() for tensor in (p, g, m, v)]  # what lies in the last two blocks
    gpu.start("dsl_gpu_adam_update", [[p], [g], [m], [v], None, None, [gpu.number(3)]], c_adam(HOW))
    adam_in_torch(*([tensor] for tensor in expected), [], [], *HOW)
    assert_close([p[-4098:], m[-4098:], v[-4098:]], [expected[0], expected[2], expected[3]], scale=16)

    lion = CLion(lr=0.5, grad_scale=1.0, one_minus_beta1=0.0, one_minus_beta2=0.0, weight_decay=0.0)
    before = p[-4098:].clone()
    gpu.start("dsl_gpu_lion_update", [[p], [g], [m], None], lion)
    assert torch.equal(p[-4098:], (before.float() - 0.5 * m[-4098:].float().sign()).bfloat16())
    lamb = CLamb(lr=1.0, eps=1.0, min_coeff=0.0, max_coeff=1.0, **betas(0.9, 0.95))  # moves by 0.5 * m / (sqrt(v) + 1)
    partials, norms = (
        gpu.tensor(torch.zeros(2 * blocks), torch.float32),
        gpu.tensor(torch.tensor([1.0, 2.0]), torch.float32),
    )
    before, first = p[-4098:].clone(), m[-4098:].clone()
    gpu.start("dsl_gpu_lamb_apply", [[p], [m], [v], None, [gpu.number(3)]], lamb, norms)
    update = 0.5 * first.double() / (v[-4098:].double().sqrt() + 1)
    assert_close([p[-4098:]], [before.double().cpu() - update.cpu()], scale=16)
    gpu.start("dsl_gpu_lamb_moments", [[p], [g], [m], [v]], lamb, partials, norms)
    assert_close([m[-4098:]], [first.double().cpu() * 0.9], scale=16)  # its grad_scale is 0
    assert partials.view(2, -1)[:, -2:].gt(0).all(), "the last blocks' sums"

    found = gpu.number(0)
    gpu.start("dsl_gpu_scale", [[g], [v]], ctypes.c_float(2), None, found)
    assert torch.equal(v[-4098:], g[-4098:] * 2) and found == 0
    g[-1] = float("inf")
    gpu.start("dsl_gpu_scale", [[g], None], ctypes.c_float(2), None, found)
    assert found == 1
    if gpu.on_host:
        gpu.library.dsl_host_configure(32, 0, ALL_BLOCKS)


# --- the test device itself -------------------------------------------------------------------------------------------

WRONG_KERNELS = """
#include "common/gpu_compat.h"
__global__ void some_return() { if (threadIdx.x >= 40) return; __syncthreads(); }
__global__ void two_places() { if (threadIdx.x % 2) { __syncthreads(); } else {
    __syncthreads(); } }
__global__ void part_of_a_wave() { if (threadIdx.x < 8) dsl::shuffle_xor(1.0f, 1); }
__global__ void no_such_lane() { dsl::shuffle_xor(1.0f, 4); }
__global__ void more_turns() { for (unsigned i = 0; i <= threadIdx.x / 64; ++i) __syncthreads(); }
__global__ void misaligned(char* place) { dsl::check_aligned(place, 16); }
__global__ void right(int* out) {
    __shared__ int slots[128];
    slots[threadIdx.x] = threadIdx.x + blockIdx.x;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = dsl::shuffle_xor(slots[(threadIdx.x + 1) % blockDim.x], 3);
}
extern "C" int launch(int which, void* data) {
    if (which == 0) DSL_LAUNCH(some_return, 3, 64, nullptr);
    if (which == 1) DSL_LAUNCH(two_places, 3, 64, nullptr);
    if (which == 2) DSL_LAUNCH(part_of_a_wave, 3, 64, nullptr);
    if (which == 3) DSL_LAUNCH(no_such_lane, 3, 6, nullptr);
    if (which == 4) DSL_LAUNCH(more_turns, 3, 128, nullptr);
    if (which == 5) DSL_LAUNCH(misaligned, 1, 1, nullptr, static_cast<char*>(data) + 8);
    if (which == 6) DSL_LAUNCH(right, 3, 128, nullptr, static_cast<int*>(data));
    return dsl::launch_error();
}
"""


def test_a_kernel_that_would_hang_a_gpu_is_an_error(folder):
    source = folder / "wrong.cu"
    source.write_text(WRONG_KERNELS)
    library = ctypes.CDLL(str(compile_for_host([str(source)], folder / "wrong.so")))
    library.dsl_host_failure.restype = ctypes.c_char_p
    library.launch.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.dsl_host_configure(32, 0, ALL_BLOCKS)
    out = torch.zeros(3, 128, dtype=torch.int32)

    def launch(which: int) -> str:
        error, failure = library.launch(which, out.data_ptr()), library.dsl_host_failure().decode()
        assert bool(error) == bool(failure)
        return failure

    assert launch(0) == "block 0 waits for ever: threads 0-39 at __syncthreads in line 3, 40-63 returned"
    assert "0-0 at __syncthreads in line 5, 1-1 at __syncthreads in line 4" in launch(1)
    assert "threads 0-7 at a shuffle or product in line 6, 8-63 returned" in launch(2)
    assert launch(3) == "a shuffle takes from a lane that is not there, line 7"
    assert "0-63 returned, 64-127 at __syncthreads in line 8" in launch(4)
    assert launch(5) == "a vector access of 16 bytes is misaligned"
    assert launch(6) == "", "failures leave nothing behind"
    thread = torch.arange(128)
    expected = torch.stack([((thread ^ 3) + 1) % 128 + block for block in range(3)])
    assert torch.equal(out, expected.int())
