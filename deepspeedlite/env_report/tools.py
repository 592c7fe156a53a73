"""Compilers, CUDA's and ROCm's versions side by side, MPI, and the cache of compiled ops."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from deepspeedlite.env_report.probe import op_builder
from deepspeedlite.env_report.rows import (
    BAD,
    INFO,
    OK,
    WARN,
    Row,
    output_of,
    read_text,
    torch_files,
    version_numbers,
)
from deepspeedlite.host.text import size_text


def compilers() -> list[Row]:
    """What ops can be compiled with. Nothing here is needed to train."""
    rows = [_cxx()]
    rows.append(_tool("ninja", ["ninja", "--version"], "", INFO))
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    row = _tool("nvcc", [nvcc, "--version"], "", INFO)
    release = re.search(r"release (\d+)", row.value)
    files = torch_files()
    if release and files and files.cuda and version_numbers(files.cuda)[0] != int(release[1]):
        remedy = f"set CUDA_HOME to a CUDA {version_numbers(files.cuda)[0]} toolkit before compiling ops"
        row = Row("compilers", "nvcc", f"{row.value}, but torch is built for CUDA {files.cuda}", WARN, remedy)
    rows.append(row)
    if home and row.value == "not found":
        rows[-1] = Row("compilers", "nvcc", f"no working {nvcc}", WARN, "correct CUDA_HOME, or unset it")
    rows.append(_tool("hipcc", ["hipcc", "--version"], "", INFO))
    return rows


def _cxx() -> Row:
    builder = op_builder()
    try:
        wrapper, compiler, options = builder.find_cxx()
        builder.check_cxx([*wrapper, str(compiler), *options])
    except builder.OpBuildError as error:
        return Row("compilers", "c++", error.what, WARN, error.remedy)
    return _tool("c++", [*wrapper, str(compiler), *options, "--version"], "", INFO)


def _tool(name: str, command: list[str], remedy: str, if_missing: str) -> Row:
    lines = output_of(command).splitlines()
    if not lines:
        return Row("compilers", name, "not found", if_missing, remedy)
    # nvcc and hipcc name themselves first and their version some lines below.
    line = next((line for line in lines if re.search(r"release \d|version:? \d", line)), lines[0])
    return Row("compilers", name, f"{line.strip()} ({shutil.which(command[0])})", OK)


def accelerators() -> list[Row]:
    """CUDA's and ROCm's versions side by side: what the driver can do, and what torch and the ops were made with."""
    files, record = torch_files(), op_builder().read_record()
    torch_cuda, torch_hip = (files.cuda, files.hip) if files else (None, None)
    wheel = {"cuda": record.cuda if record else None, "rocm": record.rocm if record else None}
    rows = []
    driver = read_text("/proc/driver/nvidia/version")
    if match := re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", driver):
        able = re.search(r"CUDA Version: ([\d.]+)", output_of(["nvidia-smi"]))
        value = f"{match[1]}{f', able to run CUDA {able[1]}' if able else ''}"
        if able and torch_cuda and version_numbers(able[1])[:1] < version_numbers(torch_cuda)[:1]:
            remedy = f"update the driver, or install a torch for CUDA {able[1]}"
            rows.append(Row("accelerators", "NVIDIA driver", f"{value}, but torch needs {torch_cuda}", BAD, remedy))
        else:
            rows.append(Row("accelerators", "NVIDIA driver", value, OK))
    if amd := read_text("/sys/module/amdgpu/version").strip():
        rows.append(Row("accelerators", "AMD driver", amd, OK))
    if rocm := read_text("/opt/rocm/.info/version").strip():
        rows.append(_beside("ROCm", rocm, torch_hip))
    rows += [Row("accelerators", "torch's CUDA", torch_cuda, OK)] if torch_cuda else []
    rows += [Row("accelerators", "torch's ROCm", torch_hip, OK)] if torch_hip else []
    rows += [_beside("the wheel's CUDA", wheel["cuda"], torch_cuda)] if wheel["cuda"] else []
    rows += [_beside("the wheel's ROCm", wheel["rocm"], torch_hip)] if wheel["rocm"] else []
    return rows or [Row("accelerators", "CUDA and ROCm", "neither here")]


def _beside(name: str, version: str, torchs: str | None) -> Row:
    if torchs and version_numbers(version)[:1] != version_numbers(torchs)[:1]:
        return Row("accelerators", name, f"{version}, but torch's is {torchs}", WARN, "use one major version for both")
    return Row("accelerators", name, version, OK)


def mpi() -> list[Row]:
    """What `--launcher openmpi` and `mpich` would call."""
    rows = []
    for name, ask in (("mpirun", "--version"), ("mpiexec.hydra", "--version"), ("srun", "-V")):
        path = shutil.which(name)
        said = output_of([path, ask]) if path else ""
        version = re.search(r"Version: +(\S+)", said)  # hydra's, some lines below its name
        value = f"version {version[1]}" if version else (said.splitlines() or ["says no version"])[0]
        rows.append(Row("mpi", name, f"{value} ({path})" if path else "not found"))
    return rows


def _room(builder: Any) -> list[Row]:
    """What is wrong with the disk that ops are compiled on."""
    folder = builder.cache_folder()
    near = next((path for path in (folder, *folder.parents) if os.path.isdir(path)), Path("/"))
    free_bytes = shutil.disk_usage(near).free
    if free_bytes >= builder.LEAST_BYTES:
        return []
    value = f"{size_text(free_bytes)} free in {near}, and compiling takes {size_text(builder.LEAST_BYTES)}"
    return [Row("cache", "room", value, WARN, "make room there, or set TORCH_EXTENSIONS_DIR to a folder elsewhere")]


def cache() -> list[Row]:
    """Ops compiled on this machine, and what builds have left."""
    builder = op_builder()
    entries = builder.cache_entries()
    size_bytes = sum(entry.size_bytes for entry in entries)
    rows = [Row("cache", "compiled ops", f"{len(entries)}, {size_text(size_bytes)} in {builder.cache_folder()}")]
    first, *others = builder.places()
    remedy = "set TORCH_EXTENSIONS_DIR to a folder of your own"
    if first.obstacle and all(place.obstacle for place in others):
        told = "; ".join(dict.fromkeys(place.obstacle for place in (first, *others)))
        rows.append(Row("cache", "folder", f"{told}: no op is compiled", WARN, remedy))
    elif first.obstacle:
        rows.append(Row("cache", "folder", f"{first.obstacle}: {builder.cache_folder()} is used", WARN, remedy))
    rows += _room(builder)
    for entry in entries:
        if entry.locked:
            rows.append(Row("cache", entry.library.name, "is being compiled now"))
        elif entry.library.suffix == ".tmp":
            rows.append(Row("cache", entry.library.name, "left by a killed build", WARN, f"rm -r {entry.library}"))
        elif entry.wrong and not entry.stale and entry.wrong != builder.NO_SUM:
            remedy = f"nothing need be done: it is compiled again when it is needed, or rm {entry.library}"
            rows.append(Row("cache", entry.library.name, entry.wrong, WARN, remedy))
    if unsummed := sum(entry.wrong == builder.NO_SUM and not entry.stale for entry in entries):
        rows.append(
            Row("cache", "without checksum", f"{unsummed}, of an earlier version: compiled once more when needed")
        )
    stale = [entry for entry in entries if entry.stale and entry.library.suffix != ".tmp"]
    if stale:
        value = (
            f"{len(stale)}, {size_text(sum(entry.size_bytes for entry in stale))}: for other sources, torch or Python"
        )
        rows.append(Row("cache", "of no use here", value))
    return rows
