"""Building an image: whether there is room for it, and which of the engine's two builders does it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env import buildkit, steps
from env.context import pack
from env.engine import explain
from env.environment import Environment
from env.errors import ImageError
from env.steps import Show

TORCH_BYTES = {"cpu": 4 << 30, "cuda": 15 << 30, "rocm": 30 << 30}  # twice, and what is compiled
BASE_BYTES = {"cpu": 1 << 30, "cuda": 10 << 30, "rocm": 30 << 30}  # where they must be pulled


@dataclass(frozen=True)
class Built:
    """An image that has no name yet."""

    image: str
    seconds: float
    steps: int
    cached_steps: int
    builder: str = ""


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
    environment: Environment,
    arguments: Mapping[str, str],
    wheels: Path | None,
    *,
    no_cache: bool,
    show: Show,
    verbose: bool = False,
) -> Built:
    """Build it, by BuildKit where that is the engine's choice; `show` gets a line for each step that does something.

    Raises:
        ImageError: with the failing step and its last lines.
    """
    import docker

    start_s = time.monotonic()
    dockerfile = environment.dockerfile
    by_buildkit = buildkit.wanted(client)
    options: dict[str, Any] = {"labels": environment.labels, "nocache": no_cache, "forcerm": True}
    try:
        with pack(dockerfile, wheels, buildkit.with_mounts if by_buildkit else str) as context:
            if by_buildkit:
                options["buildargs"] = {**arguments, **buildkit.ARGUMENTS}
                found = buildkit.follow(buildkit.messages(client, context, dockerfile, options), show, verbose)
            else:
                how = {"custom_context": True, "dockerfile": dockerfile, "rm": True, "decode": True, **options}
                stream = client.api.build(fileobj=context, buildargs=dict(arguments), **how)
                found = steps.follow(stream, show, verbose)
    except docker.errors.APIError as error:
        raise ImageError(explain(f"{dockerfile}: the engine refuses: {error.explanation or error}")) from error
    image, taken = found
    cached = sum(step.cached for step in taken)
    return Built(
        image, time.monotonic() - start_s, len(taken), cached, "BuildKit" if by_buildkit else "the classic builder"
    )
