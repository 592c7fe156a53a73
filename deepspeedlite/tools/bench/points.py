"""What is measured: which collectives, number types and sizes, and what is known of each afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspeedlite.host.text import parse_size

# By nccl-tests' names; a size counts the whole buffer: of an all-gather its output, of a reduce-scatter its input.
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
DTYPES = ("float32", "bfloat16", "float16", "float64")


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
        return tuple(parse_size(part) for part in text.split(","))
    step = int(rest[1]) if len(rest) == 2 and rest[1].isdecimal() else 4 if len(rest) == 1 else 0
    low, high = parse_size(first), parse_size(rest[0])
    if step < 2 or high < low:
        raise ValueError(f"{text}: write sizes as FROM:TO or FROM:TO:FACTOR, such as 1K:64M:4")
    sizes = [low]
    while sizes[-1] * step <= high:
        sizes.append(sizes[-1] * step)
    return tuple(sizes)
