"""Measures collectives: how many, how long, how fast, per operation and message size.

A `CommsLogger` observes `comm.Group`s while it is enabled (config section `comms_logger`); off, a collective costs one
attribute read. What is measured: from the call until the call returns, or until `wait` returns for async calls, so
the time of an async call includes the computation it overlapped. On GPUs both ends are events on the current
stream, read later, so that measuring does not synchronise; the end is when that stream may use the result.

Sizes and bandwidths follow nccl-tests (doc/PERFORMANCE.md): the size of an all-gather is that of its whole output,
of a reduce-scatter that of its whole input; algbw is size / time, and busbw scales it by what each rank's link
carries: 2(n-1)/n for all-reduce, (n-1)/n for all-gather and reduce-scatter, 1 for the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from deepspeedlite.comm import Group, Work
from deepspeedlite.config.sections.monitors import CommsLogger as CommsLoggerSection
from deepspeedlite.host.text import columns, size_text
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.log import logger as text_log

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_BETWEEN = (os.path.join(_PACKAGE, "comm", ""), os.path.join(_PACKAGE, "compat", "comm.py"), os.path.abspath(__file__))
_PENDING_LIMIT = 512
_BUS_FACTORS: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
}


@dataclass
class OpStats:
    """What is known of one operation at one message size."""

    count: int = 0
    total_ms: float = 0.0
    ranks: int = 1

    def add(self, elapsed_ms: float, ranks: int) -> None:
        """Count one more call."""
        self.count += 1
        self.total_ms += elapsed_ms
        self.ranks = ranks

    @property
    def mean_ms(self) -> float:
        """Mean latency of a call."""
        return self.total_ms / self.count if self.count else 0.0

    def algbw_gb_s(self, size_bytes: int) -> float:
        """Bytes of the message per second, in 1e9 bytes."""
        return size_bytes / self.mean_ms / 1e6 if self.mean_ms else 0.0

    def busbw_gb_s(self, op: str, size_bytes: int) -> float:
        """Bytes over each rank's link per second, in 1e9 bytes: comparable between operations and world sizes."""
        return self.algbw_gb_s(size_bytes) * bus_factor(op.split(" ")[0], self.ranks)


def bus_factor(op: str, ranks: int) -> float:
    """How many bytes each rank's link carries per byte of the message, as NVIDIA's nccl-tests count them."""
    return _BUS_FACTORS.get(op, lambda _: 1.0)(ranks)


@dataclass
class _Pending:
    """A GPU collective whose events may not have happened yet."""

    op: str
    size_bytes: int
    ranks: int
    start: torch.Event
    end: torch.Event


@dataclass
class CommsLogger:
    """Collects the statistics of collectives while `enabled`. An engine's go to `comms_logger` below."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    debug: bool = False
    stats: dict[tuple[str, int], OpStats] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)

    def configure(self, settings: CommsLoggerSection) -> None:
        """Take the settings of the config section `comms_logger`; what was measured so far is kept."""
        self.enabled, self.verbose, self.debug = settings.enabled, settings.verbose, settings.debug
        self.prof_all, self.prof_ops = settings.prof_all, tuple(settings.prof_ops)

    def measure(self, op: str, message: torch.Tensor | None, ranks: int, wanted: bool = False) -> Measurement:
        """A context around one collective over `ranks` ranks; `message` None means that it carries no data.

        `wanted`: measure it although the settings leave it out.
        """
        size_bytes = message.numel() * message.element_size() if message is not None else 0
        device = Device(message.device) if message is not None else Device(torch.device("cpu"))
        wanted = wanted or self.prof_all or op in self.prof_ops
        name = f"{op} < {_caller()}" if self.debug else op
        return Measurement(self if wanted else None, name, size_bytes, ranks, device)

    def observe(
        self, op: str, message: torch.Tensor | None, ranks: int, call: Callable[[], Work | None]
    ) -> Work | None:
        """See `comm.Observer`."""
        with self.measure(op, message, ranks) as measured:
            return measured.finish(call())

    def record(self, op: str, size_bytes: int, elapsed_ms: float, ranks: int) -> None:
        """Add one call."""
        one = OpStats()
        one.add(elapsed_ms, ranks)
        self.stats.setdefault((op, size_bytes), OpStats()).add(elapsed_ms, ranks)
        if self.verbose:
            text_log.info(
                f"comm {op}: {size_text(size_bytes, 2)} in {elapsed_ms:.3f} ms, algbw "
                f"{one.algbw_gb_s(size_bytes):.3f} GB/s, busbw {one.busbw_gb_s(op, size_bytes):.3f} GB/s"
            )

    def record_later(self, pending: _Pending) -> None:
        """Add one GPU call, to be counted once its end event has happened."""
        self._pending.append(pending)
        if self.verbose or len(self._pending) > _PENDING_LIMIT:
            self.resolve(wait=self.verbose)

    def resolve(self, wait: bool = True) -> None:
        """Count the GPU calls that are over; with `wait`, all of them, which synchronises."""
        left: list[_Pending] = []
        for item in self._pending:
            if wait:
                item.end.synchronize()
            if item.end.query():
                self.record(item.op, item.size_bytes, item.start.elapsed_time(item.end), item.ranks)
            else:
                left.append(item)
        self._pending = left

    def reset(self) -> None:
        """Forget what was measured."""
        self.stats.clear()
        self._pending.clear()

    def summary(self) -> str:
        """The table: one line per operation and message size."""
        self.resolve()
        return _table(self.stats)

    def log_summary(self, show_straggler: bool = False, file: TextIO | None = None) -> None:
        """Print the table on rank 0 (to stdout unless `file` is given).

        With `show_straggler` a second table tells how long each rank waited for others: its time beyond that of the
        rank which spent least in the operation, the one that came last. That is itself a collective: all ranks
        must call.
        """
        text = self.summary()
        distributed = dist.is_initialized()
        if show_straggler:
            totals = {key: one.total_ms for key, one in self.stats.items()}
            text += "\n\n" + _straggler_table(Group().all_gather_objects(totals))
        if not distributed or dist.get_rank() == 0:
            stream = sys.stdout if file is None else file
            stream.write(text + "\n")
            stream.flush()


class Measurement:
    """Times one collective: `with` around the call, and `finish` on what the call returned."""

    def __init__(self, into: CommsLogger | None, op: str, size_bytes: int, ranks: int, device: Device) -> None:
        self._into, self._op, self._size_bytes, self._ranks = into, op, size_bytes, ranks
        self._device = device
        self._start_event = device.event() if into is not None else None
        self._start_s = 0.0
        self._deferred = False

    def __enter__(self) -> Measurement:
        if self._start_event is not None:
            self._start_event.record()
        self._start_s = time.perf_counter()
        return self

    def finish(self, work: Any) -> Any:
        """Hand back the call's result; an async one is measured until its `wait` returns."""
        if work is None or self._into is None:
            return work
        self._deferred = True
        return MeasuredWork(work, self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None and not self._deferred:
            self.stop()

    def stop(self) -> None:
        """The collective is over as far as the caller can tell."""
        if self._into is None:
            return
        if self._start_event is None:
            elapsed_ms = (time.perf_counter() - self._start_s) * 1e3
            self._into.record(self._op, self._size_bytes, elapsed_ms, self._ranks)
            return
        end = self._device.event()
        assert end is not None, "a device whose start was an event has events"
        end.record()
        self._into.record_later(_Pending(self._op, self._size_bytes, self._ranks, self._start_event, end))


class MeasuredWork:
    """An async collective that reports to the logger when it is first waited for."""

    def __init__(self, work: Any, measurement: Measurement) -> None:
        self._work = work
        self._measurement: Measurement | None = measurement

    def wait(self, *arguments: Any) -> Any:
        """Wait as the wrapped work does, then record the time since the call."""
        result = self._work.wait(*arguments)
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            measurement.stop()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


comms_logger = CommsLogger()
"""This process's logger, off until a configuration enables it; engines' groups, and `compat.comm`, feed it."""


def _caller() -> str:
    """The function that asked for the collective: outside of `comm`, what serves its functions, and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_name


def _table(stats: Mapping[tuple[str, int], OpStats]) -> str:
    rows: list[tuple[str, ...]] = [("operation", "size", "count", "total ms", "mean ms", "algbw GB/s", "busbw GB/s")]
    for (op, size_bytes), one in sorted(stats.items()):
        times = one.total_ms, one.mean_ms, one.algbw_gb_s(size_bytes), one.busbw_gb_s(op, size_bytes)
        rows.append((op, size_text(size_bytes, 2), str(one.count), *(f"{value:.3f}" for value in times)))
    lines = columns(rows, right=range(1, 7))
    return "\n".join(lines if stats else [*lines, "(no collective was measured)"])


def _straggler_table(totals_by_rank: Sequence[Mapping[tuple[str, int], float]]) -> str:
    rows = [("operation", "size", "least ms", "waited for others, ms by rank")]
    for op, size_bytes in sorted(set().union(*totals_by_rank)):
        totals = [totals.get((op, size_bytes), 0.0) for totals in totals_by_rank]
        waits = " ".join(f"{total - min(totals):.3f}" for total in totals)
        rows.append((op, size_text(size_bytes, 2), f"{min(totals):.3f}", waits))
    return "\n".join(columns(rows, right=(1, 2)))
