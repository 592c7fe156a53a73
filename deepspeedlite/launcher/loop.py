"""The one event loop, of the launcher and of agents: what can be read or written, and the signals that came meanwhile.

While a `Loop` is open signals neither end nor interrupt this process: `turn` gives them, in the order they came in.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


class Writer(Protocol):
    """What may have bytes that its descriptor did not take at once."""

    @property
    def waits_for(self) -> int | None:
        """The descriptor that must take something first; None: nothing waits."""

    def flush(self) -> None:
        """Write what can be written now."""


class Loop:
    """Descriptors, and what to call when one can be read. It never blocks but in `turn`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()  # epoll, unlike select, knows descriptors beyond 1024
        self._signals, self._poke = socket.socketpair()  # the numbers that came; Python's own handler writes them
        for end in (self._signals, self._poke):
            end.setblocking(False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        self._writers: list[Writer] = []

    def __enter__(self) -> Loop:
        taken = {*ENDING, *PASSED_ON, signal.SIGCHLD, signal.SIGTSTP, signal.SIGWINCH}
        taken.remove(signal.SIGPIPE)  # Python ignores it; the screen reports a closed reader instead
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            taken.remove(signal.SIGHUP)  # nohup: go on without the terminal

        def heard(_number: int, _frame: FrameType | None) -> None:
            """The number reaches `turn` through the wake-up socket."""

        self._before = {number: signal.signal(number, heard) for number in taken}
        self._old_wakeup = signal.set_wakeup_fd(self._poke.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._selector.close()
        self._signals.close()
        self._poke.close()

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        """Call this whenever `fd` can be read."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def forget(self, fd: int) -> None:
        """Call nothing for `fd` any more; before it is closed."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def serve(self, writer: Writer) -> None:
        """Let it write on, at every turn, when its descriptor takes more."""
        self._writers.append(writer)

    def dismiss(self, writer: Writer) -> None:
        """Forget it; before its descriptor is closed."""
        if writer in self._writers:
            self._writers.remove(writer)

    def poke(self, number: int) -> None:
        """As if this signal had come."""
        with contextlib.suppress(OSError):
            self._poke.send(bytes([number]))

    def turn(self, timeout_s: float | None) -> bytes:
        """Wait for something, at most `timeout_s`, and handle it; gives the signals that came, in their order."""
        waiting = {fd: writer for writer in self._writers if (fd := writer.waits_for) is not None}
        for fd, writer in waiting.items():
            self._selector.register(fd, selectors.EVENT_WRITE, writer.flush)
        try:
            ready = self._selector.select(timeout_s)
        finally:
            for fd in waiting:
                self._selector.unregister(fd)
        for key, events in ready:
            # What another's call has forgotten since is not called: its descriptor may be closed.
            is_known = self._selector.get_map().get(key.fd) is key or events & selectors.EVENT_WRITE
            if key.data is not None and is_known:
                key.data()
        with contextlib.suppress(BlockingIOError):
            return self._signals.recv(4096)
        return b""
