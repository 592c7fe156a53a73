"""Carries the ranks' output to the launcher's own stdout and stderr.

One thread (`Pump`) reads every rank's pipes. A line of one rank is written whole, in one write, with the rank in
front, in colour only on a terminal: `[1] text`. With a single rank there is no prefix and every byte passes at once.
Bytes are never decoded.

Rank 0's progress bars stay intact. Where the launcher's stream is a terminal, rank 0 gets a pseudo-terminal (as
wide as the real one less the prefix), so that rich and tqdm behave as they do alone, and its bytes are shown
live; another rank's line is put above the unfinished one. Elsewhere its pieces that end in a carriage return are
forwarded one by one. Other ranks' carriage returns are collapsed to the last state of their line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import select
import selectors
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import BinaryIO

from deepspeedlite.launcher.report import ErrorTail

_CHUNK_BYTES = 1 << 16
_LINE_LIMIT_BYTES = 1 << 20  # a longer line is broken rather than held in memory
_LIVE_LIMIT_BYTES = 1 << 12  # what is redrawn of an unfinished line
# After the ranks' end a process they left behind may hold their pipes open, silent or not: stop listening then.
_DRAIN_S = 0.05
_DRAIN_LIMIT_BYTES = 16 << 20
_ERASE_LINE = b"\r\x1b[2K"
_HIDE_CURSOR, _SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
# Where a prefix goes: at a line's first byte, and after a carriage return that goes back to the line's start.
_LINE_START = re.compile(rb"(?<=\n)(?=[^\r])|(?<=\r)(?=[^\r\n])")


class Screen:
    """The launcher's stdout and stderr, shared by the ranks' streams and the launcher's own lines."""

    def __init__(self, out_fd: int = 1, err_fd: int = 2) -> None:
        self.out_fd, self.err_fd = out_fd, err_fd
        self.on_broken: Callable[[], None] = lambda: None  # called once per stream that can no longer be written
        self.has_colour = not os.environ.get("NO_COLOR")
        self._lock = threading.Lock()
        self._is_terminal = {fd: os.isatty(fd) for fd in (out_fd, err_fd)}
        self._broken: set[int] = set()
        self._unfinished: dict[int, bytes] = {}  # the text after the last line end, by surface
        self._cursor_owner: int | None = None  # where a rank has hidden the cursor

    def is_terminal(self, fd: int) -> bool:
        """Whether a person may be looking at this stream."""
        return self._is_terminal[fd]

    def painted(self, fd: int, prefix: bytes) -> bytes:
        """A rank's prefix in its colour, where a person looks and has not set NO_COLOR."""
        if not prefix or not self.has_colour or not self.is_terminal(fd):
            return prefix
        return b"\x1b[%dm%b\x1b[0m " % (31 + sum(prefix) % 6, prefix.rstrip())

    def window_size(self, fd: int) -> bytes:
        """What the terminal behind this stream says of its size (struct winsize); b"" where there is none."""
        try:
            return fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
        except OSError:
            return b""

    def acknowledge(self, nbytes: int | None) -> None:
        """Nothing to do where writing shows at once."""

    def _surface(self, fd: int) -> int:
        """Two streams on terminals share one line: that of the person's screen."""
        return -1 if self._is_terminal[fd] else fd

    def lines(self, fd: int, data: bytes) -> None:
        """Write whole lines; an unfinished line on the same terminal is moved below them."""
        with self._lock:
            unfinished = self._unfinished.get(self._surface(fd), b"")
            if not unfinished:
                self._write(fd, data)
            elif self._is_terminal[fd]:
                self._write(fd, _ERASE_LINE + data + unfinished)
            else:
                self._unfinished[fd] = b""
                self._write(fd, b"\n" + data)

    def live(self, fd: int, data: bytes) -> None:
        """Write bytes as they come."""
        with self._lock:
            surface = self._surface(fd)
            # A bar that ends with a carriage return stays on the screen until something is written over it.
            body = data.removesuffix(b"\r")
            line_end = max(body.rfind(b"\n"), body.rfind(b"\r"))
            before = self._unfinished.get(surface, b"") if line_end < 0 else b""
            before = b"" if before.endswith(b"\r") and body else before
            self._unfinished[surface] = (before + data[line_end + 1 :])[-_LIVE_LIMIT_BYTES:]
            if (hide := data.rfind(_HIDE_CURSOR)) != (show := data.rfind(_SHOW_CURSOR)):
                self._cursor_owner = fd if hide > show else None
            self._write(fd, data)

    def restore(self) -> None:
        """Show the cursor again if a rank was ended before its progress bar could."""
        if self._cursor_owner is not None and self._is_terminal[self._cursor_owner]:
            self.lines(self._cursor_owner, _SHOW_CURSOR)
        self._cursor_owner = None

    def say(self, text: str) -> None:
        """Write the launcher's own lines to stderr, below whatever is unfinished there."""
        # A reader that has stopped reading must not keep the launcher from ending.
        locked = self._lock.acquire(timeout=1.0)
        try:
            surface = self._surface(self.err_fd)
            start = b"\n" if self._unfinished.get(surface) else b""
            self._unfinished[surface] = b""
            self._write(self.err_fd, start + text.encode(errors="surrogateescape"))
        finally:
            if locked:
                self._lock.release()

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view and fd not in self._broken:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # someone who shares the descriptor made it non-blocking
                select.select([], [fd], [])
            except OSError:  # closed pipe, vanished terminal, full disk: nobody can be told here
                self._broken.add(fd)
                self.on_broken()


class ScreenText(io.TextIOBase):
    """A text stream onto `Screen.say`, to stand in for sys.stderr while ranks write."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def write(self, text: str) -> int:
        """Write at once; the logger hands over whole lines."""
        self._screen.say(text)
        return len(text)


class RankLog:
    """One rank's stdout and stderr in a file, unprefixed, whole lines of each."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by its streams' end
        self._held: dict[int, bytes] = {}

    def feed(self, stream: int, data: bytes) -> None:
        """Append what `stream` wrote, up to its last line end."""
        data = self._held.get(stream, b"") + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not end and len(data) > _LINE_LIMIT_BYTES:
            end = len(data)
        self._held[stream] = data[end:]
        self._append(data[:end])

    def finish(self, stream: int) -> None:
        """Write what is left of `stream`'s last line."""
        self._append(self._held.pop(stream, b""))

    def _append(self, data: bytes) -> None:
        # A full disk must not stop the training: the lines are still on the screen.
        with contextlib.suppress(OSError):
            self._file.write(data)


class RankStream:
    """One of a rank's two streams, from the pipe's end to the screen."""

    def __init__(self, screen: Screen, sink_fd: int, prefix: bytes, is_first: bool) -> None:
        self._screen, self._sink_fd, self._prefix = screen, sink_fd, screen.painted(sink_fd, prefix)
        # A lone rank has no prefix; only rank 0 of several may leave a line unfinished, and only on a terminal.
        self._is_live = not prefix or (is_first and screen.is_terminal(sink_fd))
        self._is_first = is_first
        self._previous = b"\n"
        self._held = b""
        self.tail: ErrorTail | None = None
        self.log: RankLog | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes the rank wrote."""
        if self.tail is not None:
            self.tail.feed(data, time.monotonic())
        if self.log is not None:
            self.log.feed(self._sink_fd, data)
        if self._is_live:
            self._screen.live(self._sink_fd, self._tagged(data))
            return
        data = self._held + data
        end = data.rfind(b"\n") + 1
        if self._is_first:
            end = max(end, data.rfind(b"\r") + 1)
        self._held = data[end:]
        if len(self._held) > _CHUNK_BYTES and not self._is_first:
            self._held = self._held[self._held.rfind(b"\r", 0, -1) + 1 :]
        if len(self._held) > _LINE_LIMIT_BYTES:
            data, end, self._held = data[:end] + self._held + b"\n", end + len(self._held) + 1, b""
        if end:
            self._emit(data[:end])

    def finish(self) -> None:
        """The rank closed the stream: its last line is complete as it stands."""
        if self._held:
            self._emit(self._held + b"\n")
            self._held = b""
        if self.log is not None:
            self.log.finish(self._sink_fd)

    def _emit(self, lines: bytes) -> None:
        if not self._is_first and b"\r" in lines:
            lines = b"\n".join(line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines.split(b"\n"))
        self._screen.lines(self._sink_fd, self._tagged(lines))

    def _tagged(self, data: bytes) -> bytes:
        if not self._prefix:
            return data
        text = _LINE_START.sub(self._prefix, self._previous + data)[1:]
        self._previous = data[-1:]
        return text


def open_channel(screen: Screen, sink_fd: int, prefix: bytes, is_first: bool) -> tuple[int, int]:
    """The (read, write) ends between a rank's stream and the screen: a pipe, or for rank 0 on a terminal a pty."""
    if is_first and screen.is_terminal(sink_fd):
        with contextlib.suppress(OSError):  # no ptys left, or none in this container
            ours, theirs = os.openpty()
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # the real terminal turns \n into \r\n; twice would be once too often
            modes[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            set_window_size(ours, screen.window_size(sink_fd), len(prefix))
            return ours, theirs
    return os.pipe()


def set_window_size(pty_fd: int, size: bytes, prefix_width: int) -> None:
    """Give a pty the terminal's size less the room the prefix takes."""
    with contextlib.suppress(OSError, struct.error):
        rows, columns, width, height = struct.unpack("HHHH", size)
        fcntl.ioctl(
            pty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, max(columns - prefix_width, 0), width, height)
        )


class Pump(threading.Thread):
    """Reads all ranks' streams until they close. Whoever reads our output slowly slows the ranks, as a pipe would."""

    def __init__(self, streams: Iterable[tuple[int, RankStream]]) -> None:
        super().__init__(name="rank output", daemon=True)
        self._selector = selectors.DefaultSelector()
        self._num_open = 0
        for fd, stream in streams:
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, stream)
            self._num_open += 1
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._stopping = False
        self._left_bytes = _DRAIN_LIMIT_BYTES

    def run(self) -> None:
        """Forward until every stream has ended, or until `stop` was called and no more is waiting."""
        while self._num_open and self._left_bytes > 0:
            ready = self._selector.select(_DRAIN_S if self._stopping else None)
            if not ready:
                break
            for key, _ in ready:
                if key.data is None:
                    os.read(key.fd, 1)
                else:
                    self._read(key.fd, key.data)
        for key in self._selector.get_map().values():
            if key.data is not None:
                key.data.finish()

    def stop(self) -> None:
        """The ranks are gone: forward what they had written, and end."""
        self._stopping = True
        os.write(self._wake_write, b"x")

    def _read(self, fd: int, stream: RankStream) -> None:
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the last holder of a pty's other side has closed it
                raise
            data = b""
        if data:
            self._left_bytes -= len(data) * self._stopping
            stream.feed(data)
            return
        self._selector.unregister(fd)
        os.close(fd)
        self._num_open -= 1
        stream.finish()
