"""The last step of an image's build stage: fails unless the wheel holds what the image will promise.

    python check_wheel.py WHEEL --accel cuda --archs "8.0;9.0+PTX"

Every library of a GPU op must have code for every GPU asked for: by NVIDIA's cuobjdump for CUDA, by the names of the
code objects for ROCm. Nothing may be in the wheel but the package, sources of ops included, and its licence.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "deepspeedlite/"
KINDS = (".py", ".pyi", ".so", ".cpp", ".h", ".cu", ".cuh", ".json", ".typed")


def main() -> None:
    """Check, and print a line for each library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--accel", choices=("cpu", "cuda", "rocm"), default="cpu")
    parser.add_argument("--archs", default="")
    chosen = parser.parse_args()
    with zipfile.ZipFile(chosen.wheel) as wheel, tempfile.TemporaryDirectory() as scratch:
        faults = check_contents(wheel.namelist())
        libraries = [name for name in wheel.namelist() if name.endswith(".so")]
        if libraries:
            record = json.loads(wheel.read(f"{PACKAGE}ops/lib/record.json"))
            table = runpy.run_path(wheel.extract(f"{PACKAGE}ops/op_builder/spec.py", scratch), run_name="spec")["OPS"]
            if record["accelerator"] != chosen.accel:
                faults.append(f"its ops are for {record['accelerator']}, not {chosen.accel}")
            archs = wanted_archs(chosen.accel, chosen.archs or " ".join(record["archs"]))
        for name in libraries:
            on_gpu = table[Path(name).stem].gpu and chosen.accel != "cpu"
            faults += check_library(Path(wheel.extract(name, scratch)), chosen.accel, archs if on_gpu else set())
    print(f"{chosen.wheel.name}: {chosen.wheel.stat().st_size / 1e6:.2f} MB, {len(libraries)} libraries of ops")
    if faults:
        sys.exit("\n".join(f"{chosen.wheel.name}: {fault}" for fault in faults))


def check_contents(names: list[str]) -> list[str]:
    """What is in the wheel and should not be, or should be and is not."""
    info = next(f"{folder}/" for folder, *_ in (name.split("/") for name in names) if folder.endswith(".dist-info"))
    faults = [f"{name} does not belong in a wheel" for name in names if not name.startswith((PACKAGE, info))]
    faults += [
        f"{name} is no file of a package"
        for name in names
        if name.startswith(PACKAGE)
        and not name.endswith(("/", *KINDS))
        and ".dist-info/" not in name  # drop_in has one
    ]
    wanted = [f"{info}licenses/LICENSE", f"{PACKAGE}ops/op_builder/spec.py", f"{PACKAGE}ops/csrc/common/isa.h"]
    return faults + [f"{name} is missing" for name in wanted if name not in names]


def wanted_archs(accel: str, text: str) -> set[str]:
    """`8.0;9.0+PTX` -> sm_80, sm_90 and ptx_90; ROCm's are taken as they are."""
    archs = text.replace(";", " ").replace(",", " ").split()
    if accel == "rocm":
        return set(archs)
    number = {arch: arch.removesuffix("+PTX").replace(".", "") for arch in archs}
    return {f"sm_{n}" for n in number.values()} | {f"ptx_{n}" for arch, n in number.items() if arch.endswith("+PTX")}


def check_library(library: Path, accel: str, wanted: set[str]) -> list[str]:
    """The GPUs that a library should have code for and has not."""
    found = {"cuda": cuda_archs, "rocm": rocm_archs, "cpu": lambda _: set()}[accel](library)
    print(f"  {library.name:<20}{' '.join(sorted(found)) or 'for the CPU'}")
    return [f"{library.name} has no code for {arch}" for arch in sorted(wanted - found)]


def cuda_archs(library: Path) -> set[str]:
    """sm_90 for machine code, ptx_90 for PTX."""
    folders = (Path(__file__).parent, Path(sysconfig.get_path("purelib")))
    wheels = (str(path) for folder in folders for path in folder.glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or next(wheels, None)
    if tool is None:
        sys.exit("there is no cuobjdump: pip install nvidia-cuda-cuobjdump")

    def listed(option: str) -> set[str]:
        done = subprocess.run([tool, option, str(library)], capture_output=True, text=True, check=False)
        return set(re.findall(r"sm_(\d+[a-z]?)", done.stdout))

    return {f"sm_{n}" for n in listed("--list-elf")} | {f"ptx_{n}" for n in listed("--list-ptx")}


def rocm_archs(library: Path) -> set[str]:
    """gfx90a and its like."""
    return {name.decode() for name in re.findall(rb"amdgcn-amd-amdhsa--(gfx\w+)", library.read_bytes())}


if __name__ == "__main__":
    main()
