"""How a training goes: a live bar on a terminal, else a line with a bar in it every so many steps.

Losses are summed on the device and read only when something is shown, so that watching does not slow a GPU down.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

import torch

BAR_COLUMNS = 20
REFRESH_STEPS = 10  # how often the live bar reads the loss


class Progress:
    """Use as a context; call `step` after every optimizer step. Does nothing unless `enabled`."""

    def __init__(self, steps: int, interval_steps: int, enabled: bool) -> None:
        self._steps, self._enabled = steps, enabled
        self._done = self._shown = self._samples = 0
        self._loss_sum: torch.Tensor | None = None
        self._since_s = time.perf_counter()
        self._bar = _live_bar() if enabled and sys.stdout.isatty() else None
        self._interval_steps = REFRESH_STEPS if self._bar else interval_steps

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, loss="", rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, where: str, loss: torch.Tensor, samples: int) -> None:
        """Count one step: `where` it was, such as an epoch, its loss (a detached scalar), its samples on all ranks."""
        if not self._enabled:
            return
        self._done += 1
        self._samples += samples
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        if self._done - self._shown >= self._interval_steps or self._done == self._steps:
            self._show(where)

    def _show(self, where: str) -> None:
        mean_loss = float(self._loss_sum) / (self._done - self._shown)
        now_s = time.perf_counter()
        rate = self._samples / max(now_s - self._since_s, 1e-9)
        self._loss_sum, self._shown, self._samples, self._since_s = None, self._done, 0, now_s
        if self._bar:
            text = {"loss": f"loss {mean_loss:.4f}", "rate": f"{rate:,.0f} samples/s"}
            self._bar.update(self._task, description=where, completed=self._done, **text)
            return
        filled = BAR_COLUMNS * self._done // self._steps
        bar = "#" * filled + "." * (BAR_COLUMNS - filled)
        print(
            f"[{bar}] {where}  step {self._done}/{self._steps}  loss {mean_loss:.4f}  {rate:,.0f} samples/s", flush=True
        )


def _live_bar():
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    return RichProgress(*columns)
