"""A build as it goes: a line for each step that does something, and a failing step's last words with a remedy."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from env.engine import explain
from env.errors import ImageError

LAST_LINES = 20
_CLASSIC = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)
_WORTH_A_LINE = ("FROM", "RUN", "COPY")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

Show = Callable[[str], None]


@dataclass
class Step:
    """One instruction of the Dockerfile, as it went. BuildKit counts them by stage, the classic builder in all."""

    number: int
    of: int
    text: str
    stage: str = ""
    started_s: float = 0.0
    cached: bool = False
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    def __post_init__(self) -> None:
        self.started_s = time.monotonic()

    @property
    def title(self) -> str:
        """The instruction in one short line."""
        text = re.sub(r"\s*\\\s*|\s+", " ", re.sub(r"--mount=\S+", "", self.text)).strip()
        return text if len(text) <= 90 else text[:87] + "..."

    def says(self, text: str, show: Show, verbose: bool) -> None:
        """Keep what it printed, and show it if all is to be shown."""
        lines = _ESCAPES.sub("", text).strip().splitlines()
        self.last.extend(lines)
        if verbose and lines:
            show("\n".join(f"    {line}" for line in lines))

    def ends(self, show: Show) -> None:
        """Its line."""
        if self.text.split()[0] in _WORTH_A_LINE:
            took = "cached" if self.cached else f"{time.monotonic() - self.started_s:.1f} s"
            where = f"{self.stage} {self.number}" if self.stage else f"{self.number:>2}"
            show(f"[{where}/{self.of}] {took:>8}  {self.title}")

    def failure(self, problem: str) -> str:
        """What to tell when it failed."""
        status = re.search(r"(?:returned a non-zero code|exit code): (\d+)", problem)
        where = f"step {self.number} of {self.of}{f' of stage {self.stage}' if self.stage else ''}"
        said = [f"    {line}" for line in self.last]
        reason = f"exit status {status[1]}" if status else problem
        return explain("\n".join([f"{where} failed: {self.title}", *said, reason]))


def follow(stream: Iterable[Mapping[str, Any]], show: Show, verbose: bool = False) -> tuple[str, list[Step]]:
    """Read the classic builder's messages to their end; the image's id and the steps. `verbose` shows all they print.

    Raises:
        ImageError: a step failed.
    """
    steps: list[Step] = []
    image = ""
    for message in stream:
        text = str(message.get("stream", ""))
        if begun := _CLASSIC.match(text):
            if steps:
                steps[-1].ends(show)
            steps.append(Step(int(begun[1]), int(begun[2]), begun[3].strip()))
        elif "Using cache" in text and steps:
            steps[-1].cached = True
        elif steps and not text.strip().startswith(("--->", "Removing inter")):
            steps[-1].says(text, show, verbose)
        if "aux" in message:
            image = message["aux"].get("ID", image)
        if problem := str(message.get("error", "")).strip():
            raise ImageError(steps[-1].failure(problem) if steps else explain(problem))
    if steps:
        steps[-1].ends(show)
    return some(image), steps


def some(image: str) -> str:
    """The image's id, which there must be at the end."""
    if not image:
        raise ImageError("the engine ended the build without an image and without a reason: see its own log")
    return image
