"""Text for people: sizes, times and tables. What costs time is imported late."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_PIPED_WIDTH = 200  # columns: nothing is cut where nobody asked for a width


def size_text(size_bytes: float, places: int | None = None) -> str:
    """`1.5 KiB`, `762 MiB`, `0`: three digits and all before the point, or so many decimal places."""
    if not size_bytes:
        return "0"
    unit, factor = next((u, f) for u, f in reversed(_UNITS.items()) if size_bytes >= f or f == 1)
    value = size_bytes / factor
    digits = f"{value:.{places}f}" if places is not None and unit else _short(value)
    return f"{digits} {unit}iB" if unit else f"{digits} B"


def parse_size(text: str) -> int:
    """`1048576`, `1024K`, `1M`, `2 GiB`: a number of bytes above 0, K being 1024 however it is written.

    Raises:
        ValueError: it is no such text.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,14})\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes, such as 512, 4K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def counted(count: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {what}{'s' * (count != 1)}"


def time_text(time_us: float) -> str:
    """`12.3 us`, `4.56 ms`, `5 s`."""
    value, unit = (time_us, "us") if time_us < 1e3 else (time_us / 1e3, "ms") if time_us < 1e6 else (time_us / 1e6, "s")
    return f"{_short(value)} {unit}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = (), gap: str = "  ") -> list[str]:
    """A line per row, its columns as wide as their widest cell; those in `right` are aligned to the right.

    Cells may have colours (ANSI escapes), which take no room.
    """
    widths = [max(map(_shown_length, column)) for column in zip(*rows)]

    def pad(index: int, cell: str) -> str:
        blank = " " * (widths[index] - _shown_length(cell))
        return blank + cell if index in right else cell + blank

    return [gap.join(pad(index, cell) for index, cell in enumerate(row)).rstrip() for row in rows]


def _shown_length(cell: str) -> int:
    return len(re.sub("\x1b\\[[0-9;]*m", "", cell))


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    title: str = "",
    boxed: bool = False,
    bold: Collection[int] = (),
    ends: Collection[int] = (),
) -> None:
    """Print a table as wide as the terminal lets it be; into a pipe or file, as wide as it is.

    Args:
        head: the columns' names.
        rows: their cells, which are never taken as markup.
        right: the columns that are aligned to the right.
        title: stands above it.
        boxed: whether it has lines around and between.
        bold: the rows that stand out.
        ends: the rows after which a line is drawn.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=HEAVY_HEAD if boxed else None, pad_edge=boxed)
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for index, row in enumerate(rows):
        style = "bold" if index in bold else ""
        table.add_row(*map(Text, row), style=style, end_section=index in ends)
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(table)
