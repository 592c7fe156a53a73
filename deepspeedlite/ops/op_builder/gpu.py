"""nvcc and hipcc: where they are, which GPUs they are to compile for, and their commands."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.torch_build import TorchBuild

# torch's names for generations, as in its own TORCH_CUDA_ARCH_LIST.
_GENERATIONS = {
    "Kepler": "3.5;3.7+PTX",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# Compiled for where no GPU is in sight: a cubin runs on later minors of its major, so these serve all that torch's
# wheels do. Each with the oldest and the first unable toolkit.
_USUAL_CUDA = {
    "7.0": ((11, 0), (13, 0)),
    "7.5": ((11, 0), (99, 0)),
    "8.0": ((11, 0), (99, 0)),
    "8.6": ((11, 1), (99, 0)),
    "9.0": ((11, 8), (99, 0)),
    "10.0": ((12, 8), (99, 0)),
    "12.0": ((12, 8), (99, 0)),
}
_USUAL_ROCM = {"gfx90a": 5, "gfx942": 6, "gfx1100": 6, "gfx1201": 7}  # with ROCm's first major that knows it
# nvcc's parts on PyPI, of torch's CUDA version; they land beside torch.
PYPI_NVCC = " ".join(f"nvidia-{part}" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl"))
SKIP_CHECK = "set DS_SKIP_CUDA_CHECK=1 to try all the same"
_CUDA_ARCH = re.compile(r"\d+\.\d[af]?(\+PTX)?")


@dataclass(frozen=True)
class GpuCompiler:
    """A GPU compiler and what it is to compile for.

    Attributes:
        kind: "cuda" or "rocm".
        archs: such as "8.0", "9.0+PTX" or "gfx90a".
        version: of CUDA or ROCm, such as "13.0".
    """

    kind: str
    program: Path
    home: Path
    version: str
    archs: tuple[str, ...]

    @property
    def define(self) -> str:
        """The macro that tells bindings that there are GPU kernels."""
        return "-DDSL_CUDA" if self.kind == "cuda" else "-DDSL_HIP"

    def check(self) -> None:
        """Ask nvcc whether it knows what it is to compile for. (Of hipcc nothing is asked.)

        Raises:
            OpBuildError: it does not, with the oldest and the newest that it knows.
        """
        known = _known_archs(self.program) if self.kind == "cuda" else []
        unknown = [arch for arch in self.archs if _numbers(arch) not in known] if known else []
        if not unknown:
            return
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        whose = f"TORCH_CUDA_ARCH_LIST={listed}" if listed else "this machine's GPUs"
        oldest, newest = ("{}.{}".format(*numbers) for numbers in (known[0], known[-1]))
        too_new = _numbers(unknown[0]) > known[-1]
        remedy = "a newer toolkit" if too_new else "an older toolkit"
        other = f"name {newest}+PTX in TORCH_CUDA_ARCH_LIST" if too_new else f"leave out {', '.join(unknown)}"
        raise OpBuildError(
            f"{whose}: nvcc {self.version} does not know {', '.join(unknown)}; it compiles for {oldest} to {newest}",
            f"{other}, or set CUDA_HOME to {remedy} (it is {self.home})",
        )

    def command(self, source: Path, csrc: Path, host: Sequence[str], output: Path) -> list[str]:
        """Compile one file with a C++ compiler, and its options, for the host's side; the output is the last word."""
        files = ["-c", str(source), "-o", str(output)]
        if self.kind == "rocm":
            archs = [f"--offload-arch={arch}" for arch in self.archs]
            flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-D__HIP_PLATFORM_AMD__"]
            return [str(self.program), *archs, *flags, f"-I{csrc}", *files]
        flags = ["-std=c++17", "-O3", f"-Xcompiler={','.join(['-fPIC', '-fvisibility=hidden', *host[1:]])}"]
        flags.append(f"-ccbin={host[0]}")
        return [str(self.program), *flags, *gencode(self.archs), f"-I{csrc}", *files]

    def link_flags(self) -> list[str]:
        """CUDA's runtime is linked in, so that the library also loads where there is no CUDA."""
        if self.kind == "rocm":
            return [f"-L{self.home / 'lib'}", "-lamdhip64"]
        folders = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib")]
        found = [f"-L{folder}" for folder in folders if os.path.exists(folder / "libcudart_static.a")]
        return [*found[:1], "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]

    def identity(self) -> str:
        """What changes when the compiler does, found without running it."""
        stat = self.program.stat()
        return f"{self.kind} {self.version} {self.program.resolve()} {stat.st_size} {stat.st_mtime_ns} {self.archs}"


def find_gpu_compiler(torch: TorchBuild) -> GpuCompiler:
    """Nvcc or hipcc, whichever torch (or `$DS_ACCELERATOR`) calls for.

    Raises:
        OpBuildError: it is not there, it is of another major version than torch's, or the list of archs is no such.
    """
    return _find_cuda(torch) if torch.accelerator == "cuda" else _find_rocm()


# --- CUDA -----------------------------------------------------------------------------------------------------------


def _find_cuda(torch: TorchBuild) -> GpuCompiler:
    home = _cuda_home(torch)
    version = next(filter(None, (_defined(folder / "cuda.h", "CUDA_VERSION") for folder in _include(home))), None)
    if not version:
        raise OpBuildError(f"{home} has no include/cuda.h", "set CUDA_HOME to a CUDA toolkit, headers included")
    toolkit = int(version) // 1000, int(version) % 1000 // 10
    text = f"{toolkit[0]}.{toolkit[1]}"
    if reason := cuda_mismatch("the toolkit", text, torch.cuda):
        raise OpBuildError(reason, f"set CUDA_HOME to a toolkit {torch.cuda} (it is {home}), or {SKIP_CHECK}")
    return GpuCompiler("cuda", home / "bin" / "nvcc", home, text, cuda_archs(toolkit))


def _include(home: Path) -> list[Path]:
    """Where a toolkit's headers may be; conda's, and those for another processor, are below targets/."""
    return [
        home / "include",
        *(home / "targets" / f"{kind}-linux" / "include" for kind in (platform.machine(), "sbsa")),
    ]


def cuda_mismatch(what: str, cuda: str | None, torch_cuda: str | None) -> str | None:
    """Why what was made with one CUDA does not go with torch's, or None; minor versions may differ."""
    if not cuda or not torch_cuda or cuda.split(".")[0] == torch_cuda.split(".")[0]:
        return None
    if os.environ.get("DS_SKIP_CUDA_CHECK", "0") not in ("", "0"):
        return None
    return f"{what} has CUDA {cuda}, but torch was built with CUDA {torch_cuda}: the major versions must be the same"


def _cuda_home(torch: TorchBuild) -> Path:
    """`$CUDA_HOME`, `$CUDA_PATH`, that of the nvcc on PATH (a link, perhaps, or script), or of PyPI's beside torch."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named:
        home = _named_home(named)
    elif nvcc is None:
        beside_torch = sorted(torch.home.parent.glob("nvidia/cu*/bin/nvcc"))
        home = beside_torch[-1].parent.parent if beside_torch else Path("/usr/local/cuda")
    else:
        home = Path(nvcc).resolve().parent.parent
        if not any(os.path.exists(folder / "cuda.h") for folder in _include(home)):
            home = _home_by_asking(nvcc) or home
    if not os.path.exists(home / "bin" / "nvcc"):
        where = f"CUDA_HOME={named} has no bin/nvcc" if named else "there is no nvcc on PATH or in /usr/local/cuda"
        raise OpBuildError(where, f"install the CUDA toolkit and set CUDA_HOME to it, or pip install {PYPI_NVCC}")
    return home


def _named_home(named: str) -> Path:
    """The toolkit that a variable means: its folder, its bin, its nvcc, or conda's targets/x86_64-linux.

    Of a list such as ":/usr/local/cuda", which adding to an unset variable leaves, the first with an nvcc.
    """
    homes = []
    for part in filter(None, map(str.strip, named.split(":"))):
        home = Path(os.path.expanduser(part))
        inside = 2 if home.name == "nvcc" or home.parent.name == "targets" else 1 if home.name == "bin" else 0
        homes.append(home.parents[inside - 1] if inside and len(home.parents) >= inside else home)
    return next((home for home in homes if os.path.exists(home / "bin" / "nvcc")), homes[0] if homes else Path(named))


@cache
def _home_by_asking(nvcc: str) -> Path | None:
    told = _output([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"])
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return Path(os.path.normpath(top[1].strip())) if top else None


def cuda_archs(toolkit: tuple[int, int]) -> tuple[str, ...]:
    """What `$TORCH_CUDA_ARCH_LIST` says; else the GPUs that are there; else a usual list for the toolkit.

    Raises:
        OpBuildError: it is no such list, or "native" where there is no GPU.
    """
    named = named_archs()
    if named and named != ("native",):
        return named
    if found := _gpus_nvidia():
        return found
    if named:
        raise OpBuildError("TORCH_CUDA_ARCH_LIST=native, but nvidia-smi shows no GPU here", "name the archs")
    usual = [arch for arch, (first, end) in _USUAL_CUDA.items() if first <= toolkit < end]
    return (*usual[:-1], f"{usual[-1]}+PTX")


def named_archs() -> tuple[str, ...]:
    """`$TORCH_CUDA_ARCH_LIST`: capabilities ("8.0;9.0+PTX"; PTX also serves later GPUs), generations ("Ampere") in
    their place, or "native"; nothing where it is not set.

    Raises:
        OpBuildError: it is something else.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named.lower() == "native":
        return ("native",)
    archs = []
    for word in _words(named):
        for arch in _GENERATIONS.get(word.removesuffix("+PTX"), word).split(";"):
            if not _CUDA_ARCH.fullmatch(arch):
                raise OpBuildError(
                    f"TORCH_CUDA_ARCH_LIST={named}: {word!r} is neither a capability such as 8.0 or 9.0+PTX, nor "
                    f"native, nor one of {', '.join(_GENERATIONS)}",
                    "correct the list, or unset it",
                )
            archs.append(arch)
    return tuple(dict.fromkeys(archs))


@cache
def _known_archs(nvcc: Path) -> list[tuple[int, int]]:
    """What an nvcc compiles for, the oldest first; nothing where it does not say so (before CUDA 11)."""
    numbers = sorted({int(number) for number in re.findall(r"compute_(\d+)", _output([str(nvcc), "--list-gpu-arch"]))})
    return [divmod(number, 10) for number in numbers]


def _numbers(arch: str) -> tuple[int, int]:
    """`9.0a+PTX` -> (9, 0)."""
    major, _, minor = arch.removesuffix("+PTX").rstrip("af").partition(".")
    return int(major), int(minor)


# From this capability on, and below it, the kernels' sources are the same text; a test looks.
_SOURCES_DIFFER_AT = (8, 0)


def gencode(archs: Sequence[str]) -> list[str]:
    """Nvcc's flags for the archs: what takes long, the way to PTX, is gone once for all whose sources are the same.

    The machine code is as if each had its own, for no kernel uses what a later capability alone has.
    """
    lowest: dict[bool, str] = {}
    flags: dict[str, list[str]] = {}
    for arch in sorted(archs, key=_capability):
        number = arch.removesuffix("+PTX").replace(".", "")
        is_plain = number.isdecimal() and not arch.endswith("+PTX")
        shared = lowest.setdefault(_capability(arch) >= _SOURCES_DIFFER_AT, number) if is_plain else number
        kinds = [f"sm_{number}", f"compute_{number}"] if arch.endswith("+PTX") else [f"sm_{number}"]
        flags.setdefault(shared, []).extend(kinds)
    return [f"-gencode=arch=compute_{shared},code=[{','.join(dict.fromkeys(of))}]" for shared, of in flags.items()]


def _capability(arch: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", arch)[:2]
    return int(major), int(minor)


@cache
def _gpus_nvidia() -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return tuple(sorted(set(re.findall(r"^\d+\.\d$", said, re.MULTILINE))))


# --- ROCm -----------------------------------------------------------------------------------------------------------


def _find_rocm() -> GpuCompiler:
    named = os.environ.get("ROCM_HOME") or os.environ.get("ROCM_PATH")
    hipcc = shutil.which("hipcc")
    home = Path(named) if named else Path(hipcc).resolve().parent.parent if hipcc else Path("/opt/rocm")
    program = home / "bin" / "hipcc"
    header = home / "include" / "hip" / "hip_version.h"
    if not os.path.exists(program) or not os.path.exists(header):
        where = f"ROCM_HOME={named} has no bin/hipcc" if named else "there is no hipcc on PATH or in /opt/rocm"
        raise OpBuildError(f"{where} with its headers", "install ROCm's HIP and set ROCM_HOME to it")
    major, minor = (_defined(header, f"HIP_VERSION_{part}") or "0" for part in ("MAJOR", "MINOR"))
    return GpuCompiler("rocm", program, home, f"{major}.{minor}", _rocm_archs(int(major)))


def _rocm_archs(major: int) -> tuple[str, ...]:
    named = _words(os.environ.get("PYTORCH_ROCM_ARCH", ""))
    if wrong := [word for word in named if word != "native" and not re.fullmatch(r"gfx[0-9a-f]+(:[a-z+:-]+)?", word)]:
        raise OpBuildError(f"PYTORCH_ROCM_ARCH: {wrong[0]!r} is no arch such as gfx90a")
    if not named or named == ["native"]:
        if found := _gpus_amd():
            return found
        if named:
            raise OpBuildError("PYTORCH_ROCM_ARCH=native, but there is no AMD GPU here; name the archs")
        named = [arch for arch, first in _USUAL_ROCM.items() if major >= first]
    return tuple(dict.fromkeys(named))


def _gpus_amd(topology: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> tuple[str, ...]:
    """From the kernel driver, which writes gfx90a as 90010: major, minor and step of two digits each."""
    found = set()
    for file in topology.glob("*/properties"):
        match = re.search(r"^gfx_target_version (\d+)$", file.read_text(), re.MULTILINE)
        if match and int(match[1]):
            number = int(match[1])
            found.add(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return tuple(sorted(found))


# --- both -----------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.replace(";", " ").replace(",", " ").split()


def _defined(header: Path, name: str) -> str | None:
    """The number that a header defines a macro as."""
    try:
        match = re.search(rf"^\s*#\s*define\s+{name}\s+(\d+)", header.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def _output(command: list[str]) -> str:
    """What a program says, or nothing if it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""
