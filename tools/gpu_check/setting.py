"""What a phase's process knows of itself, and how it tries things: each gives a row, whatever becomes of it."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepspeedlite.runtime.device import Device
from tools.gpu_check.report import FAILED, GOOD, NOT_RUN, TOLD, Row

ROOT = Path(__file__).resolve().parent.parent.parent


class NotHereError(Exception):
    """Something that cannot be tried on this machine, and why."""


@dataclass(frozen=True)
class Setting:
    """One process of a phase.

    Attributes:
        phase: its name.
        device: this rank's.
        tiny: shapes that a CPU gets done in a second, to try the phase's code rather than the device.
        ends_s: on time.monotonic's clock, when the phase is ended from outside.
        folder: for files; removed afterwards.
    """

    phase: str
    device: Device
    rank: int
    ranks: int
    tiny: bool
    ends_s: float
    folder: Path

    @property
    def seconds_left(self) -> float:
        """Until the phase is ended."""
        return self.ends_s - time.monotonic()

    def tried(self, what: str, work: Callable[[], dict[str, Any]], judges: bool = True) -> Row:
        """A row of the figures that `work` gives, or of how it failed; memory that it took is free again.

        With several ranks a failure of one is a failure of all, so that they go on together.
        """
        begun_s = time.monotonic()
        state, figures, note = (GOOD if judges else TOLD), {}, ""
        try:
            figures = work()
            note = str(figures.pop("note", ""))
        except NotHereError as error:
            state, note = NOT_RUN, str(error)
        except (Exception, SystemExit) as error:
            state, note = FAILED, f"rank {self.rank}: {type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stderr)
        self.clear()
        return Row(self.phase, what, state, figures, note, time.monotonic() - begun_s)

    def clear(self) -> None:
        """Give back memory that nothing uses, and count peaks from here."""
        gc.collect()
        try:
            self.device.empty_cache()
            self.device.reset_peak_memory()
        except RuntimeError as error:  # after an illegal access nothing works any more; what is tried next says so
            print(f"rank {self.rank}: memory cannot be given back: {error}", file=sys.stderr)

    def start_group(self) -> None:
        """Join the other ranks: by the backend that moves this device's tensors."""
        import deepspeedlite

        if not dist.is_initialized():
            deepspeedlite.init_distributed()

    def step_ms(self, step: Callable[[], object], warm: int = 3, steps: int = 8) -> float:
        """Median milliseconds of a step, all work that it queued included."""
        for _ in range(warm):
            step()
        times = []
        for _ in range(steps):
            self.device.synchronize()
            begun_s = time.perf_counter()
            step()
            self.device.synchronize()
            times.append((time.perf_counter() - begun_s) * 1e3)
        return statistics.median(times)


Rows = Iterator[Row]
