"""Draw the figures of `results.json` as bars: our time as a share of each peer's.

    python benchmarks/plot.py [--results benchmarks/results.json] [--out docs/performance.svg]

A result is one row of docs/performance.md, entered by hand from a run's table: what was timed, by which script, against
which peer in the same run, both medians, and the ratio that the script printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_WIDTH, _ROW_H, _LEFT, _BAR_W, _TOP = 980, 26, 400, 300, 46


def drawing(results: list[dict[str, Any]]) -> str:
    """An SVG image, the same for the same results."""
    height = _TOP + len(results) * _ROW_H + 16
    rows = []
    for index, one in enumerate(results):
        y = _TOP + index * _ROW_H
        times = f"{one['ours']:g} {one['unit']} against {one['theirs']:g}"
        rows.append(
            f'<text class="end" x="{_LEFT - 10}" y="{y + 15}">{one["what"]}, to {one["peer"]}</text>'
            f'<rect class="bar" x="{_LEFT}" y="{y + 3}" width="{one["ratio"] * _BAR_W:.0f}" height="{_ROW_H - 8}"/>'
            f'<text x="{_LEFT + _BAR_W + 10}" y="{y + 15}"><tspan font-weight="bold">{one["ratio"]:.2f}</tspan>'
            f" ({times})</text>"
        )
    line = _LEFT + _BAR_W
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
            "<style>text{font-size:13px;fill:#1b2733}.end{text-anchor:end}.bar{fill:#2f6fae}"
            "line{stroke:#8b96a1;stroke-dasharray:4 3}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="{_LEFT}" y="22">time, as a share of the peer\'s (the dashed line): shorter is better</text>',
            f'<line x1="{line}" y1="{_TOP - 8}" x2="{line}" y2="{height - 12}"/>',
            *rows,
            "</svg>\n",
        ]
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.svg")
    given = parser.parse_args()
    given.out.write_text(drawing(json.loads(given.results.read_text())))


if __name__ == "__main__":
    main()
