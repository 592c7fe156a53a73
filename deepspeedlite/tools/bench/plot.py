"""The plot: time and bus bandwidth over size, both logarithmic, as an SVG that any browser shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from deepspeedlite.host.text import size_text, time_text
from deepspeedlite.tools.bench.points import Point

_WIDTH, _HEIGHT = 420, 300  # of one panel, without what is around it
_LEFT, _TOP, _GAP, _BELOW = 70, 70, 90, 60
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#f0e442")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

Value = Callable[[Point], float]


def draw(title: str, points: Sequence[Point]) -> str:
    """The SVG's text: a line per collective (its colour) and number type (its dashes)."""
    legend_height = 18 * len(_series(points))
    width, height = _LEFT + 2 * _WIDTH + _GAP + 30, _TOP + _HEIGHT + _BELOW + legend_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
        *_panel(_LEFT, "time of a call", points, lambda point: point.time_us, time_text),
        *_panel(
            _LEFT + _WIDTH + _GAP, "bus bandwidth, GB/s", points, lambda point: point.busbw_gb_s, lambda y: f"{y:g}"
        ),
    ]
    for row, ((collective, dtype), style) in enumerate(_styles(points).items()):
        y = _TOP + _HEIGHT + _BELOW + 18 * row
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 30}" y1="{y - 4}" y2="{y - 4}" {style}/>')
        parts.append(f'<text x="{_LEFT + 38}" y="{y}">{escape(f"{collective}, {dtype}")}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _series(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.collective, point.dtype), []).append(point)
    return found


def _styles(points: Sequence[Point]) -> dict[tuple[str, str], str]:
    collectives, dtypes = ([*dict.fromkeys(words)] for words in zip(*_series(points)))
    return {
        (collective, dtype): f'fill="none" stroke-width="1.8" '
        f'stroke="{_COLOURS[collectives.index(collective) % len(_COLOURS)]}" '
        f'stroke-dasharray="{_DASHES[dtypes.index(dtype) % len(_DASHES)]}"'
        for collective, dtype in _series(points)
    }


def _panel(left: float, name: str, points: Sequence[Point], value: Value, words: Callable[..., str]) -> list[str]:
    place_x, ticks_x = _axis([point.size_bytes for point in points], 4, left, left + _WIDTH)
    place_y, ticks_y = _axis([value(point) for point in points], 10, _TOP + _HEIGHT, _TOP)
    parts = [f'<text x="{left}" y="{_TOP - 12}">{escape(name)}</text>']
    for tick in ticks_x:
        x = place_x(tick)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{_TOP + _HEIGHT}" stroke="#ddd"/>')
        label = escape(size_text(round(tick)))
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 14}" font-size="10" text-anchor="end" '
            f'transform="rotate(-30 {x:.1f} {_TOP + _HEIGHT + 14})">{label}</text>'
        )
    for tick in ticks_y:
        y = place_y(tick)
        parts.append(f'<path d="M{left} {y:.1f}H{left + _WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(words(tick))}</text>')
    parts.append(f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#444"/>')
    styles = _styles(points)
    for key, its in _series(points).items():
        spots = [(place_x(point.size_bytes), place_y(value(point))) for point in its]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}" {styles[key]}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" {styles[key]}/>' for x, y in spots]
    return parts


def _axis(values: Sequence[float], base: int, start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """A logarithmic axis of pixels `start` to `end` with room for the values, and its ticks: powers of `base`."""
    low = math.floor(math.log(min(values), base) + 1e-9)
    high = max(math.ceil(math.log(max(values), base) - 1e-9), low + 1)

    def place(value: float) -> float:
        return start + (end - start) * (math.log(value, base) - low) / (high - low)

    return place, [float(base) ** power for power in range(low, high + 1)]
