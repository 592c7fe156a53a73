"""Rows of the report, and reading what they are made of: files and tools, never torch.

A row is plain data with a verdict and, where that is bad, the remedy. A section is a function that returns rows.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INFO, OK, WARN, BAD = "info", "ok", "warn", "bad"
_TOOL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Row:
    """One line of the report. `remedy` is set where `status` is warn or bad."""

    section: str
    name: str
    value: str
    status: str = INFO
    remedy: str = ""


@dataclass(frozen=True)
class TorchFiles:
    """What torch's files say of it without importing it."""

    version: str
    path: str
    cuda: str | None
    hip: str | None


def version_numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def read_text(path: str | Path) -> str:
    """A file's text; "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def output_of(command: Sequence[str], timeout_s: float = _TOOL_TIMEOUT_S) -> str:
    """What a tool prints; "" if it fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def installed_version(distribution: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_files() -> TorchFiles | None:
    """The torch that is installed for this Python, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    text = read_text(folder / "version.py")

    def constant(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE)
        return match[1] if match else None

    version = constant("__version__") or installed_version("torch") or "unknown"
    return TorchFiles(version, str(folder), constant("cuda"), constant("hip"))
