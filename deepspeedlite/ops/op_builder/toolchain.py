"""From sources to shared libraries: the compilers' commands, run in parallel, and what they say when one fails.

An op links against nothing but libtorch's stable ABI (2.10), so that one file loads on every torch from 2.10 on.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.host.cores import usable_cores
from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.gpu import GpuCompiler, find_gpu_compiler
from deepspeedlite.ops.op_builder.spec import OpSpec
from deepspeedlite.ops.op_builder.torch_build import TorchBuild, find_torch
from deepspeedlite.runtime.errors import ConfigError

OLDEST_TORCH = 0x020A000000000000  # TORCH_TARGET_VERSION: 2.10
_COMMON = ("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden")
_BINDING = ("-O1",)  # they do nothing that takes time, and compile in half of it
# Without errno and traps a square root is one vector instruction. NaN and infinity still count.
_KERNEL = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mprefer-vector-width=512")
# Instruction sets per family of processors; csrc/common/isa.h chooses among them when the op runs.
# The baseline is for processors of before 2013, which -O2 serves in half the time of compiling.
_ISAS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": {"baseline": ("-O2",), "avx2": _AVX2, "avx512": _AVX512}}
_ONE_ISA: dict[str, tuple[str, ...]] = {"baseline": ()}
ISA_VARIABLE = "DEEPSPEEDLITE_ISA"  # keeps ops from using a larger one


# Programs that are written before a compiler to call it.
_WRAPPERS = ("ccache", "sccache", "distcc", "icecc", "env")


@dataclass(frozen=True)
class Toolchain:
    """What an op is compiled with: a C++ compiler, torch, and a GPU's compiler if the op and torch call for one.

    Attributes:
        wrapper: what `$CXX` has before the compiler, such as ccache; it changes nothing that is made.
        options: what it has after the compiler, such as -m64.
    """

    compiler: Path
    torch: TorchBuild
    gpu: GpuCompiler | None = None
    wrapper: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @classmethod
    def find(cls, spec: OpSpec) -> Toolchain:
        """`$CXX`, or the first of c++, g++ and clang++ on PATH, and the torch of this Python, which is not imported.

        Raises:
            OpBuildError: one of them is not there.
        """
        torch = find_torch()
        wrapper, compiler, options = find_cxx()
        gpu = find_gpu_compiler(torch) if spec.gpu and torch.accelerator != "cpu" else None
        return cls(compiler, torch, gpu, wrapper, options)

    @property
    def cxx(self) -> list[str]:
        """How the C++ compiler is called."""
        return [*self.wrapper, str(self.compiler), *self.options]

    def check(self) -> None:
        """Ask the compilers, in some 0.1 s, whether they know what they will be told; once in a process.

        Raises:
            OpBuildError: one is too old, does not run, or does not know a GPU that is to be compiled for.
        """
        if self.gpu:
            self.gpu.check()
        check_cxx(self.cxx)

    def identity(self) -> str:
        """What changes when a compiler or torch does, found without running them."""
        compiler = _behind_wrapper(self.compiler)
        stat = compiler.stat()
        gpu = self.gpu.identity() if self.gpu else ""
        return f"{self.torch.version} {compiler} {stat.st_size} {stat.st_mtime_ns} {gpu}"

    def commands(self, spec: OpSpec, csrc: Path, objects: Path) -> list[list[str]]:
        """A command per object file, whose last argument is that file.

        Of bindings each library has its own; what else has the same source and flags is the same file in all of them.
        """
        defines = [f"-D{name}" for name in spec.defines]
        first = [*self.cxx, *_COMMON, f"-I{csrc}"]
        torch = [f"-isystem{self.torch.home / 'include'}", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#018x}"]
        torch += [self.gpu.define] if self.gpu else []

        def object_file(source: str, kind: str) -> Path:
            return objects / f"{source.removesuffix(Path(source).suffix).replace('/', '.')}.{kind}.o"

        def compile_with(source: str, kind: str, flags: Sequence[str]) -> list[str]:
            return [*first, *flags, "-c", str(csrc / source), "-o", str(object_file(source, kind))]

        found = []
        if self.gpu:
            for source in spec.gpu:
                host = [str(self.compiler), *self.options]
                found.append(self.gpu.command(csrc / source, csrc, host, object_file(source, "gpu")))
        binding = [*_BINDING, *defines, *torch]
        found += [compile_with(source, f"{spec.name}.binding", binding) for source in spec.bindings]
        for isa, flags in _ISAS.get(platform.machine(), _ONE_ISA).items():
            found += [compile_with(source, isa, [*_KERNEL, *flags]) for source in spec.kernels]
        return found + [compile_with(source, "plain", ["-O2"]) for source in spec.plain]

    def link_command(self, spec: OpSpec, objects: Sequence[str], library: Path) -> list[str]:
        """The command that makes the library, without symbols that only a debugger needs."""
        torch = [f"-L{self.torch.home / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        gpu = self.gpu.link_flags() if self.gpu else []
        files = [*objects, *torch, "-ltorch_cpu", "-lc10", *gpu]
        return [*self.cxx, "-shared", "-pthread", "-s", *files, "-o", str(library)]


def find_cxx() -> tuple[tuple[str, ...], Path, tuple[str, ...]]:
    """What is called before the C++ compiler, the compiler, and its options, by `$CXX` or PATH.

    Raises:
        OpBuildError: there is none.
    """
    named = os.environ.get("CXX", "").strip()
    wrapper, program, options = _parts(named)
    found = next(filter(None, map(shutil.which, [program] if named else ["c++", "g++", "clang++"])), None)
    if found is None:
        where = f"CXX={named} is not a program" if named else "there is no c++, g++ or clang++ on PATH"
        raise OpBuildError(where, "install a C++17 compiler (Debian: apt-get install g++) or set CXX")
    if missing := [word for word in wrapper if "=" not in word and not shutil.which(word)]:
        raise OpBuildError(f"CXX={named}: {missing[0]} is not a program", "install it or correct CXX")
    return wrapper, Path(found), options  # the compiler's name as it is: clang++ and ccache go by it


def check_cxx(cxx: Sequence[str]) -> None:
    """Have a compiler read a few lines with the flags that ops are compiled with; once in a process.

    Raises:
        OpBuildError: it is too old for them, or does not run.
    """
    if said := _refusal(tuple(cxx)):
        raise OpBuildError(
            f"{shlex.join(cxx)} does not compile what ops are made of: {said}",
            "install a newer C++17 compiler (GCC 9 or newer, clang 10 or newer) and set CXX to it",
        )


def _behind_wrapper(compiler: Path) -> Path:
    """The file that a compiler's links lead to; of a link to ccache, as in /usr/lib/ccache, what ccache calls by it."""
    found = compiler.resolve()
    if found.name not in _WRAPPERS:
        return found
    named = [Path(folder, compiler.name) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    others = (path.resolve() for path in named if os.access(path, os.X_OK))
    return next((path for path in others if path.name not in _WRAPPERS), found)


def _parts(named: str) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """What `$CXX` has before the compiler, the compiler, and what it has behind it."""
    if shutil.which(named):  # a path may have blanks
        return (), named, ()
    try:
        words = shlex.split(named)
    except ValueError:  # quotes that do not end: no program, which is said of all of it
        words = []
    at = next((i for i, word in enumerate(words) if Path(word).name not in _WRAPPERS and "=" not in word), None)
    return (tuple(words[:at]), words[at], tuple(words[at + 1 :])) if at is not None else ((), named, ())


_TRIAL = "#include <optional>\n#if __cplusplus < 201703L\n#error this is no C++17\n#endif\nstd::optional<int> here;\n"


@cache
def _refusal(cxx: tuple[str, ...]) -> str:
    """What a compiler says against C++17 and the flags that ops are compiled with; "" where it takes them."""
    flags = {
        flag: None for isa in _ISAS.get(platform.machine(), _ONE_ISA).values() for flag in (*_COMMON, *_KERNEL, *isa)
    }
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(
            command, input=_TRIAL, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return _first_error(done) if done.returncode else ""


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).splitlines() or [f"it said nothing, and ended with status {done.returncode}"]
    return next((line for line in lines if "error" in line.lower()), lines[0]).strip()


class Build(NamedTuple):
    """A library to make."""

    spec: OpSpec
    toolchain: Toolchain
    library: Path


def build(wanted: Sequence[Build], csrc: Path, objects: Path, jobs: int | None = None) -> None:
    """Compile into the folder `objects`, then link, with at most `jobs` (or `$MAX_JOBS`) compilers at once.

    Raises:
        OpBuildError: with the compiler's first error and its command.
    """
    by_output: dict[str, tuple[str, list[str]]] = {}  # what several libraries have is compiled once
    link_commands = []
    for one in wanted:
        commands = one.toolchain.commands(one.spec, csrc, objects)
        outputs = [command[-1] for command in commands]
        by_output |= {output: (one.spec.name, command) for output, command in zip(outputs, commands)}
        link_commands.append((one.spec.name, one.toolchain.link_command(one.spec, outputs, one.library)))
    compile_commands = sorted(by_output.values(), key=lambda each: _expected(each[1]), reverse=True)
    jobs = jobs or max_jobs()
    if os.environ.get("DS_ENABLE_NINJA") == "1":
        _run_in_ninja([command for _, command in compile_commands], objects, jobs)
        compile_commands = []
    with ThreadPoolExecutor(jobs) as pool:
        for stage in (compile_commands, link_commands):
            running = [pool.submit(_run, name, command, objects) for name, command in stage]
            wait(running, return_when=FIRST_EXCEPTION)
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled():
                    future.result()


def _expected(command: Sequence[str]) -> tuple[bool, int]:
    """What grows with the time that a command takes: compilers for GPUs are slower, longer sources take longer."""
    sources = [Path(word) for word in command if word.endswith((".cu", ".cpp"))]
    return command[-1].endswith(".gpu.o"), sum(source.stat().st_size for source in sources)


def _run_in_ninja(commands: Sequence[Sequence[str]], objects: Path, jobs: int) -> None:
    """As without it, but where `objects` is left from an earlier build, only what changed is compiled."""
    lines = ["rule compile", "  command = $command", "  depfile = $out.d", "  deps = gcc"]
    for *command, output in commands:
        text = shlex.join([*command, output, "-MMD", "-MF", f"{output}.d"]).replace("$", "$$")
        lines += [f"build {output.replace(' ', '$ ')}: compile", f"  command = {text}"]
    (objects / "build.ninja").write_text("\n".join(lines) + "\n")
    if shutil.which("ninja") is None:
        raise OpBuildError("DS_ENABLE_NINJA=1, but there is no ninja on PATH", "install it or unset the variable")
    _run("an op", ["ninja", "--quiet", "-C", str(objects), f"-j{jobs}"], objects)


def max_jobs() -> int:
    """`$MAX_JOBS`, or as many as there are processors that it may use.

    Raises:
        OpBuildError: it is no number of compilers.
    """
    named = os.environ.get("MAX_JOBS", "").strip()
    if not named:
        return usable_cores()
    if not named.isdecimal() or int(named) < 1:
        raise OpBuildError(f"MAX_JOBS={named} is no number of compilers", "set it to 1 or more, or unset it")
    return int(named)


def named_isa() -> str:
    """`$DEEPSPEEDLITE_ISA`, or "".

    Raises:
        ConfigError: it is none that ops are compiled for.
    """
    named, known = os.environ.get(ISA_VARIABLE, ""), _ISAS["x86_64"]
    if named and named not in known:
        raise ConfigError(f"{ISA_VARIABLE}={named} is none of {', '.join(known)}; use one of them, or unset it")
    return named


def _run(name: str, command: list[str], objects: Path) -> None:
    # hipcc takes the nvcc on PATH otherwise. What compilers put aside goes where there was found to be room.
    environment = {**os.environ, "HIP_PLATFORM": "amd", "TMPDIR": str(objects)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if not done.returncode:
        return
    if full := re.search(r"No space left on device|Disk quota exceeded", done.stderr + done.stdout):
        raise OpBuildError(
            f"{name} does not compile: {full[0]}, in {objects.parent}",
            "make room there, or set TORCH_EXTENSIONS_DIR to a folder on another disk",
        )
    raise OpBuildError(f"{name} does not compile: {_first_error(done)}\n  {shlex.join(command)}")
