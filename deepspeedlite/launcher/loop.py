"""The one event loop, of the launcher and of agents: what can be read, and the signals that came meanwhile."""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable, Iterable
from typing import Protocol

from deepspeedlite.launcher.signals import SignalQueue


class Writer(Protocol):
    """What has bytes to write when its descriptor takes some."""

    write_fd: int

    def flush(self) -> None:
        """Write what can be written now."""


class Loop:
    """Descriptors, and what to call when one can be read. It never blocks but in `turn`."""

    def __init__(self, signals: SignalQueue) -> None:
        self.signals = signals
        self._selector = selectors.DefaultSelector()  # epoll, unlike select, knows descriptors beyond 1024
        self._selector.register(signals, selectors.EVENT_READ)

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        """Call this whenever `fd` can be read."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def forget(self, fd: int) -> None:
        """Call nothing for `fd` any more; before it is closed."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def turn(self, timeout_s: float | None, writers: Iterable[Writer] = ()) -> bytes:
        """Wait for something, at most `timeout_s`, and handle it; gives the signals that came, in their order."""
        waiting = list(writers)
        for writer in waiting:
            self._selector.register(writer.write_fd, selectors.EVENT_WRITE, writer.flush)
        try:
            ready = self._selector.select(timeout_s)
        finally:
            for writer in waiting:
                self._selector.unregister(writer.write_fd)
        for key, events in ready:
            # What another's call has forgotten since is not called: its descriptor may be closed.
            is_known = self._selector.get_map().get(key.fd) is key or events & selectors.EVENT_WRITE
            if key.data is not None and is_known:
                key.data()
        return self.signals.take()

    def close(self) -> None:
        """Let go of the selector's own descriptor."""
        self._selector.close()
