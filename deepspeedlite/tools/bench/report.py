"""Shows the points: a table on stdout, and the files asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from deepspeedlite.host.text import print_table, size_text, time_text
from deepspeedlite.tools.bench.plot import draw
from deepspeedlite.tools.bench.points import Plan, Point


def show(about: Mapping[str, Any], points: Sequence[Point], plan: Plan) -> None:
    """Print the table, and write the JSON and the plot where the plan names files."""
    hosts = f"{about['hosts']} host{'s' if about['hosts'] > 1 else ''}"
    title = f"{about['ranks']} ranks on {hosts}, {about['backend']} on {about['device']}, torch {about['torch']}"
    head, right = ("collective", "dtype"), ("size", "time", "range", "GB/s", "bus GB/s")
    rows = [
        (
            *(point.collective, point.dtype, size_text(point.size_bytes), time_text(point.time_us)),
            f"{time_text(point.fastest_us)} - {time_text(point.slowest_us)}",
            *(f"{value:.3g}" for value in (point.algbw_gb_s, point.busbw_gb_s)),
        )
        for point in points
    ]
    ends = [index for index, (row, after) in enumerate(pairwise(rows)) if row[:2] != after[:2]]
    print_table((*head, *right), rows, right=right, title=title, boxed=True, ends=ends)
    if plan.json:
        text = json.dumps({**about, "points": [asdict(point) for point in points]}, indent=1)
        plan.json.write_text(text + "\n")
    if plan.plot:
        plan.plot.write_text(draw(title, points))
