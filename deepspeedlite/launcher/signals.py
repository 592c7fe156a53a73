"""Signals as something to select on: while a `SignalQueue` is open they neither end nor interrupt this process."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


class SignalQueue:
    """Hears what ends, pauses or concerns a job, in the order in which it came. May be opened again."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)

    def __enter__(self) -> SignalQueue:
        taken = [*ENDING, *PASSED_ON, signal.SIGCHLD, signal.SIGTSTP, signal.SIGWINCH]
        taken.remove(signal.SIGPIPE)  # Python ignores it; the screen reports a closed reader instead
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            taken.remove(signal.SIGHUP)  # nohup: go on without the terminal

        def heard(_number: int, _frame: FrameType | None) -> None:
            """The number reaches `take` through the wake-up socket."""

        self._before = {number: signal.signal(number, heard) for number in taken}
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def fileno(self) -> int:
        """For `select`."""
        return self._read.fileno()

    def take(self) -> bytes:
        """The numbers heard since the last call."""
        with contextlib.suppress(BlockingIOError):
            return self._read.recv(4096)
        return b""

    def poke(self, number: int = 0) -> None:
        """As if this signal had come (0 is none: it only wakes); any thread may call it."""
        with contextlib.suppress(OSError):
            self._write.send(bytes([number]))
