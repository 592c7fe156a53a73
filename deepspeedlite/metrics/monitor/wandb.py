"""Weights & Biases: scalars into a run of `project`, under `team` and `group`.

A run that the script itself has opened is used, and left open at the end. `WANDB_MODE=offline` and wandb's other
variables work as ever.
"""

from __future__ import annotations

from itertools import groupby

from deepspeedlite.config.sections.monitors import Wandb
from deepspeedlite.metrics.monitor.writer import Point, require
from deepspeedlite.runtime.errors import ConfigError

SECTION = "wandb"


class WandbWriter:
    """Needs the package `wandb`."""

    def __init__(self, config: Wandb) -> None:
        wandb = require(SECTION, "wandb", "wandb")
        self._owned = wandb.run is None
        try:
            self._run = wandb.run or wandb.init(project=config.project, group=config.group, entity=config.team)
        except wandb.Error as error:
            raise ConfigError(
                f"wandb.enabled is true, but no run could be opened in project {config.project!r}: {error}. "
                "Run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline needs neither; "
                "or set wandb.enabled to false"
            ) from error

    def write(self, points: list[Point]) -> None:
        """Log the points of each step together. wandb sends a step when a later one begins, or at the end."""
        for step, same_step in groupby(points, key=lambda point: point[2]):
            self._run.log({tag: value for tag, value, _ in same_step}, step=step)

    def flush(self) -> None:
        """Nothing to do: wandb sends by itself."""

    def close(self) -> None:
        """Finish the run, unless the script opened it."""
        if self._owned:
            self._run.finish()
