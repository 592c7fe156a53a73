"""Shows the points: a table on stdout, and the files asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deepspeedlite.tools.bench.plot import draw
from deepspeedlite.tools.bench.points import Plan, Point, human_bytes, human_time


def show(about: Mapping[str, Any], points: Sequence[Point], plan: Plan) -> None:
    """Print the table, and write the JSON and the plot where the plan names files."""
    from rich.console import Console
    from rich.table import Table

    hosts = f"{about['hosts']} host{'s' if about['hosts'] > 1 else ''}"
    title = f"{about['ranks']} ranks on {hosts}, {about['backend']} on {about['device']}, torch {about['torch']}"
    table = Table(title=title, title_style="bold", title_justify="left")
    for name in ("collective", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "time", "range", "GB/s", "bus GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, point in zip([None, *points], points):
        if before and (before.collective, before.dtype) != (point.collective, point.dtype):
            table.add_section()
        times = f"{human_time(point.fastest_us)} - {human_time(point.slowest_us)}"
        speeds = [f"{value:.3g}" for value in (point.algbw_gb_s, point.busbw_gb_s)]
        words = (human_bytes(point.size_bytes), human_time(point.time_us), times, *speeds)
        table.add_row(point.collective, point.dtype, *words)
    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log has no width that lines must be cut to
    console.print(table)
    if plan.json:
        text = json.dumps({**about, "points": [asdict(point) for point in points]}, indent=1)
        plan.json.write_text(text + "\n")
    if plan.plot:
        plan.plot.write_text(draw(title, points))
