"""What is installed: this package, Python, torch and whether it loads, the ops, and the variables that steer them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from deepspeedlite._version import __version__
from deepspeedlite.env_report.machine import gpu_vendor
from deepspeedlite.env_report.probe import Probe, compiled_libraries, op_builder
from deepspeedlite.env_report.rows import (
    BAD,
    INFO,
    OK,
    WARN,
    Row,
    installed_version,
    output_of,
    read_text,
    torch_files,
    version_numbers,
)
from deepspeedlite.runtime.env import discover_world
from deepspeedlite.runtime.errors import ConfigError, DistributedError

MIN_PYTHON = (3, 10)
MIN_TORCH = "2.10"
# Kept equal to pyproject.toml by a test.
REQUIRED = {"numpy": "1.23", "pydantic": "2.7", "rich": "13", "psutil": "5.9"}
OPTIONAL = {
    "zlib-ng": "checksums of checkpoints, six times as fast as zlib's",
    "mpi4py": "finding ranks under mpirun",
    "tensorboard": "the tensorboard monitor",
    "wandb": "the wandb monitor",
    "comet_ml": "the Comet monitor",
    "hjson": "configurations with comments and unquoted keys",
    "scikit-learn": "the digits of examples/cifar10 without a download",
    "transformers": "its models and Trainer",
    "accelerate": "its DeepSpeed plugin",
}

_PREFIXES = ("MASTER_", "LOCAL_", "CROSS_", "SLURM_JOB", "OMPI_COMM_", "MV2_", "UCX_", "OMP_", "MKL_", "KMP_")
_PREFIXES_GPU = ("CUDA_", "HIP_", "ROCR_", "HSA_", "NCCL_", "RCCL_", "GLOO_")
_PREFIXES_OWN = ("TORCH_", "PYTORCH_", "DS_", "DSL_", "DEEPSPEED")
_NAMES = ("RANK", "WORLD_SIZE", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX", "MAX_JOBS", "TMPDIR")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def software() -> list[Row]:
    """This package, Python, the system, and the packages that are needed or of use."""
    here = Path(__file__).resolve().parent.parent
    commit = ""
    if (here.parent / ".git").exists() and shutil.which("git"):
        commit = output_of(["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=12"])
    rows = [Row("software", "deepspeedlite", f"{__version__}{f' (git {commit})' if commit else ''} in {here}", OK)]
    python = f"{platform.python_version()} in {sys.executable}"
    if sys.version_info >= MIN_PYTHON:
        rows.append(Row("software", "python", python, OK))
    else:
        wanted = ".".join(map(str, MIN_PYTHON))
        rows.append(Row("software", "python", python, BAD, f"use Python {wanted} or newer"))
    system = re.search(r'^PRETTY_NAME="?([^"\n]*)', read_text("/etc/os-release"), re.MULTILINE)
    rows.append(Row("software", "platform", f"{platform.platform()}{f', {system[1]}' if system else ''}"))
    rows += [Row("software", "container", _container()), _locale()]
    rows += [_required(name, least) for name, least in REQUIRED.items()]
    for name, use in OPTIONAL.items():
        found = installed_version(name)
        rows.append(Row("software", name, found or f"not installed (only for {use})", OK if found else INFO))
    return rows


def _locale() -> Row:
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == "utf8":
        return Row("software", "locale", encoding, OK)
    value = f"{encoding}: names of files and text beyond ASCII are not understood"
    return Row("software", "locale", value, WARN, "export LC_ALL=C.UTF-8, or PYTHONUTF8=1")


def _required(name: str, least: str) -> Row:
    found = installed_version(name)
    remedy = f'{sys.executable} -m pip install "{name}>={least}"'
    if found is None:
        return Row("software", name, "not installed", BAD, remedy)
    if version_numbers(found) < version_numbers(least):
        return Row("software", name, f"{found}, older than {least}", BAD, remedy)
    return Row("software", name, found, OK)


def _container() -> str:
    signs = {
        "docker": os.path.exists("/.dockerenv"),
        "podman": os.path.exists("/run/.containerenv"),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "apptainer": "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ,
    }
    return ", ".join(name for name, found in signs.items() if found) or "none seen"


def torch_section(probe: Probe) -> list[Row]:
    """The build of torch, and whether it loads."""
    files = torch_files()
    if files is None:
        remedy = "install the build for this machine, see https://pytorch.org/get-started/locally"
        return [Row("torch", "torch", "not installed", BAD, f"{remedy} (CPU: pip install torch)")]
    rows = [Row("torch", "torch", f"{files.version} in {files.path}", OK)]
    if version_numbers(files.version) < version_numbers(MIN_TORCH):
        remedy = f'{sys.executable} -m pip install --upgrade "torch>={MIN_TORCH}"'
        rows = [Row("torch", "torch", f"{files.version}, older than {MIN_TORCH}", BAD, remedy)]
    build = f"ROCm {files.hip}" if files.hip else f"CUDA {files.cuda}" if files.cuda else "CPU only"
    vendor = gpu_vendor()
    built_for = {"nvidia": files.cuda, "amd": files.hip, "cpu": "any"}[vendor]
    if built_for:
        rows.append(Row("torch", "built for", build, OK))
    else:
        remedy = f"install torch for {'CUDA' if vendor == 'nvidia' else 'ROCm'}, or ranks will train on the CPU"
        rows.append(Row("torch", "built for", f"{build}, but this machine has {vendor} GPUs", WARN, remedy))
    return rows + _torch_loads(probe)


def _torch_loads(probe: Probe) -> list[Row]:
    facts = probe.facts()
    if facts is None:
        value = f"did not finish in {probe.import_timeout_s:.0f} s"
        return [Row("torch", "import torch", value, BAD, "see whether its disk (often a network one) answers")]
    if isinstance(facts, str):
        remedy = f"reinstall it: {sys.executable} -m pip install --force-reinstall torch"
        return [Row("torch", "import torch", f"fails: {facts}", BAD, remedy)]
    rows = [Row("torch", "import torch", "works", OK)]
    if not facts["gloo"]:
        rows.append(Row("torch", "gloo", "missing: CPU ranks cannot talk", WARN, "use an official build of torch"))
    if facts["nccl"]:
        code = facts["nccl"]
        digits = code if isinstance(code, list) else [code >> 32, code >> 16 & 0xFFFF, code & 0xFFFF]
        rows.append(Row("torch", "nccl", ".".join(map(str, digits)), OK))
    if facts["arches"]:
        rows.append(Row("torch", "GPU code for", facts["arches"]))
    return rows


def ops(probe: Probe) -> list[Row]:
    """Each op: whether it is compiled, can be, and loads. None is needed to train: torch does their work instead."""
    builder = op_builder()
    installed, ready, facts = builder.installed_libraries(), compiled_libraries(), probe.facts()
    loads = facts["loads"] if isinstance(facts, dict) else {}
    if torch_files() is None:
        return [Row("ops", "all", "not looked at: torch is not installed")]
    rows = []
    for spec in builder.OPS.values():
        library = ready.get(spec.name)
        if library is None:
            rows.append(_not_compiled(spec, builder.why_not(spec)))
            continue
        from_wheel = library == installed.get(spec.name)
        where = "installed" if from_wheel else "compiled"
        if failure := loads.get(str(library)):
            error = builder.load_error(library, failure, from_wheel)
            rows.append(Row("ops", spec.name, f"{where}, but {error.what}", BAD, error.remedy))
        else:
            works = "and loads" if str(library) in loads else "not tried"
            rows.append(Row("ops", spec.name, f"{where}, {works}", OK))
    return rows + _wheel_record(builder)


def _not_compiled(spec: Any, reason: Any) -> Row:
    if reason is None:
        return Row("ops", spec.name, "compiled when it is first needed", OK)
    remedy = reason.remedy or "install a wheel that has this op"
    return Row("ops", spec.name, f"torch does its work: {reason.what}", WARN, remedy)


def _wheel_record(builder: Any) -> list[Row]:
    record, files = builder.read_record(), torch_files()
    if record is None:
        return [Row("ops", "wheel", "brings no compiled ops")]
    kind = f"CUDA {record.cuda}" if record.cuda else f"ROCm {record.rocm}" if record.rocm else "the CPU"
    built = f"for {kind}{' ' + ' '.join(record.archs) if record.archs else ''}, with torch {record.torch}"
    if reason := builder.misfit(record, files.cuda if files else None, None):
        return [Row("ops", "wheel", f"{built}: {reason}", BAD, "install the wheel of torch's CUDA version")]
    return [Row("ops", "wheel", f"{built}, git {record.git or 'unknown'}", OK)]


def _fault_of(name: str) -> tuple[str, str]:
    """The verdict on a variable of which it is known what it may hold, and the remedy."""
    builder = op_builder()
    try:
        if name == "TORCH_CUDA_ARCH_LIST":
            builder.named_archs()
        elif name == "MAX_JOBS":
            builder.max_jobs()
        elif name == builder.ISA_VARIABLE:
            builder.named_isa()
    except ConfigError as error:
        return BAD, str(error)
    except builder.OpBuildError as error:
        return WARN, str(error)
    return INFO, ""


def variables() -> list[Row]:
    """The variables that steer training, and whether those that place this process agree."""
    rows = []
    for name in sorted(os.environ):
        if name in _NAMES or name.startswith(_PREFIXES + _PREFIXES_GPU + _PREFIXES_OWN):
            value = "(hidden)" if _SECRET_NAME.search(name) else _SECRET_IN_URL.sub("(hidden)", os.environ[name])
            shown = value.encode("unicode_escape", "backslashreplace").decode()
            rows.append(Row("variables", name, shown, *_fault_of(name)))
    try:
        world = discover_world(os.environ)
    except DistributedError as error:
        lines = str(error).splitlines()
        return [*rows, Row("variables", "world", " ".join(lines), BAD, "unset or complete these variables")]
    rows.append(Row("variables", "world", f"rank {world.rank} of {world.world_size}, from {world.source}", OK))
    return rows
