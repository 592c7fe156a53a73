"""Device-correct timers: what `wall_clock_breakdown` and SamplesPerSec are made of.

Kernels run long after the Python line that launched them, so a host clock around that line measures nothing. On
GPUs an interval is a pair of events recorded on the current stream; they are read only when somebody asks for the
number, so timing adds no synchronisation to the steps in between. On the CPU the clock is exact and is used as is.

`Stopwatch` is one such accumulator, `Timers` a named set of them, `ThroughputTimer` turns one into samples per second.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

from deepspeedlite.metrics.memory import throughput_memory
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import ConfigError, EngineStateError
from deepspeedlite.runtime.log import log_dist

# Unread intervals kept before finished ones are folded into the sum; bounds events alive when nobody ever reads.
MAX_UNREAD_INTERVALS = 64

_Interval = tuple[torch.Event, torch.Event]


class Stopwatch:
    """Sums the device time between `start` and `stop` over any number of intervals."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._sum_ms = 0.0
        self._began_s: float | None = None
        self._began_event: torch.Event | None = None
        self._unread: deque[_Interval] = deque()
        self._spare: list[torch.Event] = []

    @property
    def running(self) -> bool:
        """Whether an interval is open."""
        return self._began_s is not None

    def start(self) -> None:
        """Open an interval. One that was left open (its code raised, and training went on) is dropped."""
        self._began_event = self._record()
        self._began_s = time.perf_counter()

    def stop(self) -> None:
        """Close the interval; does nothing when none is open."""
        if self._began_s is None:
            return
        if self._began_event is None:
            self._sum_ms += (time.perf_counter() - self._began_s) * 1e3
        else:
            ended = self._record()
            if ended is not None:
                self._unread.append((self._began_event, ended))
            if len(self._unread) > MAX_UNREAD_INTERVALS:
                self._fold(wait=False)
        self._began_s = self._began_event = None

    def elapsed_ms(self, reset: bool = True) -> float:
        """Milliseconds of all closed intervals; waits for the last of them to finish on the device."""
        self._fold(wait=True)
        total_ms = self._sum_ms
        if reset:
            self._sum_ms = 0.0
        return total_ms

    def _record(self) -> torch.Event | None:
        event = self._spare.pop() if self._spare else self._device.event()
        if event is not None:
            event.record()
        return event

    def _fold(self, wait: bool) -> None:
        while self._unread:
            began, ended = self._unread[0]
            if wait:
                ended.synchronize()
            elif not ended.query():
                return
            self._sum_ms += began.elapsed_time(ended)
            self._unread.popleft()
            self._spare += (began, ended)


class Timers:
    """Named stopwatches. They may nest and overlap; each name is on its own. Does nothing when not enabled."""

    def __init__(self, device: Device, enabled: bool = True) -> None:
        self.enabled = enabled
        self._device = device
        self._watches: dict[str, Stopwatch] = {}

    @property
    def names(self) -> list[str]:
        """Every name started so far, in order of first use."""
        return list(self._watches)

    def start(self, name: str) -> None:
        """Open an interval of `name`; an interval of the same name that was never stopped is dropped."""
        if not self.enabled:
            return
        watch = self._watches.get(name)
        if watch is None:
            watch = self._watches[name] = Stopwatch(self._device)
        watch.start()

    def stop(self, name: str) -> None:
        """Close the interval of `name`.

        Raises:
            EngineStateError: `name` is not running.
        """
        if not self.enabled:
            return
        watch = self._watches.get(name)
        if watch is None or not watch.running:
            running = [known for known, other in self._watches.items() if other.running]
            raise EngineStateError(
                f"timer {name!r} was stopped but is not running (running: {', '.join(running) or 'none'}); "
                f"call start({name!r}) first"
            )
        watch.stop()

    def elapsed_ms(self, name: str, reset: bool = True) -> float:
        """Milliseconds of the closed intervals of `name` since the last reset; 0.0 for a name never timed."""
        watch = self._watches.get(name)
        return 0.0 if watch is None else watch.elapsed_ms(reset)

    def report(self, names: Iterable[str] | None = None, steps: int = 1, reset: bool = True) -> str:
        """One line with the mean milliseconds per step of each name, `time (ms) | forward: 1.23 | backward: 2.34`.

        Args:
            names: which timers and in which order; None: all. Names never timed are left out.
            steps: how many steps the sums are divided by.
            reset: begin the sums anew, so that the next line covers the steps after this one.
        """
        if steps < 1:
            raise EngineStateError(f"a timing report over {steps} steps has no mean; pass steps >= 1")
        wanted = self.names if names is None else [name for name in names if name in self._watches]
        parts = [f"{name}: {self.elapsed_ms(name, reset) / steps:.2f}" for name in wanted]
        return " | ".join(["time (ms)", *parts])


class ThroughputTimer:
    """Samples per second over the steps between two printed lines, and over the run without its warm-up steps.

    Time is counted between `start` and `stop` only: a pause between steps (evaluation, saving) does not lower the
    figures, waiting for data does when the data loader calls `start`. `batch_size` may be changed between steps.

    Args:
        batch_size: samples of one global step, all ranks together.
        start_step: so many first global steps are left out (allocator, autotuning, compilation).
        steps_per_output: print after every so many global steps; None: never.
        device: where the work runs; None: the host clock.
        logging_fn: receives each line; None: the log, from rank 0.
    """

    def __init__(
        self,
        batch_size: int,
        start_step: int = 2,
        steps_per_output: int | None = None,
        device: Device | None = None,
        logging_fn: Callable[[str], object] | None = None,
    ) -> None:
        if batch_size < 1 or (steps_per_output is not None and steps_per_output < 1):
            raise ConfigError(
                f"a throughput timer needs batch_size >= 1 (got {batch_size}) and steps_per_print >= 1 "
                f"or none (got {steps_per_output})"
            )
        self.batch_size = batch_size
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.global_step_count = 0
        # For scripts that count their epochs: these, and the micro-steps of this one.
        self.epoch_count = self.micro_step_count = 0
        self._device = device or Device(torch.device("cpu"))
        self._log = logging_fn or log_dist
        self._watch = Stopwatch(self._device)
        self._window_samples = 0
        self._total_samples = 0
        self._total_ms = 0.0
        self._current = 0.0

    def start(self) -> None:
        """Begin, or go on with, a global step. A second call before `stop` changes nothing."""
        if self.global_step_count >= self.start_step and not self._watch.running:
            self._watch.start()

    def stop(self, global_step: bool = True, report_speed: bool = True) -> None:
        """End a micro-step; with `global_step` also the global step, and print where a line is due."""
        measured = self._watch.running
        self._watch.stop()
        self.micro_step_count += 1
        if not global_step:
            return
        self.global_step_count += 1
        if not measured:
            return
        self._window_samples += self.batch_size
        due = self.steps_per_output is not None and self.global_step_count % self.steps_per_output == 0
        if report_speed and due:
            self._log(self.report())

    def update_epoch_count(self) -> None:
        """Another epoch begins."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def samples_per_sec(self) -> tuple[float, float]:
        """(running average, current). Current covers the steps since this was last asked for; waits for the device."""
        window_ms = self._watch.elapsed_ms()
        if self._window_samples:
            self._current = self._window_samples / max(window_ms, 1e-6) * 1e3
        self._total_ms += window_ms
        self._total_samples += self._window_samples
        self._window_samples = 0
        average = self._total_samples / max(self._total_ms, 1e-6) * 1e3 if self._total_samples else 0.0
        return average, self._current

    def avg_samples_per_sec(self) -> float:
        """The running average without the warm-up steps; 0.0 while there is none."""
        return self.samples_per_sec()[0]

    def report(self) -> str:
        """The line that is printed: both figures and the memory in use."""
        average, current = self.samples_per_sec()
        return (
            f"step {self.global_step_count} | RunningAvgSamplesPerSec={average:.2f}, "
            f"CurrSamplesPerSec={current:.2f}, {throughput_memory(self._device)}"
        )
