"""Says who waits for whom, and where the others are, while they wait: after 30 s, and then once a minute.

A thread looks every few seconds at what this process waits in. It knows by `registry`, which holds the label of every
collective of ours that is waited for; by the main thread's Python code, where that stands still in torch.distributed or
in a DataLoader without using the processor; and, where collectives run on a device and whoever needs a result waits, by
a device that does not come to its end while nothing new is given to it. Training pays nothing for it.

`DEEPSPEEDLITE_STALL_NOTICE_S` is another time than 30 s, or 0 for silence.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.comm.desync import advice
from deepspeedlite.comm.registry import Wait, registry
from deepspeedlite.metrics.rank_status import RankStatus, StatusBoard
from deepspeedlite.runtime.device import Device, accelerators
from deepspeedlite.runtime.log import logger

VARIABLE = "DEEPSPEEDLITE_STALL_NOTICE_S"
_NOTICE_S = 30.0
_LOOKS = 6  # in the time before the first notice
_QUESTION = 2  # of these looks without progress, and the other ranks are asked where they are; three later all know
_AGAIN = 2  # times that time to the next notice
_IDLE = 1e-3  # of a processor's time: what a thread that stands still may use
_NAMED_RANKS = 16
_FAREWELL_S = 10.0  # a question to a store on a busy host takes a while; on one that is stopped, for good
_TOO = "there too"
_OF_MANY = {"waits": "wait", "has": "have", "is": "are"}
_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
_LOADER = os.path.join("torch", "utils", "data", "dataloader.py")
_LIBRARIES = (
    os.path.dirname(torch.__file__),
    os.path.dirname(os.path.dirname(__file__)),
    os.path.dirname(os.__file__),
    f"{os.sep}site-packages{os.sep}",
    "<",
)


def watch_for_stalls() -> None:
    """Have this process watched, from now to the end of torch.distributed's world; once for each world."""
    world, notice_s = dist.group.WORLD, _notice_s()
    if world is None or registry.watch is not None or dist.get_world_size() == 1 or not notice_s:
        return
    with contextlib.suppress(RuntimeError, AttributeError):  # a world without a store of its own
        watch = StallWatch(world, registry.store, notice_s)
        registry.use_watch(watch)
        atexit.register(watch.leave)
        watch.start()


def _notice_s() -> float:
    text = os.environ.get(VARIABLE, "").strip()
    with contextlib.suppress(ValueError):
        return max(float(text), 0.0) if text else _NOTICE_S
    logger.warning("%s=%s is not a number of seconds; %g is used", VARIABLE, text, _NOTICE_S)
    return _NOTICE_S


class StallWatch(threading.Thread):
    """Watches this process.

    Args:
        world: torch.distributed's, with which it ends.
        store: the job's.
        notice_s: how long a wait is before it is said.
    """

    def __init__(self, world: Any, store: dist.Store, notice_s: float) -> None:
        super().__init__(name="deepspeedlite: looks for long waits", daemon=True)
        self.pid, self._rank, self._size = os.getpid(), dist.get_rank(), dist.get_world_size()
        self._world = weakref.ref(world)
        # What collectives of the world go through, and may still be busy with when the host is not.
        self._device = (
            accelerators() if accelerators().backend in dist.get_backend(world) else Device(torch.device("cpu"))
        )
        self._notice_s, self._period_s = notice_s, notice_s / _LOOKS
        # Answers of very many ranks are spread out, and take longer.
        self.board = StatusBoard(store, self._rank, self._size, self._period_s * (1 + self._size // 1024))
        self._over = threading.Event()
        self._seen: dict[int, tuple[Wait, float]] = {}  # by thread, and since when
        self._standstill: tuple[Wait, Any, float] | None = None  # in code of others: what, its mark, and since when
        self._last_cpu_s = 0.0
        self._last: Wait | None = None  # what `registry.last` was when it was looked at
        self._begun = 0  # how often it was another one
        self._next_notice_s = notice_s
        main = threading.main_thread().ident
        self._main = 0 if main is None else main
        self._clock = time.pthread_getcpuclockid(self._main) if hasattr(time, "pthread_getcpuclockid") else None

    def run(self) -> None:
        """Look every few seconds."""
        self.board.start()
        while not self._over.wait(self._period_s) and self.lasts():
            self._look()
        self.board.end()

    def leave(self) -> None:
        """Let other ranks know that this one ends, and stop."""
        self.board.leave()
        self.close()

    def close(self) -> None:
        """Stop both threads, and wait for them: one that comes back from torch's code, such as a question to the store,
        while the interpreter is finalised ends by an exception that this code may not let through, and with it the
        process is aborted ("terminate called without an active exception").
        """
        if self._over.is_set() or self.pid != os.getpid():
            return
        atexit.unregister(self.leave)
        self._over.set()
        self.board.end()
        end_s = time.monotonic() + _FAREWELL_S
        for thread in (self, self.board):  # in this order: the one starts the other
            if thread.is_alive():
                thread.join(max(end_s - time.monotonic(), 0.0))

    def lasts(self) -> bool:
        """Whether the world that it watches is the one there is; not so in a child of its process."""
        world = self._world()
        return world is not None and dist.is_initialized() and dist.group.WORLD is world and self.pid == os.getpid()

    # --- looking ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        now_s = time.monotonic()
        at, frame = self._code()
        self._look_at_threads(now_s)
        self._look_at_code(now_s, frame)
        wait, since_s = self._longest()
        waited_s = now_s - since_s if wait is not None else 0.0
        last = registry.last
        self.board.status = RankStatus(wait and wait.what, waited_s, at, last.what if last is not None else "")
        self.board.question = wait if waited_s > _QUESTION * self._period_s - 1e-3 else None
        if wait is None or waited_s < self._notice_s:
            self._next_notice_s = self._notice_s
        elif waited_s >= self._next_notice_s:
            self._next_notice_s += _AGAIN * self._notice_s
            if wait.is_told and not self.board.is_spoken_for:
                logger.warning(self.account(wait, waited_s, at))

    def _look_at_threads(self, now_s: float) -> None:
        seen = {}
        for thread, wait in list(registry.waits.items()):
            if wait is not None:
                before = self._seen.get(thread)
                seen[thread] = before if before is not None and before[0] is wait else (wait, now_s)
        self._seen = seen

    def _look_at_code(self, now_s: float, frame: FrameType | None) -> None:
        """Whether the main thread stands still in code that says nothing to `registry`."""
        what = _waiting_code(frame) if self._is_idle() else None
        mark: Any = what
        if self._last is not registry.last:
            self._last, self._begun = registry.last, self._begun + 1
        if what is None and self._device.is_accelerator and self._last is not None:
            mark = self._begun, self._device_mark()
            name = f"its device to end what it was given, the last collective of which is {self._last.what}"
            what = Wait(name, self._last.ranks)
        before = self._standstill
        if what is None:
            self._standstill = None
        elif before is None or before[1] != mark:
            self._standstill = what, mark, now_s
        elif mark is not what and now_s - before[2] > self._notice_s / 2 and self._device.is_idle:
            self._standstill = what, mark, now_s  # a device is asked only now: one that records a graph must not be

    def _is_idle(self) -> bool:
        if self._clock is None:
            return False
        used_s, self._last_cpu_s = self._last_cpu_s, time.clock_gettime(self._clock)
        return self._last_cpu_s - used_s < _IDLE * self._period_s

    def _device_mark(self) -> int:
        """What changes with whatever new is done on a device."""
        return self._device.memory_stats().get("allocations", 0)

    def _longest(self) -> tuple[Wait | None, float]:
        if self._seen:
            return min(self._seen.values(), key=lambda seen: seen[1])
        return (self._standstill[0], self._standstill[2]) if self._standstill is not None else (None, 0.0)

    def _code(self) -> tuple[str, FrameType | None]:
        """Where the thread that trains is, and its innermost frame."""
        frames = sys._current_frames()
        # Its own would hold this dict and so itself, and with both whatever training's frames hold, until the next
        # garbage collection: in the worse case one in a DataLoader's worker, which must not end a process group.
        del frames[threading.get_ident()]
        frame = frames.get(self._main if self._main in registry.waits else next(iter(registry.waits), self._main))
        return _described(frame), frame

    # --- saying -----------------------------------------------------------------------------------------------------

    def account(self, wait: Wait, waited_s: float, at: str) -> str:
        """Who waits in what, and where those are that it waits for."""
        text = f"rank {self._rank} has waited {waited_s:.0f} s in {wait.what}, at {at}"
        groups: dict[str, list[int]] = {}
        for rank in wait.ranks:
            if rank != self._rank:
                groups.setdefault(self._whereabouts(rank, wait), []).append(rank)
        lines = [f"\n  {_subject(ranks, where)}" for where, ranks in groups.items()]
        hint = advice([f"waits in {wait.what}", *groups])
        return text + "".join(sorted(lines, key=lambda line: line.endswith(_TOO))) + (f"\n{hint}" if hint else "")

    def condition(self, rank: int) -> str:
        """`has ended` or `is stopped`, if that is known of a rank."""
        return self.board.condition(rank)

    def seen(self, rank: int) -> str:
        """Where a rank is, as far as it has said so lately, or its process shows; else empty."""
        status = self.board.of(rank)
        if (known := self.board.condition(rank)) or status is None:
            return known
        if status.waits_in is not None:
            return f"waits in {status.waits_in}"
        last = f"; its last collective was {status.last}" if status.last else ""
        return f"waits in no collective, but is at {status.at}{last}"

    def _whereabouts(self, rank: int, wait: Wait) -> str:
        if found := self.seen(rank):
            return f"waits {_TOO}" if found == f"waits in {wait.what}" else found
        late_s = time.monotonic() - self.board.heard_s
        if late_s > _LOOKS * self._period_s:
            return (
                f"cannot be asked: the job's store, which rank 0 hosts as a rule, has not answered for {late_s:.0f} s"
            )
        silent_s = self.board.silence_s(rank)
        how_long = "nothing since it was asked" if silent_s is None else f"nothing for {silent_s:.0f} s"
        return f"has said {how_long}: it is stopped, has ended, or is in native code that holds Python's lock"


def _waiting_code(frame: FrameType | None) -> Wait | None:
    """What the code is known to wait in, of torch.distributed and of a DataLoader."""
    if frame is not None and frame.f_code.co_filename.endswith(_C10D):
        name = frame.f_code.co_name
        while frame.f_back is not None and frame.f_back.f_code.co_filename.endswith((_C10D, "c10d_logger.py")):
            frame = frame.f_back
            name = frame.f_code.co_name if frame.f_code.co_filename.endswith(_C10D) else name
        return Wait(f"torch.distributed.{name}", range(dist.get_world_size()))
    while frame is not None:
        if frame.f_code.co_filename.endswith(_LOADER):
            return Wait("its DataLoader, for the next batch", ())
        frame = frame.f_back
    return None


def _described(frame: FrameType | None) -> str:
    """`load (train.py:57)`: the innermost frame that is no library's, and in what it is."""
    if frame is None:
        return "its end"
    inner, own = frame, frame
    while own.f_back is not None and _is_library(own.f_code.co_filename):
        own = own.f_back
    if _is_library(own.f_code.co_filename):
        return _line(inner)
    is_told = inner is not own and not inner.f_code.co_filename.startswith(_LIBRARIES[1])  # ours says what, not where
    return _line(own) + (f", in {_line(inner)}" if is_told else "")


def _is_library(path: str) -> bool:
    return any(path.startswith(name) or (name[0] == os.sep and name in path) for name in _LIBRARIES)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _subject(ranks: Sequence[int], where: str) -> str:
    """`rank 1 waits there too`, `ranks 1-3 wait there too`."""
    verb, rest = where.split(" ", 1)
    return (
        f"rank {ranks[0]} {where}" if len(ranks) == 1 else f"ranks {_numbers(ranks)} {_OF_MANY.get(verb, verb)} {rest}"
    )


def _numbers(ranks: Sequence[int]) -> str:
    """`1-3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = f" and {len(shown) - _NAMED_RANKS} more" if len(shown) > _NAMED_RANKS else ""
    return ", ".join(shown[:_NAMED_RANKS]) + more
