"""The results: rows, kept in one JSON file and one Markdown table that are written anew with each row."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GOOD, FAILED, NOT_RUN, TOLD = "ok", "FAILED", "not run", ""  # TOLD: a figure, which is neither right nor wrong


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        phase: whose.
        what: was tried or measured.
        state: one of the four above.
        figures: by name, with units in the names.
        note: why it failed or was not run; what a figure needs to be understood.
        seconds: it took.
    """

    phase: str
    what: str
    state: str = TOLD
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """As a line of the table."""
        said = ", ".join(f"{name} {shown(value)}" for name, value in self.figures.items())
        note = " ".join(self.note.split()).replace("|", "\\|")[:400]
        return f"| {self.phase} | {self.what} | {self.state} | {said} | {self.seconds:.1f} | {note} |"


def shown(value: Any) -> str:
    """A number with four digits that count; what else there is as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


class Report:
    """Where rows go: to both files at once, whole by renaming, and to who watches."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.table = folder / "gpu-check.json", folder / "gpu-check.md"
        self.rows: list[Row] = []
        self._begun = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write()

    def add(self, row: Row) -> None:
        """Keep it, before anything else happens."""
        self.rows.append(row)
        self._write()
        print(f"{row.state or '-':8}{row.line()}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong."""
        return any(row.state == FAILED for row in self.rows)

    def figures_of(self, phase: str) -> dict[str, Any]:
        """All figures of a phase's rows together."""
        return {name: value for row in self.rows if row.phase == phase for name, value in row.figures.items()}

    def _write(self) -> None:
        kept = {"begun": self._begun, "rows": [asdict(row) for row in self.rows]}
        _replace(self.json, json.dumps(kept, indent=1, default=str) + "\n")
        columns = "| phase | what | state | figures | s | note |\n|---|---|---|---|---|---|\n"
        head = f"# gpu-check, begun {self._begun}\n\n{columns}"
        _replace(self.table, head + "".join(f"{row.line()}\n" for row in self.rows))


def _replace(file: Path, text: str) -> None:
    part = file.with_suffix(f"{file.suffix}.part")
    part.write_text(text)
    os.replace(part, file)
