"""`Monitor`: hands training's events to every writer that the config enables, from rank 0.

The engine writes `Train/Samples/{train_loss,lr,loss_scale,grad_norm}` with global samples as the step. Values may be
device tensors: those of one call are fetched together, so a call costs at most one wait per device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch

from deepspeedlite import comm
from deepspeedlite.metrics.monitor.csv_files import CsvWriter
from deepspeedlite.metrics.monitor.tensorboard import TensorBoardWriter
from deepspeedlite.metrics.monitor.wandb import WandbWriter
from deepspeedlite.metrics.monitor.writer import Event, FileSection, Point, WandbSection, Writer
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.runtime.log import logger


class Monitor:
    """All writers as one. On ranks other than 0 it opens nothing and does nothing.

    Args:
        tensorboard: config section (enabled, output_path, job_name), or None.
        wandb: config section (enabled, group, team, project), or None.
        csv_monitor: config section (enabled, output_path, job_name), or None.
        rank: this process's global rank.

    Raises:
        ConfigError: an enabled writer's package is missing, its folder cannot be made, or W&B refuses the run.
    """

    def __init__(
        self,
        tensorboard: FileSection | None = None,
        wandb: WandbSection | None = None,
        csv_monitor: FileSection | None = None,
        rank: int = 0,
    ) -> None:
        self._writers: list[Writer] = []
        if rank != 0:
            return
        try:
            if tensorboard is not None and tensorboard.enabled:
                self._writers.append(TensorBoardWriter(tensorboard))
            if csv_monitor is not None and csv_monitor.enabled:
                self._writers.append(CsvWriter(csv_monitor))
            if wandb is not None and wandb.enabled:
                self._writers.append(WandbWriter(wandb))
        except BaseException:
            self.close()
            raise

    @property
    def enabled(self) -> bool:
        """Whether anything listens; where not, callers need not gather values."""
        return bool(self._writers)

    def write_events(self, events: Iterable[Event]) -> None:
        """Write (tag, value, step) triples; a value is a number or a tensor of one element on any device.

        A writer whose disk fails is warned about and left out from then on: training goes on.

        Raises:
            UnsupportedError: a value is not a single number; names its tag.
        """
        if not self._writers:
            return
        points = _to_host(list(events))
        for writer in tuple(self._writers):
            try:
                writer.write(points)
            except OSError as error:
                self._writers.remove(writer)
                logger.warning("%s stops: %s. Training goes on without it", type(writer).__name__, error)

    def flush(self) -> None:
        """Push out what writers still hold."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Close every writer; the monitor is then disabled. May be called again."""
        while self._writers:
            self._writers.pop().close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class MonitorMaster(Monitor):
    """A `Monitor` of one's own, from what `monitor.config.get_monitor_config(dict)` returns. For any rank to make."""

    def __init__(self, monitor_config: Any) -> None:
        rank = comm.get_rank() if comm.is_initialized() else 0
        super().__init__(monitor_config.tensorboard, monitor_config.wandb, monitor_config.csv_monitor, rank=rank)


def _to_host(events: Sequence[Event]) -> list[Point]:
    """Turn tensors into floats, with one copy per device for all that lie there."""
    values: list[float] = [0.0] * len(events)
    on_device: dict[torch.device, list[int]] = {}
    for index, (tag, value, _) in enumerate(events):
        if not isinstance(value, torch.Tensor):
            values[index] = _number(tag, value)
        elif value.numel() == 1:
            on_device.setdefault(value.device, []).append(index)
        else:
            raise UnsupportedError(
                f"monitor event {tag!r}: a tensor of shape {tuple(value.shape)} is not one number; "
                "reduce it first, for example with .mean()"
            )
    for indices in on_device.values():
        tensors = [torch.as_tensor(events[index][1]).detach().reshape(()).double() for index in indices]
        for index, value in zip(indices, torch.stack(tensors).tolist()):
            values[index] = value
    return [(tag, value, int(step)) for (tag, _, step), value in zip(events, values)]


def _number(tag: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"monitor event {tag!r}: {value!r} is not a number") from error
