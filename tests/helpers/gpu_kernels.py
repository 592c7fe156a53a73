"""GPU kernels through their C ABI, on fibers of the host or on a GPU, by tests that do not know where they run.

Tests make tensors on the CPU and hand over C structs that point into them. For a GPU `Device.call` replaces every
pointer by one into a copy of that tensor's memory there, and copies all of it back afterwards; so guards around tensors
are looked at too, and what shares memory on the host shares it there.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
from pathlib import Path

import pytest
import torch
from paths import ROOT
from programs import program
from torch import Tensor

CSRC = ROOT / "csrc"
GUARD = 64
ALL_BLOCKS = 0xFFFFFFFF
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [32, 64, GPU]  # fibers with waves of so many threads


class CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


def compile_for_host(sources: list[str], library: Path) -> Path:
    compiler = program("c++")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{CSRC}"]
    command += ["-U_FORTIFY_SOURCE"]  # some systems' compilers define it
    done = subprocess.run([*command, "-x", "c++", *sources, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def compile_for_gpu(sources: list[str], library: Path) -> Path:
    """By the nvcc or hipcc that compiles ops, for the GPUs that are here; with its functions to be seen."""
    from deepspeedlite.ops.op_builder.errors import OpBuildError
    from deepspeedlite.ops.op_builder.gpu import find_gpu_compiler, gencode
    from deepspeedlite.ops.op_builder.torch_build import find_torch

    try:
        compiler = find_gpu_compiler(find_torch())
    except OpBuildError as error:
        pytest.skip(f"needs nvcc or hipcc: {error}")
    if compiler.kind == "rocm":
        flags = [*(f"--offload-arch={arch}" for arch in compiler.archs), "-D__HIP_PLATFORM_AMD__", "-fPIC"]
    else:
        flags = [*gencode(compiler.archs), "-Xcompiler", "-fPIC"]
    command = [str(compiler.program), *flags, "-std=c++17", "-O3", "-shared", f"-I{CSRC}", *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def gpu_or_skip() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


class Device:
    """A library of kernels on fibers (`wave` threads each) or, without a wave, on the GPU; and tensors between guards.

    `copies_on` is where structs' tensors are copied to for each call; None leaves them where they are.
    """

    def __init__(self, library: Path, wave: int | None, copies_on: str | None = None) -> None:
        self.library = ctypes.CDLL(str(library))
        self.on_host = wave is not None
        self.copies_on = copies_on
        self.guarded: list[Tensor] = []
        if self.on_host:
            self.library.dsl_host_failure.restype = ctypes.c_char_p
            self.library.dsl_host_configure(wave, 0, ALL_BLOCKS)

    @classmethod
    def of(cls, kind: int | str, sources: list[str], folder: Path) -> Device:
        """One of DEVICES, or "copied": fibers that get copies. What is compiled is left in the folder for others."""
        compiled = folder / f"{Path(sources[0]).stem}-{'gpu' if kind == 'cuda' else 'host'}.so"
        if kind == "cuda":
            gpu_or_skip()
        if not compiled.exists():
            (compile_for_gpu if kind == "cuda" else compile_for_host)(sources, compiled)
        if kind == "cuda":
            return cls(compiled, None, "cuda")
        return cls(compiled, 32 if kind == "copied" else int(kind), "cpu" if kind == "copied" else None)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        numel = torch.Size(shape).numel()
        self.guarded.append(torch.full((numel + 2 * GUARD,), -77.0, dtype=dtype))
        return self.guarded[-1][GUARD : GUARD + numel].view(shape)

    def call(self, function: str, *arguments: object) -> None:
        copies = Copies(self.copies_on) if self.copies_on else None
        passed = [
            one if not isinstance(one, ctypes.Structure) else ctypes.byref(one if copies is None else copies.of(one))
            for one in arguments
        ]
        stream = None if self.on_host else ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, function)(*passed, stream)
        failure = self.library.dsl_host_failure().decode() if self.on_host else ""
        assert error == 0, f"{function}: error {error} {failure}"
        if copies is not None:
            copies.back()
        for buffer in self.guarded:
            assert (buffer[:GUARD] == -77).all() and (buffer[-GUARD:] == -77).all(), (
                f"{function} wrote outside a tensor"
            )


class Copies:
    """Of the memory of all CPU tensors that structs point into, on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._copied: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of the original's first byte
        found = {}
        for one in gc.get_objects():
            # By its type alone: asking other objects for their class may import or raise.
            if type(one) in (Tensor, torch.nn.Parameter) and one.device.type == "cpu" and one.layout == torch.strided:
                storage = one.untyped_storage()
                found[storage.data_ptr()] = storage
        self._storages = found

    def of(self, struct: ctypes.Structure) -> ctypes.Structure:
        """The same with pointers to copies."""
        copied = type(struct).from_buffer_copy(struct)
        self._redirect(copied)
        return copied

    def back(self) -> None:
        """Wait for the device, and bring what was written to where it was expected."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        for original, copy in self._copied.values():
            original.copy_(copy)

    def _redirect(self, struct: ctypes.Structure) -> None:
        for name, kind, *_ in struct._fields_:
            value = getattr(struct, name)
            if isinstance(value, ctypes.Structure):
                self._redirect(value)
            elif kind is ctypes.c_void_p and value:
                setattr(struct, name, self._address(value))

    def _address(self, address: int) -> int:
        for first, storage in self._storages.items():
            if first <= address < first + storage.nbytes():
                if first not in self._copied:
                    original = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self._copied[first] = original, original.to(self.device, copy=True)
                return self._copied[first][1].data_ptr() + address - first
        raise AssertionError(f"{address:#x} lies in no tensor that is still there")
