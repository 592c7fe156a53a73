"""Comet: an experiment of the package `comet_ml`, started with the section's values.

A metric gets a point when `samples_log_interval` samples have gone by since its last one. What the section leaves out
is as comet_ml finds it: COMET_API_KEY and its other variables, or ~/.comet.config.
"""

from __future__ import annotations

from deepspeedlite.config.sections.monitors import Comet
from deepspeedlite.metrics.monitor.writer import Point, require
from deepspeedlite.runtime.errors import ConfigError

SECTION = "comet"
# Keys of the section that are arguments of comet_ml.start.
_STARTED_WITH = ("api_key", "project", "workspace", "experiment_key", "mode", "online")


class CometWriter:
    """Needs the package `comet_ml`."""

    def __init__(self, config: Comet) -> None:
        comet_ml = require(SECTION, "comet_ml", "comet_ml")
        self._interval = config.samples_log_interval
        self._last: dict[str, int] = {}  # by tag, the samples at its last point
        try:
            self.experiment = comet_ml.start(**{name: getattr(config, name) for name in _STARTED_WITH})
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"comet.enabled is true, but no experiment could be started: {error}. Set COMET_API_KEY or "
                "comet.api_key; comet.online: false needs neither; or set comet.enabled to false"
            ) from error
        if config.experiment_name is not None:
            self.experiment.set_name(config.experiment_name)

    def write(self, points: list[Point]) -> None:
        """Log those points whose time has come; comet_ml sends them by itself."""
        for tag, value, step in points:
            if tag not in self._last or step - self._last[tag] >= self._interval:
                self._last[tag] = step
                self.experiment.log_metric(tag, value, step=step)

    def flush(self) -> None:
        """Nothing to do: comet_ml sends by itself."""

    def close(self) -> None:
        """End the experiment: wait until all is sent."""
        self.experiment.end()
