"""dsl::mma, the product of a wave's tensor cores: its tables, the host's version of it, and what compilers make of it.

The tables here are written down a second time, from "Matrix Fragments for mma.m16n8k16" of the PTX ISA and from AMD's
matrix instruction calculator, and as lists of registers rather than as the header's functions of a number.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpu_kernels import compile_for_host
from paths import ROOT
from programs import program
from test_gpu_kernels import DTYPES
from torch import Tensor

pytestmark = pytest.mark.slow  # with the other kernels on fibers

CODE = """
#include "common/gpu_compat.h"
namespace dsl {

// Each lane's numbers as they lie in its registers.
template <class Choice>
__global__ void registers_kernel(const void* left, const void* right, float* sums) {
    using F = typename Choice::Here;
    using Stored = typename F::Type::Stored;
    typename F::A a;
    typename F::B b;
    typename F::C c;
    const auto* const from_a = static_cast<const Stored*>(left) + threadIdx.x * F::A::COUNT;
    const auto* const from_b = static_cast<const Stored*>(right) + threadIdx.x * F::B::COUNT;
    float* const from_c = sums + threadIdx.x * F::C::COUNT;
    for (int i = 0; i < F::A::COUNT; ++i) a.set(i, from_a[i]);
    for (int i = 0; i < F::B::COUNT; ++i) b.set(i, from_b[i]);
    for (int i = 0; i < F::C::COUNT; ++i) c.values[i] = from_c[i];
    mma<F>(c, a, b);
    for (int i = 0; i < F::C::COUNT; ++i) from_c[i] = c.values[i];
}

// Matrices of F's shape: row by row, the second by columns.
template <class Choice>
__global__ void matrices_kernel(const void* left, const void* right, float* sums) {
    using F = typename Choice::Here;
    using Stored = typename F::Type::Stored;
    const int lane = threadIdx.x % F::LANES;
    const auto* const from_a = static_cast<const Stored*>(left);
    const auto* const from_b = static_cast<const Stored*>(right);
    typename F::A a;
    typename F::B b;
    typename F::C c{};
    fill_a<F>(a, lane, [&](int row, int k) { return from_a[row * F::DEPTH + k]; });
    fill_b<F>(b, lane, [&](int k, int column) { return from_b[column * F::DEPTH + k]; });
    mma<F>(c, a, b);
    for (int i = 0; i < F::C::COUNT; ++i) {
        const MatrixPlace place = F::c_place(lane, i);
        sums[place.row * F::COLUMNS + place.column] = c.values[i];
    }
}

template <class T>
void start(int matrices, int threads, const void* left, const void* right, float* sums) {
    with_products_of<T>([&](auto choice) {
        if (matrices) {
            DSL_LAUNCH(matrices_kernel<decltype(choice)>, 1, threads, nullptr, left, right, sums);
        } else {
            DSL_LAUNCH(registers_kernel<decltype(choice)>, 1, threads, nullptr, left, right, sums);
        }
    });
}

#if defined(DSL_GPU_HOST)
__global__ void half_a_wave_kernel() {
    using F = MmaSync<Bf16>;
    typename F::C c{};
    if (threadIdx.x % 2 == 0) mma<F>(c, typename F::A{}, typename F::B{});
}
#endif

template <class F>
int places_of(int* to) {
    for (int lane = 0; lane < F::LANES; ++lane) {
        auto add = [&](MatrixPlace place) { *to++ = place.row, *to++ = place.column; };
        for (int i = 0; i < F::A::COUNT; ++i) add(F::a_place(lane, i));
        for (int i = 0; i < F::B::COUNT; ++i) add(F::b_place(lane, i));
        for (int i = 0; i < F::C::COUNT; ++i) add(F::c_place(lane, i));
    }
    return F::LANES;
}

}  // namespace dsl

extern "C" int run(int type, int matrices, int threads, const void* left, const void* right, float* sums) {
    if (type == 0) dsl::start<dsl::Fp32>(matrices, threads, left, right, sums);
    if (type == 1) dsl::start<dsl::Bf16>(matrices, threads, left, right, sums);
    if (type == 2) dsl::start<dsl::Fp16>(matrices, threads, left, right, sums);
    return dsl::launch_error();
}
#if defined(DSL_GPU_HOST)
extern "C" int half_a_wave() {
    DSL_LAUNCH(dsl::half_a_wave_kernel, 1, 64, nullptr);
    return dsl::launch_error();
}
#endif
extern "C" int places(int kind, int* to) {
    return kind == 0   ? dsl::places_of<dsl::MmaSync<dsl::Bf16>>(to)
           : kind == 1 ? dsl::places_of<dsl::Mfma<dsl::Bf16>>(to)
                       : dsl::places_of<dsl::Plain<dsl::Bf16>>(to);
}
"""


class Shape(NamedTuple):
    """Rows and columns of a product, its depth, and (row, column) of [lane][number] of each operand."""

    rows: int
    columns: int
    depth: int
    a: list[list[tuple[int, int]]]
    b: list[list[tuple[int, int]]]
    c: list[list[tuple[int, int]]]


def mma_sync() -> Shape:
    a, b, c = [], [], []
    for group in range(8):  # laneid >> 2
        for thread in range(4):  # laneid % 4
            left, right = 2 * thread, 2 * thread + 1
            low, high = group, group + 8
            first = [(low, left), (low, right), (high, left), (high, right)]
            a.append(first + [(row, column + 8) for row, column in first])
            b.append([(left, group), (right, group), (left + 8, group), (right + 8, group)])
            c.append(first)
    return Shape(16, 8, 16, a, b, c)


def mfma() -> Shape:
    a, b, c = [], [], []
    for quarter in range(4):  # of the lanes
        for lane in range(16):
            four = range(4 * quarter, 4 * quarter + 4)
            a.append([(lane, k) for k in four])
            b.append([(k, lane) for k in four])
            c.append([(row, lane) for row in four])
    return Shape(16, 16, 16, a, b, c)


def plain() -> Shape:
    """Sums as in `mma_sync`; a lane holds the two rows and the two columns that they take, 4 deep."""
    a, b, c = [], [], mma_sync().c
    for places in c:
        a.append([(row, k) for row in (places[0][0], places[2][0]) for k in range(4)])
        b.append([(k, column) for column in (places[0][1], places[1][1]) for k in range(4)])
    return Shape(16, 8, 4, a, b, c)


SHAPES = (mma_sync(), mfma(), plain())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("products") / "products.cu"
    file.write_text(CODE)
    return file


@pytest.fixture(scope="module")
def library(source) -> ctypes.CDLL:
    found = ctypes.CDLL(str(compile_for_host([str(source)], source.parent / "host.so")))
    found.dsl_host_failure.restype = ctypes.c_char_p
    found.run.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 3
    return found


def configure(library: ctypes.CDLL, kind: int, wave: int | None = None) -> Shape:
    library.dsl_host_configure(wave or (64 if kind == 1 else 32), 0, 0xFFFFFFFF)
    library.dsl_host_plain_products(kind == 2)
    return SHAPES[kind]


def run(library: ctypes.CDLL, dtype: torch.dtype, matrices: bool, threads: int, *tensors: Tensor) -> None:
    pointers = [tensor.data_ptr() for tensor in tensors]
    error = library.run(DTYPES.index(dtype), matrices, threads, *pointers)
    assert error == 0, library.dsl_host_failure().decode()


def spread(matrix: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
    """[lane][number] of a matrix."""
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


@pytest.mark.parametrize("kind", range(3))
def test_the_tables_are_the_manuals(library, kind):
    found = (ctypes.c_int * 4096)()
    lanes = library.places(kind, found)
    shape, numbers = SHAPES[kind], iter(found)
    assert lanes == len(shape.a)
    for lane in range(lanes):
        for places in (shape.a, shape.b, shape.c):
            assert [(next(numbers), next(numbers)) for _ in places[lane]] == places[lane], lane


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", range(3))
def test_a_distinct_number_in_every_register_of_every_lane(library, kind, dtype):
    """Whole numbers, exact in each dtype, so the product must be exact too."""
    shape = configure(library, kind)
    mixed = torch.Generator().manual_seed(kind)

    def distinct(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        order = torch.randperm(rows * columns, generator=mixed) - rows * columns // 2
        return order.view(rows, columns).to(dtype)

    a, b = distinct(shape.rows, shape.depth, dtype), distinct(shape.depth, shape.columns, dtype)
    c = distinct(shape.rows, shape.columns, torch.float32) * 1000
    lanes, exact = spread(c, shape.c).contiguous(), a.double() @ b.double() + c.double()
    run(library, dtype, False, len(shape.a), spread(a, shape.a), spread(b, shape.b), lanes)
    assert torch.equal(lanes.double(), spread(exact, shape.c))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", range(3))
def test_matrices_are_read_into_the_operands(library, kind, dtype):
    for wave in (32, 64) if kind == 2 or dtype == torch.float32 else (None,):
        shape = configure(library, kind, wave)
        shape = SHAPES[2] if dtype == torch.float32 else shape
        a = torch.randn(shape.rows, shape.depth, generator=torch.Generator().manual_seed(1)).to(dtype)
        b = torch.randn(shape.columns, shape.depth, generator=torch.Generator().manual_seed(2)).to(dtype)
        c = torch.zeros(shape.rows, shape.columns)
        run(library, dtype, True, wave or len(shape.a), a, b, c)
        torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-6, atol=1e-5)


def test_a_product_without_all_lanes_is_an_error(library):
    line = next(n for n, text in enumerate(CODE.splitlines(), 1) if "typename F::A{}" in text)
    of_half = f"threads 0-0 at a shuffle or product in line {line}, 1-1 returned"
    for wave, failure in ((32, of_half), (64, "a product of 32 lanes by a wave of 64")):
        configure(library, 0, wave)
        assert library.half_a_wave() != 0
        assert failure in library.dsl_host_failure().decode()


ARCHS = {  # what the compilers are to make of it: bf16's and fp16's instruction, or neither
    "sm_80": (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ),
    "sm_75": None,
    "gfx90a": ("v_mfma_f32_16x16x16bf16_1k", "v_mfma_f32_16x16x16f16"),
    "gfx942": ("v_mfma_f32_16x16x16_bf16", "v_mfma_f32_16x16x16_f16"),
    "gfx1100": None,
}


@pytest.mark.parametrize("arch", ARCHS)
def test_compilers_make_tensor_core_instructions_where_there_are_some(source, arch, tmp_path):
    if arch.startswith("sm_"):
        command = [program("nvcc"), "-std=c++17", "-Werror", "all-warnings", f"-arch={arch}", "-ptx"]
    else:
        newer = arch != "gfx90a"
        flags = ["-std=c++17", "-O3", "-x", "hip", "-Werror", f"--offload-arch={arch}", "-S"]
        flags += (
            ["--offload-device-only", "-nogpulib"]
            if newer
            else ["--cuda-device-only", "-Wno-unused-command-line-argument"]
        )
        command = [program("clang++-19" if newer else "hipcc"), *flags]
    assembly = tmp_path / "assembly"
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(assembly)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HIP_PLATFORM": "amd"})
    assert done.returncode == 0, done.stderr
    text, wanted = assembly.read_text(), ARCHS[arch]
    if wanted is None:
        assert "mma.sync" not in text and "v_mfma" not in text and "v_wmma" not in text
    else:
        for instruction in wanted:
            assert text.count(f"{instruction} ") >= 2, f"{instruction}: in both kernels"
