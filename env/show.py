"""Tables and lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeedlite.host.text import columns
from env.images import Made


def megabytes(size_bytes: int) -> str:
    """In millions of bytes, as Docker counts."""
    return f"{size_bytes / 1e6:,.1f} MB"


def image(made: Made) -> str:
    """Everything about one image: layers, times, what was verified, and its names or why it has none."""
    assert made.built is not None
    torch_bytes = made.facts.get("torch_bytes", 0)
    rows = [[megabytes(layer.size_bytes), layer.made_by] for layer in made.layers]
    checks = [
        ["ok" if row.ok else "FAILED", row.check, f"{row.seconds:.1f} s", row.detail.replace("\n", "\n    ")]
        for row in made.checked
    ]
    beside = f", {made.size_bytes / torch_bytes:.2f} times torch's own {megabytes(torch_bytes)}" if torch_bytes else ""
    parts = [
        "\n".join(columns([["size", "layer"], *rows])),
        f"{megabytes(made.size_bytes)} in all{beside}",
        "\n".join(columns([["", "verified", "time", "found"], *checks])),
        f"built in {made.built.seconds:.1f} s, verified in {made.verify_s:.1f} s",
        f"{made.name}: {made.problem}" if made.problem else f"{made.name}: tagged {' and '.join(made.tags)}",
    ]
    return "\n\n".join(parts)


def matrix(all_made: Sequence[Made]) -> str:
    """A line per environment."""
    rows = []
    for made in all_made:
        if made.tags and made.built:
            times = [f"{made.built.seconds:.0f} s", f"{made.verify_s:.0f} s", megabytes(made.size_bytes)]
            rows.append([made.name, "ok", *times, made.tags[-1]])
        else:
            rows.append([made.name, "FAILED" if made.built else "-", "", "", "", made.problem])
    return "\n".join(columns([["environment", "", "built", "verified", "size", "tag, or why not"], *rows]))
