"""What every benchmark prints: the machine it ran on, its results as JSON lines, and a table for people."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path


def machine() -> dict[str, str | int]:
    """The processor's name, how many cores this process may use, the system and the Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_json(**fields: object) -> None:
    """One result as one line of JSON."""
    print(json.dumps(fields), flush=True)


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table under the machine's description."""
    about = machine()
    print(f"\n{title}; {about['processor']}, {about['cores']} cores, Python {about['python']}, {about['system']}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)
