"""Memory in one line: the device's allocator and the host process.

`see_memory_usage(message, force=True)` is the call to sprinkle through a script that runs out of memory;
`memory_breakdown()` is the line the engine prints for the config key of that name. Both work without a GPU, and
neither makes torch start one: with no GPU in use yet only the host is shown.

Figures are in GiB (2**30 bytes). "reserved" is what the caching allocator holds of the device, "allocated" the part
of it that tensors use; a large gap between the two is fragmentation.
"""

from __future__ import annotations

import logging

from deepspeedlite.runtime.device import Device, device_in_use
from deepspeedlite.runtime.log import log_dist, logger

_GIB_BYTES = 1 << 30


def memory_breakdown(device: Device | None = None) -> str:
    """One line: `memory (GiB) | device allocated 1.20 (peak 2.31), reserved ... | host RSS 3.10, available ...`.

    Args:
        device: whose allocator to show; None: the GPU in use, if any.
    """
    parts = ["memory (GiB)"]
    stats = (device or device_in_use()).memory_stats()
    if stats:
        allocated, reserved = (
            f"{kind} {_gib(stats[f'{kind}_bytes'])} (peak {_gib(stats[f'peak_{kind}_bytes'])})"
            for kind in ("allocated", "reserved")
        )
        parts.append(f"device {allocated}, {reserved}")
    total, available = host_bytes()
    parts.append(f"host RSS {_gib(host_rss_bytes())}, available {_gib(available)} of {_gib(total)}")
    return " | ".join(parts)


def see_memory_usage(message: str, force: bool = False, ranks: list[int] | None = None) -> None:
    """Log `message` with the memory line, then restart the device's peak figures.

    So a line's peaks cover the code since the line before it.

    Args:
        message: says where in the script this is.
        force: log always; without it only at `DSL_LOG_LEVEL=debug`, and for nothing otherwise.
        ranks: which ranks speak (-1: all); None: rank 0.
    """
    if not force and not logger.isEnabledFor(logging.DEBUG):
        return
    device = device_in_use()
    log_dist(f"{message} | {memory_breakdown(device)}", ranks=ranks, level=logging.INFO if force else logging.DEBUG)
    device.reset_peak_memory()


def throughput_memory(device: Device) -> str:
    """The memory part of a throughput line: the device's tensors, or on the CPU the process."""
    stats = device.memory_stats()
    if not stats:
        return f"HostRSS={_gib(host_rss_bytes())}GiB"
    allocated, peak = stats["allocated_bytes"], stats["peak_allocated_bytes"]
    return f"MemAllocated={_gib(allocated)}GiB, MaxMemAllocated={_gib(peak)}GiB"


def host_bytes() -> tuple[int, int]:
    """The host's memory, and what of it can be had."""
    import psutil  # 7 ms, which only those who look need wait for

    host = psutil.virtual_memory()
    return int(host.total), int(host.available)


def host_rss_bytes() -> int:
    """What this process has in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB_BYTES:.2f}"
