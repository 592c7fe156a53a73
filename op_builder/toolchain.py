"""From sources to a shared library: the compiler's commands, run in parallel, and what it says when one fails.

An op links against nothing but libtorch's stable ABI (2.10), so that one file loads on every torch from 2.10 on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .spec import OpSpec

OLDEST_TORCH = 0x020A000000000000  # TORCH_TARGET_VERSION: 2.10
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
_BINDING = ("-O1",)  # they do nothing that takes time, and compile in half of it
# Without errno and traps a square root is one vector instruction. NaN and infinity still count.
_KERNEL = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mprefer-vector-width=512")
# Instruction sets per family of processors; csrc/common/isa.h chooses among them when the op runs.
_ISAS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": {"baseline": (), "avx2": _AVX2, "avx512": _AVX512}}
_ONE_ISA: dict[str, tuple[str, ...]] = {"baseline": ()}


class OpBuildError(RuntimeError):
    """An op cannot be compiled here; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """The compiler and the torch that ops are compiled with."""

    compiler: Path
    torch_home: Path

    @classmethod
    def find(cls) -> Toolchain:
        """`$CXX`, or the first of c++, g++ and clang++ on PATH, and the torch of this Python, which is not imported.

        Raises:
            OpBuildError: one of them is not there.
        """
        named = os.environ.get("CXX")
        found = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
        if found is None:
            where = f"CXX={named} is not a program" if named else "there is no c++, g++ or clang++ on PATH"
            raise OpBuildError(f"{where}; install a C++17 compiler (Debian: apt-get install g++) or set CXX")
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise OpBuildError("torch is not installed in this Python")
        return cls(Path(found), Path(torch.origin).parent)  # the name as it is: clang++ and ccache go by it

    def identity(self) -> str:
        """What changes when the compiler does, found without running it."""
        stat = self.compiler.stat()  # of the file that links lead to
        return f"{self.compiler.resolve()} {stat.st_size} {stat.st_mtime_ns}"

    def commands(self, spec: OpSpec, csrc: Path, objects: Path) -> list[list[str]]:
        """A command per object file, whose last argument is that file."""
        first = [str(self.compiler), *_COMMON, f"-I{csrc}"]
        torch = [f"-isystem{self.torch_home / 'include'}", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#018x}"]
        found = [
            [*first, *_BINDING, *torch, "-c", str(csrc / source), "-o", str(objects / f"{Path(source).stem}.o")]
            for source in spec.bindings
        ]
        found += [
            [*first, "-O2", "-c", str(csrc / source), "-o", str(objects / f"{Path(source).stem}.plain.o")]
            for source in spec.plain
        ]
        for isa, flags in _ISAS.get(platform.machine(), _ONE_ISA).items():
            found += [
                [
                    *first,
                    *_KERNEL,
                    *flags,
                    "-c",
                    str(csrc / source),
                    "-o",
                    str(objects / f"{Path(source).stem}.{isa}.o"),
                ]
                for source in spec.kernels
            ]
        return found

    def link_command(self, objects: Sequence[str], library: Path) -> list[str]:
        """The command that makes the library."""
        torch = [
            f"-L{self.torch_home / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-ltorch_cpu",
            "-lc10",
        ]
        return [str(self.compiler), "-shared", "-s", *objects, *torch, "-o", str(library)]

    def build(self, spec: OpSpec, csrc: Path, library: Path) -> None:
        """Compile into the folder of `library`, with at most `$MAX_JOBS` compilers at once.

        Raises:
            OpBuildError: with the compiler's first error and its command.
        """
        commands = self.commands(spec, csrc, library.parent)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda command: _run(spec, command), commands))
        _run(spec, self.link_command([command[-1] for command in commands], library))


def _run(spec: OpSpec, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it said nothing"]
        first = next((line for line in lines if "error" in line.lower()), lines[0])
        raise OpBuildError(f"{spec.name} does not compile: {first.strip()}\n  {shlex.join(command)}")
