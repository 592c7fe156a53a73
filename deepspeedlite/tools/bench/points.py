"""What is measured: which collectives, number types and sizes, and what is known of each afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# By nccl-tests' names; a size counts the whole buffer: of an all-gather its output, of a reduce-scatter its input.
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Plan:
    """What to measure, for how long each, and where it is written to, if anywhere."""

    collectives: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    seconds: float
    json: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Point:
    """One collective at one size: the time of a call (median of the batches, each the slowest rank's) and its range.

    `algbw_gb_s` is the size by that time, in 1e9 bytes per second; `busbw_gb_s` is what each rank's link carried.
    """

    collective: str
    dtype: str
    size_bytes: int
    calls: int
    time_us: float
    fastest_us: float
    slowest_us: float
    algbw_gb_s: float
    busbw_gb_s: float


def parse_sizes(text: str) -> tuple[int, ...]:
    """`1K:64M` (from, to, times 4 each), `1K:64M:2` (times 2) or `4K,1M` in bytes; K, M and G are powers of 1024.

    Raises:
        ValueError: it is none of these; the message says how to write it.
    """
    first, *rest = text.split(":")
    if not rest:
        return tuple(_bytes(part) for part in text.split(","))
    step = int(rest[1]) if len(rest) == 2 and rest[1].isdecimal() else 4 if len(rest) == 1 else 0
    low, high = _bytes(first), _bytes(rest[0])
    if step < 2 or high < low:
        raise ValueError(f"{text}: write sizes as FROM:TO or FROM:TO:FACTOR, such as 1K:64M:4")
    sizes = [low]
    while sizes[-1] * step <= high:
        sizes.append(sizes[-1] * step)
    return tuple(sizes)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,11})([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes, such as 512, 4K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def human_bytes(size_bytes: int) -> str:
    """Such as `64 KiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.4g} {name}"
    return f"{size_bytes} B"


def human_time(time_us: float) -> str:
    """Such as `12.3 us` or `4.56 ms`."""
    value, unit = (time_us, "us") if time_us < 1e3 else (time_us / 1e3, "ms") if time_us < 1e6 else (time_us / 1e6, "s")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
