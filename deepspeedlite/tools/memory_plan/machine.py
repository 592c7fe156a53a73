"""What this machine has for training and how fast it is, measured in a few seconds: `measure`.

Memory copies, the bus, and a matrix product are timed for a moment each; the disk by writing and reading one file
with async_io. The figures are those of large pieces, the best that a training can come near.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from deepspeedlite.ops.aio import aio_handle
from deepspeedlite.runtime.device import on_accelerator, pick_device
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.runtime.tensors import DTYPES

SPARE = 0.1  # of the free memory and disk: for what is not counted, and for other programs

_COPY_BYTES, _DISK_BYTES = 256 << 20, 256 << 20
_MOMENT_S = 0.3


class Machine(NamedTuple):
    """One host. Bytes are what may be used; rates are bytes per second."""

    device: str  # its name
    gpus: int  # 0: the ranks compute on the CPU's cores, and share the host's memory and rates
    gpu_bytes: int  # of each
    host_bytes: int
    disk_bytes: int
    flops: float  # operations per second, of a matrix product on one GPU or on all cores
    device_rate: float  # read and written by a copy in one GPU's memory
    host_rate: float  # the same in the host's
    bus_rate: float  # between the host's memory and one GPU's
    read_rate: float  # the disk's; 0: there is none
    write_rate: float
    note: str  # about the disk


def measure(dtype: str, path: str) -> Machine:
    """Look at this machine, and time it.

    Args:
        dtype: fp32, bf16 or fp16, of the matrix product.
        path: a folder on the disk; a file of 256 MiB is written there, and removed.
    """
    device = pick_device()
    on_gpu = device.is_accelerator
    host_rate = _copy_rate(torch.device("cpu"), torch.device("cpu"), device.synchronize)
    read_rate, write_rate, note = _disk_rates(path)
    free_gpu = device.free_bytes()
    free_disk = shutil.disk_usage(path).free if Path(path).is_dir() else 0
    return Machine(
        device=device.name,
        gpus=device.module.device_count() if on_gpu else 0,
        gpu_bytes=_usable(free_gpu),
        host_bytes=_usable(psutil.virtual_memory().available),
        disk_bytes=_usable(free_disk),
        flops=_flops(device.torch_device, DTYPES[dtype], device.synchronize),
        device_rate=_copy_rate(device.torch_device, device.torch_device, device.synchronize) if on_gpu else host_rate,
        host_rate=host_rate,
        bus_rate=_copy_rate(torch.device("cpu"), device.torch_device, device.synchronize) if on_gpu else host_rate / 2,
        read_rate=read_rate,
        write_rate=write_rate,
        note=note,
    )


def _usable(nbytes: int) -> int:
    return int(nbytes * (1 - SPARE))


def _best_s(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    times_s: list[float] = []
    call()
    synchronize()
    while sum(times_s) < _MOMENT_S or len(times_s) < 3:
        started_s = time.perf_counter()
        call()
        synchronize()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def _copy_rate(source: torch.device, target: torch.device, synchronize: Callable[[], None]) -> float:
    """Bytes per second: those read and those written within one memory, or those that cross the bus."""
    crosses = source != target
    kept = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=source, pin_memory=crosses)
    copy = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=target)
    return (1 if crosses else 2) * _COPY_BYTES / _best_s(lambda: copy.copy_(kept), synchronize)


def _flops(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    width = 8192 if on_accelerator(device) else 1024
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / _best_s(lambda: left @ right, synchronize)


def _disk_rates(path: str) -> tuple[float, float, str]:
    """Bytes per second of reading and writing, and what is to be said of them."""
    if not Path(path).is_dir() or shutil.disk_usage(path).free < 2 * _DISK_BYTES:
        return 0, 0, f"{path} is no folder with {2 * _DISK_BYTES >> 20} MiB of room"
    try:
        handle = aio_handle(queue_depth=16, overlap_events=True)
        memory = handle.new_cpu_locked_tensor(_DISK_BYTES, torch.empty(0, dtype=torch.uint8)).random_(0, 256)
        with tempfile.TemporaryDirectory(dir=path, prefix="deepspeedlite-fit-") as folder:
            file = str(Path(folder, "file").resolve())
            handle.sync_pwrite(memory, file)  # a new file's first writing is slower than its later ones
            read_rate = _DISK_BYTES / _median_s(lambda: handle.sync_pread(memory, file))
            write_rate = _DISK_BYTES / _median_s(lambda: handle.sync_pwrite(memory, file))
    except (OpError, OSError) as error:
        return 0, 0, str(error)
    cached = "it has no O_DIRECT: the rates are the page cache's" if handle.get_counts()["direct"] == 0 else ""
    return read_rate, write_rate, cached


def _median_s(call: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        started_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - started_s)
    return statistics.median(found)
