"""DeepSpeed's named timers over our stopwatches.

    timers = SynchronizedWallClockTimer()
    timers("forward").start(); ...; timers("forward").stop()
    timers.log(["forward"])                                    time (ms) | forward: 1.23

They time the device without stopping it: the clock is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deepspeedlite.metrics import timers as metrics
from deepspeedlite.metrics.memory import memory_breakdown
from deepspeedlite.metrics.timers import Stopwatch, Timers
from deepspeedlite.runtime.device import device_in_use
from deepspeedlite.runtime.log import log_dist


class NamedTimer:
    """One timer: `start`, `stop`, `elapsed`, `mean`, `reset`. Times are milliseconds."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self._watch = Stopwatch(device_in_use())
        self._sum_ms, self._count = 0.0, 0

    @property
    def started_(self) -> bool:
        """Whether it runs."""
        return self._watch.running

    def start(self) -> None:
        """Open an interval."""
        self._watch.start()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Close the interval; `reset` forgets those before it. (`record` changes nothing: all are recorded.)"""
        if reset:
            self.reset()
        self._watch.stop()
        self._count += 1

    def reset(self) -> None:
        """Forget all closed intervals."""
        self._watch.elapsed_ms()
        self._sum_ms, self._count = 0.0, 0

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds of all closed intervals."""
        self._sum_ms += self._watch.elapsed_ms()
        total_ms = self._sum_ms
        if reset:
            self.reset()
        return total_ms

    def mean(self) -> float:
        """Milliseconds of a closed interval on average; 0 while there is none."""
        return self.elapsed(reset=False) / self._count if self._count else 0.0


class SynchronizedWallClockTimer:
    """A set of timers: `timers(name)` gives one, made when it is first asked for."""

    def __init__(self) -> None:
        self.timers: dict[str, NamedTimer] = {}

    def __call__(self, name: str) -> NamedTimer:
        return self.timers.setdefault(name, NamedTimer(name))

    def get_timers(self) -> dict[str, NamedTimer]:
        """All of them by name."""
        return self.timers

    @staticmethod
    def memory_usage() -> str:
        """The memory in use, as one line."""
        return memory_breakdown()

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: list[int] | None = None,
    ) -> None:
        """Log one line with the milliseconds of these timers divided by `normalizer`; those never used are left out."""
        parts = [f"{n}: {self.timers[n].elapsed(reset) / normalizer:.2f}" for n in names if n in self.timers]
        if memory_breakdown:
            parts.append(self.memory_usage())
        log_dist(" | ".join(["time (ms)", *parts]), ranks=ranks or [0])

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """The mean milliseconds of an interval of each timer, divided by `normalizer`."""
        means = {name: self.timers[name].mean() / normalizer for name in names if name in self.timers}
        if reset:
            for name in means:
                self.timers[name].reset()
        return means


class ThroughputTimer(metrics.ThroughputTimer):
    """The library's, made with DeepSpeed's arguments. What `config` says changes nothing: see `timers.throughput`."""

    def __init__(
        self,
        config: Any,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(batch_size or 1, start_step, steps_per_output, device_in_use(), logging_fn)
        self.config, self.monitor_memory = config, monitor_memory

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro-step; with `global_step` also the global step."""
        super().stop(global_step, report_speed)


class NoopTimer(SynchronizedWallClockTimer):
    """Takes the same calls and measures nothing."""

    class _Timer(NamedTimer):
        def __init__(self) -> None:
            self.name_, self._sum_ms, self._count = "", 0.0, 0
            self._watch = Stopwatch(device_in_use())

        def start(self) -> None:
            """Do nothing."""

        def stop(self, reset: bool = False, record: bool = False) -> None:
            """Do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._timer = self._Timer()

    def __call__(self, name: str) -> NamedTimer:
        return self._timer

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class CudaEventTimer:
    """The time between two recorded events of a device."""

    def __init__(self, start_event: Any, end_event: Any) -> None:
        self.start_event, self.end_event = start_event, end_event

    def get_elapsed_msec(self) -> float:
        """Milliseconds; waits for the second event."""
        self.end_event.synchronize()
        return float(self.start_event.elapsed_time(self.end_event))


def trim_mean(data: Iterable[float], trim_percent: float) -> float:
    """The mean without this share (0 to 1) of the smallest values, and of the largest; 0 of nothing."""
    values = sorted(data)
    cut = round(len(values) * trim_percent)
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept) if kept else 0.0


__all__ = [
    "CudaEventTimer",
    "NamedTimer",
    "NoopTimer",
    "SynchronizedWallClockTimer",
    "ThroughputTimer",
    "Timers",
    "trim_mean",
]
