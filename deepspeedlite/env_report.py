"""`dslite_report` (or `python -m deepspeedlite.env_report`): what this machine offers, and what is wrong with it.

A report is a list of sections, and a section is a function that returns rows: plain data with a verdict and, where
the verdict is bad, the remedy. A new section is a new function in SECTIONS. torch is never imported into this
process: its version is read from its files, and whether it loads is tried in a child, so that a broken
installation is a row here and not a traceback. No GPU is initialised.

Exit status: 0, or 1 if a row says that training cannot work as things are. `--json` prints the rows as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeedlite._version import __version__
from deepspeedlite.env import discover_world
from deepspeedlite.errors import DistributedError, LaunchError
from deepspeedlite.launcher.devices import find_devices

INFO, OK, WARN, BAD = "info", "ok", "warn", "bad"
GIB = 1 << 30
_TOOL_TIMEOUT_S = 5.0
_IMPORT_TIMEOUT_S = 120.0
MIN_PYTHON = (3, 10)
MIN_TORCH = "2.10"
# Kept equal to pyproject.toml by a test.
REQUIRED = {"pydantic": "2.7", "rich": "13", "psutil": "5.9"}
OPTIONAL = {
    "numpy": "torch.Tensor.numpy and most data loading",
    "mpi4py": "finding ranks under mpirun",
    "tensorboard": "the tensorboard monitor",
    "wandb": "the wandb monitor",
    "scikit-learn": "the digits of examples/cifar10 without a download",
    "transformers": "its models and Trainer",
    "accelerate": "its DeepSpeed plugin",
}
_ISA_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")
_ISA_FLAGS_ARM = ("asimd", "bf16", "sve", "sve2")
_PREFIXES = ("MASTER_", "LOCAL_", "CROSS_", "SLURM_JOB", "OMPI_COMM_", "MV2_", "UCX_", "OMP_", "MKL_", "KMP_")
_PREFIXES_GPU = ("CUDA_", "HIP_", "ROCR_", "HSA_", "NCCL_", "RCCL_", "GLOO_")
_PREFIXES_OWN = ("TORCH_", "PYTORCH_", "DS_", "DSL_", "DEEPSPEED_")
_NAMES = ("RANK", "WORLD_SIZE", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX", "MAX_JOBS", "TMPDIR")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# Runs in a child. Reads constants of the build only: asking whether a GPU is available would initialise it.
_TORCH_PROBE = """
import json, torch, torch.distributed as d
built = d.is_available()
nccl = getattr(torch._C, "_nccl_version", None) if built and d.is_nccl_available() else None
arches = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
print(json.dumps({"distributed": built, "gloo": built and d.is_gloo_available(), "arches": arches or "",
                  "nccl": nccl() if nccl else None}))
"""


@dataclass(frozen=True)
class Row:
    """One line of the report. `remedy` is set where `status` is warn or bad."""

    section: str
    name: str
    value: str
    status: str = INFO
    remedy: str = ""


@dataclass(frozen=True)
class TorchFiles:
    """What torch's files say of it without importing it."""

    version: str
    path: str
    cuda: str | None
    hip: str | None


# Reading things


def version_numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def read_text(path: str | Path) -> str:
    """A file's text; "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def output_of(command: Sequence[str], timeout_s: float = _TOOL_TIMEOUT_S) -> str:
    """What a tool prints; "" if it fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def installed_version(distribution: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_files() -> TorchFiles | None:
    """The torch that is installed for this Python, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    text = read_text(folder / "version.py")

    def constant(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE)
        return match[1] if match else None

    version = constant("__version__") or installed_version("torch") or "unknown"
    return TorchFiles(version, str(folder), constant("cuda"), constant("hip"))


def size_text(size_bytes: int) -> str:
    """`512 MiB`, `23.5 GiB`."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):.0f} MiB"


# Sections


def software() -> list[Row]:
    """This package, Python, the system, and the packages that are needed or of use."""
    here = Path(__file__).resolve().parent
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
    rows.append(Row("software", "container", _container()))
    rows += [_required(name, least) for name, least in REQUIRED.items()]
    for name, use in OPTIONAL.items():
        found = installed_version(name)
        rows.append(Row("software", name, found or f"not installed (only for {use})", OK if found else INFO))
    return rows


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


def torch_section() -> list[Row]:
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
    vendor = _gpu_vendor()
    built_for = {"nvidia": files.cuda, "amd": files.hip, "cpu": "any"}[vendor]
    if built_for:
        rows.append(Row("torch", "built for", build, OK))
    else:
        remedy = f"install torch for {'CUDA' if vendor == 'nvidia' else 'ROCm'}, or ranks will train on the CPU"
        rows.append(Row("torch", "built for", f"{build}, but this machine has {vendor} GPUs", WARN, remedy))
    return rows + _torch_loads()


def _torch_loads() -> list[Row]:
    # Without a visible GPU the probe cannot touch one, whatever torch does on import.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE], env=env, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        value = f"did not finish in {_IMPORT_TIMEOUT_S:.0f} s"
        return [Row("torch", "import torch", value, BAD, "see whether its disk (often a network one) answers")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        remedy = f"reinstall it: {sys.executable} -m pip install --force-reinstall torch"
        return [Row("torch", "import torch", f"fails: {last}", BAD, remedy)]
    facts = json.loads(done.stdout.strip().splitlines()[-1])
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


def _gpu_vendor() -> str:
    """The maker of this machine's GPUs, whatever the visible-devices variables say."""
    return find_devices({"PATH": os.environ.get("PATH", "")}).vendor


def gpus() -> list[Row]:
    """The GPUs ranks would get, and what drives them."""
    try:
        devices = find_devices(os.environ)
    except LaunchError as error:
        return [Row("gpus", "visible", str(error), BAD, "correct or unset the variable")]
    if devices.vendor == "cpu":
        hidden = _gpu_vendor() != "cpu"
        value = "none: this machine's GPUs are hidden by variables" if hidden else "none: ranks train on the CPU"
        return [Row("gpus", "visible", value)]
    source = f" by {devices.variable}" if devices.from_variable else ""
    rows = [Row("gpus", "visible", f"{len(devices.ids)} {devices.vendor} ({','.join(devices.ids)}){source}", OK)]
    if devices.vendor == "nvidia":
        query = "--query-gpu=index,name,memory.total,compute_cap,driver_version"
        listed = output_of(["nvidia-smi", query, "--format=csv,noheader"])
        for line in listed.splitlines():
            index, _, facts = line.partition(", ")
            rows.append(Row("gpus", f"GPU {index}", facts))
        if not listed:
            remedy = "run nvidia-smi: it says why the driver does not answer"
            rows.append(Row("gpus", "nvidia-smi", "missing or failing", WARN, remedy))
    return rows


def cpu_and_memory() -> list[Row]:
    """Processor, instruction sets, memory and the limits a container or shell puts on them."""
    info = read_text("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    known = [flag for flag in (*_ISA_FLAGS, *_ISA_FLAGS_ARM) if flag in present]
    usable = len(os.sched_getaffinity(0))
    rows = [
        Row("machine", "cpu", model[1] if model else platform.machine()),
        Row("machine", "instruction sets", " ".join(known) or "none known"),
        Row("machine", "cores", f"{usable} usable of {os.cpu_count()}{_cpu_quota()}"),
    ]
    memory = {
        key: int(value) << 10 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo"), re.M)
    }
    limit = (
        read_text("/sys/fs/cgroup/memory.max").strip()
        or read_text("/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    )
    total = memory.get("MemTotal", 0)
    capped = f", capped at {size_text(int(limit))}" if limit.isdigit() and int(limit) < total else ""
    rows.append(
        Row("machine", "memory", f"{size_text(memory.get('MemAvailable', 0))} free of {size_text(total)}{capped}")
    )
    return [*rows, _shared_memory(), *_limits()]


def _cpu_quota() -> str:
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return f", capped at {int(quota) / int(period):.1f}" if quota.isdigit() and period.isdigit() else ""


def _shared_memory() -> Row:
    try:
        disk = shutil.disk_usage("/dev/shm")
    except OSError:
        return Row("machine", "/dev/shm", "missing", WARN, "mount a tmpfs there: data-loading workers and NCCL need it")
    value = f"{size_text(disk.free)} free of {size_text(disk.total)}"
    if disk.free < GIB:
        remedy = "give a container more: docker run --shm-size=8g (or --ipc=host); delete old files in it"
        return Row("machine", "/dev/shm", value, WARN, remedy)
    return Row("machine", "/dev/shm", value, OK)


def _limits() -> list[Row]:
    """Limits that training runs into, with the least that does not hurt."""
    table = (
        ("open files", resource.RLIMIT_NOFILE, 1024, str, "ulimit -n 65536, or docker run --ulimit nofile=65536"),
        ("locked memory", resource.RLIMIT_MEMLOCK, 1 << 20, size_text, "ulimit -l unlimited, for RDMA and io_uring"),
    )
    rows = []
    for name, limit, least, show, remedy in table:
        soft, _ = resource.getrlimit(limit)
        value = "unlimited" if soft == resource.RLIM_INFINITY else show(soft)
        enough = soft == resource.RLIM_INFINITY or soft >= least
        rows.append(Row("machine", name, value, OK if enough else WARN, "" if enough else remedy))
    return rows


def compilers() -> list[Row]:
    """What ops can be compiled with. Nothing here is needed to train."""
    cxx = os.environ.get("CXX", "c++")
    rows = [_tool("c++", [*cxx.split(), "--version"], "install one to compile ops: apt-get install g++", WARN)]
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


def _tool(name: str, command: list[str], remedy: str, if_missing: str) -> Row:
    lines = output_of(command).splitlines()
    if not lines:
        return Row("compilers", name, "not found", if_missing, remedy)
    # nvcc and hipcc name themselves first and their version some lines below.
    line = next((line for line in lines if re.search(r"release \d|version:? \d", line)), lines[0])
    return Row("compilers", name, f"{line.strip()} ({shutil.which(command[0])})", OK)


def variables() -> list[Row]:
    """The variables that steer training, and whether those that place this process agree."""
    rows = []
    for name in sorted(os.environ):
        if name in _NAMES or name.startswith(_PREFIXES + _PREFIXES_GPU + _PREFIXES_OWN):
            value = "(hidden)" if _SECRET_NAME.search(name) else _SECRET_IN_URL.sub("(hidden)", os.environ[name])
            rows.append(Row("variables", name, value.encode("unicode_escape", "backslashreplace").decode()))
    try:
        world = discover_world(os.environ)
    except DistributedError as error:
        lines = str(error).splitlines()
        return [*rows, Row("variables", "world", " ".join(lines), BAD, "unset or complete these variables")]
    rows.append(Row("variables", "world", f"rank {world.rank} of {world.world_size}, from {world.source}", OK))
    return rows


SECTIONS: tuple[Callable[[], list[Row]], ...] = (software, torch_section, gpus, cpu_and_memory, compilers, variables)


# The report


def collect(sections: Sequence[Callable[[], list[Row]]] = SECTIONS) -> list[Row]:
    """Run all sections at once (most of their time is waiting for tools) and give their rows in order."""
    with ThreadPoolExecutor(max_workers=len(sections)) as pool:
        futures = [(section, pool.submit(section)) for section in sections]
        return [row for section, future in futures for row in _rows_of(section, future)]


def _rows_of(section: Callable[[], list[Row]], future: Future[list[Row]]) -> list[Row]:
    try:
        return future.result()
    except Exception as error:  # a report about a strange machine must not end at the first strangeness
        name = section.__name__
        return [Row(name, "this section", f"failed: {error!r}", WARN, "please report this with the line above")]


def render(rows: Sequence[Row], colour: bool) -> str:
    """The report as aligned text."""
    paint = {OK: "32", WARN: "33", BAD: "1;31"}
    width = max((len(row.name) for row in rows), default=0)
    lines: list[str] = []
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += [""] * bool(lines) + [section]
        mark = f"{'' if row.status == INFO else row.status:4}"
        if colour and row.status in paint:
            mark = f"\x1b[{paint[row.status]}m{mark}\x1b[0m"
        lines.append(f"  {mark}  {row.name:{width}}  {row.value}".rstrip())
        if row.remedy:
            lines.append(f"        {'':{width}}  -> {row.remedy}")
    return "\n".join([*lines, "", verdict(rows)])


def verdict(rows: Sequence[Row]) -> str:
    """The last line: how many rows need attention."""
    count = {status: sum(row.status == status for row in rows) for status in (WARN, BAD)}
    if count[BAD]:
        return f"{count[BAD]} broken, {count[WARN]} to look at: mend the lines marked bad first"
    return f"nothing broken, {count[WARN]} to look at" if count[WARN] else "all is well"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="dslite_report", description="What this machine offers for training, and what is wrong."
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    rows = collect()
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "verdict": verdict(rows)}, indent=1))
    else:
        print(render(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return int(any(row.status == BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
