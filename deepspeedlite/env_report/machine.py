"""The machine: GPUs, processor, memory, limits, disk, network."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deepspeedlite.env_report.preflight import OWN_NAME_REMEDY, own_name, own_name_fault
from deepspeedlite.env_report.probe import op_builder
from deepspeedlite.env_report.rows import BAD, OK, WARN, Row, output_of, read_text
from deepspeedlite.host.cores import cpu_quota, usable_cores
from deepspeedlite.host.gpus import find_devices
from deepspeedlite.host.text import GIB, MIB, size_text
from deepspeedlite.runtime.errors import LaunchError

_ISA_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")
_LEAST_TEMPORARY_BYTES = 16 << 20
_ISA_FLAGS_ARM = ("asimd", "bf16", "sve", "sve2")


def gpu_vendor() -> str:
    """The maker of this machine's GPUs, whatever the visible-devices variables say."""
    return find_devices({"PATH": os.environ.get("PATH", "")}).vendor


def gpus() -> list[Row]:
    """The GPUs ranks would get, and what drives them."""
    try:
        devices = find_devices(os.environ)
    except LaunchError as error:
        return [Row("gpus", "visible", str(error), BAD, "correct or unset the variable")]
    if devices.vendor == "cpu":
        hidden = gpu_vendor() != "cpu"
        value = "none: this machine's GPUs are hidden by variables" if hidden else "none: ranks train on the CPU"
        return [Row("gpus", "visible", value)]
    source = f" by {devices.variable}" if devices.value is not None else ""
    rows = [Row("gpus", "visible", f"{len(devices.ids)} {devices.vendor} ({','.join(devices.ids)}){source}", OK)]
    if devices.vendor == "nvidia":
        query = "--query-gpu=index,name,memory.total,compute_cap,driver_version"
        listed = output_of(["nvidia-smi", query, "--format=csv,noheader"])
        rows += [_nvidia_gpu(line) for line in listed.splitlines()]
        if not listed:
            remedy = "run nvidia-smi: it says why the driver does not answer"
            rows.append(Row("gpus", "nvidia-smi", "missing or failing", WARN, remedy))
    return rows


def _nvidia_gpu(line: str) -> Row:
    """One line of nvidia-smi: index, name, memory, compute capability, driver."""
    index, _, facts = line.partition(", ")
    record, capability = op_builder().read_record(), line.split(", ")[-2]
    if record is not None and (reason := op_builder().misfit(record, None, capability)):
        return Row("gpus", f"GPU {index}", f"{facts}: {reason}", BAD, "install a wheel that has code for it")
    return Row("gpus", f"GPU {index}", facts + (", supported by this wheel" if record and record.archs else ""), OK)


def cpu_and_memory() -> list[Row]:
    """Processor, instruction sets, memory and the limits a container or shell puts on them."""
    info = read_text("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    known = [flag for flag in (*_ISA_FLAGS, *_ISA_FLAGS_ARM) if flag in present]
    quota = cpu_quota()
    capped = f", {quota:.3g} by the control group's quota" if quota is not None else ""
    rows = [
        Row("machine", "cpu", model[1] if model else platform.machine()),
        Row("machine", "instruction sets", " ".join(known) or "none known"),
        Row("machine", "cores", f"{usable_cores()} usable of {os.cpu_count()}{capped}"),
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
    return [*rows, *_control_groups(), _numa(), _shared_memory(), _temporary(), *_root(), *_limits()]


def _control_groups() -> list[Row]:
    if os.path.isdir("/sys/fs/cgroup") and os.listdir("/sys/fs/cgroup"):
        return []
    value = "/sys/fs/cgroup is not there: limits on processors and memory are not known"
    remedy = (
        "mount it (docker run -v /sys/fs/cgroup:/sys/fs/cgroup:ro), or set OMP_NUM_THREADS and MAX_JOBS to the limit"
    )
    return [Row("machine", "control groups", value, WARN, remedy)]


def _temporary() -> Row:
    """Where Python, torch and compilers put files for a while."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        remedy = "mount a writable folder there (docker run --tmpfs /tmp), or set TMPDIR to one"
        return Row("machine", "temporary files", "/tmp and the current folder cannot be written", BAD, remedy)
    free_bytes = shutil.disk_usage(folder).free
    value = f"{size_text(free_bytes)} free in {folder}"
    if free_bytes < _LEAST_TEMPORARY_BYTES:
        return Row("machine", "temporary files", value, WARN, f"make room in {folder}, or set TMPDIR to another folder")
    return Row("machine", "temporary files", value, OK)


def _root() -> list[Row]:
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        return []
    remedy = (
        "mount writable folders for checkpoints and temporary files, and set TMPDIR and TORCH_EXTENSIONS_DIR to such"
    )
    return [Row("machine", "root", "the root file system is mounted read-only", WARN, remedy)]


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


def _numa() -> Row:
    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    lists = [f"{node}: cores {read_text(f'/sys/devices/system/node/{node}/cpulist').strip()}" for node in nodes]
    return Row("machine", "NUMA", "; ".join(lists) or "not told by the kernel")


def disk(paths: Sequence[str]) -> list[Row]:
    """The disks under `paths`: room, and how files can be read and written beside the program there."""
    rows = []
    for path in paths:
        rows += _disk(path, f" in {path}" if len(paths) > 1 else "")
    return [*rows, _io_uring(), _libaio()]


def _disk(path: str, where: str) -> list[Row]:
    if not os.path.isdir(path):
        return [Row("disk", path, "is no folder", BAD, "name a folder that is there: --path DIR")]
    usage = shutil.disk_usage(path)
    value = f"{size_text(usage.free)} free of {size_text(usage.total)}, {_file_system(path)}"
    status, remedy = OK, ""
    if usage.free < 5 * GIB:
        status, remedy = WARN, f"make room in {path}: checkpoints and what is offloaded there may not fit"
    if usage.free < 16 * MIB or not os.statvfs(path).f_favail:
        status, value = BAD, f"full: {value}, {os.statvfs(path).f_favail} files may be made"
    if not os.access(path, os.W_OK):
        status, value, remedy = WARN, f"cannot be written; {value}", "name a folder of your own: --path DIR"
    rows = [Row("disk", path, value, status, remedy)]
    return rows if status == BAD else [*rows, _direct_io(path, f"O_DIRECT{where}")]


def _file_system(path: str) -> str:
    best, kind = "", "unknown file system"
    real = os.path.realpath(path)
    for line in read_text("/proc/self/mounts").splitlines():
        _, place, found, *_ = line.split()
        place = place.replace("\\040", " ")
        if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best):
            best, kind = place, found
    return kind


def _direct_io(path: str, name: str) -> Row:
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            descriptor = os.open(file.name, os.O_WRONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, 4096) as page:  # at a page's beginning, as O_DIRECT wants
                    os.pwrite(descriptor, page, 0)
            finally:
                os.close(descriptor)
    except PermissionError:
        return Row("disk", name, f"{path} cannot be written", WARN, "name a folder of your own: --path DIR")
    except OSError as error:
        remedy = "offload to a disk with ext4 or xfs: here everything goes through the page cache"
        return Row("disk", name, f"not to be had: {error.strerror}", WARN, remedy)
    return Row("disk", name, "works", OK)


def _io_uring() -> Row:
    number, name = 425, "io_uring"  # io_uring_setup, the same on x86-64 and aarch64
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    descriptor = libc.syscall(number, 1, parameters)
    if descriptor >= 0:
        os.close(descriptor)
        return Row("disk", name, "works")
    reason = os.strerror(ctypes.get_errno())
    if ctypes.get_errno() == errno.ENOSYS:
        return Row("disk", name, "not in this kernel; async_io does without")
    remedy = (
        "let the container's seccomp profile allow io_uring_setup, io_uring_enter and io_uring_register (docker run "
    )
    remedy += "--security-opt seccomp=FILE), or set the system's kernel.io_uring_disabled to 0"
    return Row("disk", name, f"blocked: {reason}; async_io does without, more slowly", WARN, remedy)


def _libaio() -> Row:
    header = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    library = ctypes.util.find_library("aio")
    return Row(
        "disk", "libaio", f"{library or 'no library'}, {'with' if header else 'no'} header; async_io needs neither"
    )


def network() -> list[Row]:
    """Interfaces that are up, with their addresses: what NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose among."""
    try:
        import psutil
    except ImportError:  # whose remedy the section on software gives
        return [_own_name()]

    rows = []
    states = psutil.net_if_stats()
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        state = states.get(name)
        shown = [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        if state is not None and state.isup and shown:
            speed = f", {state.speed} Mb/s" if state.speed else ""
            rows.append(Row("network", name, f"{' '.join(shown)}{speed}, MTU {state.mtu}"))
    for link in sorted(Path("/sys/class/infiniband").glob("*")):
        state_text = read_text(link / "ports/1/state").strip()
        rows.append(Row("network", link.name, f"InfiniBand or RoCE, {state_text or 'state unknown'}"))
    variable = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    named = [name for name in variable.split(",") if name and name[0] not in "^="]
    missing = [name for name in named if not any(other.startswith(name) for other in states)]
    if missing:
        value = f"{variable}: there is no {', '.join(missing)} here"
        rows.append(Row("network", "SOCKET_IFNAME", value, BAD, f"name one of {', '.join(sorted(states))}"))
    return [*rows, _own_name()]


def _own_name() -> Row:
    name, address = own_name()
    fault = own_name_fault(name, address)
    return Row("network", "own name", fault or f"{name} is {address}", *((WARN, OWN_NAME_REMEDY) if fault else (OK,)))
