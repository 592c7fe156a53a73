"""`Monitor`: hands training's events to every writer that the config enables, from rank 0.

The engine writes `Train/Samples/{train_loss,lr,loss_scale,grad_norm}` with global samples as the step. Values may be
device tensors: those of one call are fetched together, so a call costs at most one wait per device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from deepspeedlite.metrics.monitor.comet import CometWriter
from deepspeedlite.metrics.monitor.csv_files import CsvWriter
from deepspeedlite.metrics.monitor.tensorboard import TensorBoardWriter
from deepspeedlite.metrics.monitor.wandb import WandbWriter
from deepspeedlite.metrics.monitor.writer import Event, Point, Writer
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.runtime.log import logger

# A section of the configuration -> what writes for it; opened in this order.
WRITERS: Mapping[str, Callable[[Any], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "csv_monitor": CsvWriter,
    "wandb": WandbWriter,
    "comet": CometWriter,
}


def monitor_sections(config: Any) -> dict[str, Any]:
    """The sections of the monitors in a configuration."""
    return {name: getattr(config, name) for name in WRITERS}


class Monitor:
    """All writers as one. On ranks other than 0 it opens nothing and does nothing.

    Args:
        rank: this process's global rank.
        sections: by their names in `WRITERS`, sections of a configuration, or None.

    Raises:
        ConfigError: an enabled writer's package is missing, its folder cannot be made, or W&B refuses the run.
        UnsupportedError: there is no monitor of such a name.
    """

    def __init__(self, *, rank: int = 0, **sections: Any) -> None:
        if unknown := sections.keys() - WRITERS.keys():
            raise UnsupportedError(f"there is no monitor {', '.join(sorted(unknown))}; use {', '.join(WRITERS)}")
        self._writers: list[Writer] = []
        try:
            for name, make_writer in WRITERS.items() if rank == 0 else ():
                section = sections.get(name)
                if section is not None and section.enabled:
                    self._writers.append(make_writer(section))
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
