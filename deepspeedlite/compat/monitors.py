"""DeepSpeed's monitors one by one: `TensorBoardMonitor(section).write_events([(tag, value, step)])`.

Each is a `Monitor` with one writer. On ranks other than 0, and where the section is not enabled, it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from deepspeedlite import comm
from deepspeedlite.metrics.monitor.registry import Monitor
from deepspeedlite.metrics.monitor.writer import Event


class _One(Monitor):
    section: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__(rank=comm.get_rank() if comm.is_initialized() else 0, **{self.section: config})

    def write_events(self, event_list: Iterable[Event], flush: bool = True) -> None:
        """Write (tag, value, step) triples. (All writers hand them to the system at once: `flush` changes nothing.)"""
        super().write_events(event_list)


class TensorBoardMonitor(_One):
    """Event files; takes the section `tensorboard`."""

    section = "tensorboard"

    def __init__(self, tensorboard_config: Any) -> None:
        super().__init__(tensorboard_config)
        self.output_path, self.job_name = tensorboard_config.output_path, tensorboard_config.job_name


class WandbMonitor(_One):
    """A run of Weights & Biases; takes the section `wandb`."""

    section = "wandb"

    def __init__(self, wandb_config: Any) -> None:
        super().__init__(wandb_config)
        self.group, self.team, self.project = wandb_config.group, wandb_config.team, wandb_config.project


class CsvMonitor(_One):
    """CSV files; takes the section `csv_monitor`."""

    section = "csv_monitor"

    def __init__(self, csv_config: Any) -> None:
        super().__init__(csv_config)
        self.output_path, self.job_name = csv_config.output_path, csv_config.job_name


class CometMonitor(_One):
    """An experiment of Comet; takes the section `comet`."""

    section = "comet"

    def __init__(self, comet_config: Any) -> None:
        super().__init__(comet_config)
