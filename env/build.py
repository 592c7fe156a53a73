"""Building an image: the engine's stream as a line per step, and a failing step's last words with a remedy."""

from __future__ import annotations

import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from env.engine import explain
from env.errors import ImageError

LAST_LINES = 20
TORCH_BYTES = {"cpu": 4 << 30, "cuda": 15 << 30, "rocm": 30 << 30}  # twice, and what is compiled
BASE_BYTES = {"cpu": 1 << 30, "cuda": 10 << 30, "rocm": 30 << 30}  # where they must be pulled
_STEP = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)
_WORTH_A_LINE = ("FROM", "RUN", "COPY")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

Show = Callable[[str], None]


@dataclass
class Step:
    """One instruction of the Dockerfile, as it went."""

    number: int
    of: int
    text: str
    started_s: float
    cached: bool = False
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    @property
    def title(self) -> str:
        """The instruction in one short line."""
        text = re.sub(r"\s*\\\s*|\s+", " ", self.text).strip()
        return text if len(text) <= 90 else text[:87] + "..."


@dataclass(frozen=True)
class Built:
    """An image that has no name yet."""

    image: str
    seconds: float
    steps: int
    cached_steps: int


def check_space(client: Any, arguments: Mapping[str, str], bases_here: bool) -> None:
    """Raises ImageError where the engine's disk, if it is this machine's, has less room than such an image takes."""
    root = Path(client.info().get("DockerRootDir", ""))
    if not root.is_dir():
        return
    accelerator = arguments["ACCELERATOR"]
    needed = TORCH_BYTES["cpu" if "+cpu" in arguments["TORCH_SPEC"] else accelerator]
    needed += 0 if bases_here else BASE_BYTES[accelerator]
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ImageError(
            f"{root} has {free / 1e9:.1f} GB left, and building such an image takes up to {needed / 1e9:.0f} GB: "
            "docker system prune -a frees what is unused"
        )


def build(
    client: Any,
    context: IO[bytes],
    dockerfile: str,
    arguments: Mapping[str, str],
    *,
    options: Mapping[str, Any],
    show: Show,
    verbose: bool = False,
) -> Built:
    """Build it; `options` are the engine's own (labels, nocache), `show` gets a line for each step that does something.

    Raises:
        ImageError: with the failing step and its last lines.
    """
    import docker

    start_s = time.monotonic()
    try:
        stream = client.api.build(
            fileobj=context,
            custom_context=True,
            dockerfile=dockerfile,
            buildargs=dict(arguments),
            rm=True,
            forcerm=True,
            decode=True,
            **options,
        )
        image, steps = follow(stream, show, verbose)
    except docker.errors.APIError as error:
        raise ImageError(explain(f"{dockerfile}: the engine refuses: {error.explanation or error}")) from error
    cached = sum(step.cached for step in steps)
    return Built(image, time.monotonic() - start_s, len(steps), cached)


def follow(stream: Iterable[Mapping[str, Any]], show: Show, verbose: bool = False) -> tuple[str, list[Step]]:
    """Read the engine's messages to their end; the image's id and the steps. `verbose` shows all that steps print.

    Raises:
        ImageError: a step failed.
    """
    steps: list[Step] = []
    image = ""
    for message in stream:
        text = str(message.get("stream", ""))
        if begun := _STEP.match(text):
            _finish(steps, show)
            steps.append(Step(int(begun[1]), int(begun[2]), begun[3].strip(), time.monotonic()))
        elif "Using cache" in text and steps:
            steps[-1].cached = True
        elif steps and (words := _ESCAPES.sub("", text).strip()) and not words.startswith(("--->", "Removing inter")):
            steps[-1].last.extend(words.splitlines())
            if verbose:
                show("\n".join(f"    {line}" for line in words.splitlines()))
        if "aux" in message:
            image = message["aux"].get("ID", image)
        if problem := message.get("error"):
            raise ImageError(_failure(steps, str(problem).strip()))
    _finish(steps, show)
    if not image:
        raise ImageError("the engine ended the build without an image and without a reason: see its own log")
    return image, steps


def _finish(steps: list[Step], show: Show) -> None:
    if steps and steps[-1].text.split()[0] in _WORTH_A_LINE:
        step = steps[-1]
        took = "cached" if step.cached else f"{time.monotonic() - step.started_s:.1f} s"
        show(f"[{step.number:>2}/{step.of}] {took:>8}  {step.title}")


def _failure(steps: list[Step], problem: str) -> str:
    if not steps:
        return explain(problem)
    step = steps[-1]
    said = [f"    {line}" for line in step.last]
    status = re.search(r"returned a non-zero code: (\d+)", problem)
    reason = f"exit status {status[1]}" if status else problem
    lines = [f"step {step.number} of {step.of} failed: {step.title}", *said, reason]
    return explain("\n".join(lines))
