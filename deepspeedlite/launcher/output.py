"""Carries the ranks' output to the launcher's own stdout and stderr.

A line of one rank is written whole, in one write, with the rank in front, in colour only on a terminal: `[1] text`.
With a single rank there is no prefix and every byte passes at once. Bytes are never decoded.

Rank 0's progress bars stay intact. Where the launcher's stream is a terminal, rank 0 gets a pseudo-terminal (as
wide as the real one less the prefix), so that rich and tqdm behave as they do alone, and its bytes are shown
live; another rank's line is put above the unfinished one. Elsewhere its pieces that end in a carriage return are
forwarded one by one. Other ranks' carriage returns are collapsed to the last state of their line.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import queue
import re
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from deepspeedlite.launcher.report import ErrorTail
from deepspeedlite.launcher.signals import ENDING, SignalQueue

_CHUNK_BYTES = 1 << 16
_LINE_LIMIT_BYTES = 1 << 20  # a longer line is broken rather than held in memory
_LIVE_LIMIT_BYTES = 1 << 12  # what is redrawn of an unfinished line
_WINDOW_BYTES = 1 << 20  # output on its way that has not been shown yet
_ERASE_LINE, _SHOW_CURSOR = b"\r\x1b[2K", "\x1b[?25h"
# Where a prefix goes: at a line's first byte, and after a carriage return that goes back to the line's start.
_LINE_START = re.compile(rb"(?<=\n)(?=[^\r])|(?<=\r)(?=[^\r\n])")

Shown = Callable[[int], None]  # told how many bytes have been shown


class Screen:
    """The launcher's stdout and stderr, shared by the ranks' streams and the launcher's own lines.

    Between `start` and `stop` a thread writes, so that a stopped pager delays neither the launcher's answers nor the
    end of a failed run. Who shows much looks at `is_full` first.

    Args:
        signals: learns by a SIGPIPE that a stream can no longer be written, and is woken when there is room again.
    """

    def __init__(self, out_fd: int = 1, err_fd: int = 2, signals: SignalQueue | None = None) -> None:
        self.out_fd, self.err_fd = out_fd, err_fd
        self.has_colour = not os.environ.get("NO_COLOR")
        self._signals = signals or SignalQueue()
        self._is_terminal = {fd: os.isatty(fd) for fd in (out_fd, err_fd)}
        self._broken: set[int] = set()
        self._unfinished: dict[int, bytes] = {}  # the text after the last line end, by surface
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[tuple[int, bytes, str, Shown | None] | None] = queue.SimpleQueue()
        # Each has one writer, the loop's thread and the printing one: no lock is needed.
        self._queued_bytes = self._shown_bytes = 0

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

    @property
    def is_full(self) -> bool:
        """Whether too much waits to be shown: whoever writes it should wait too."""
        return self._queued_bytes - self._shown_bytes > _WINDOW_BYTES

    @property
    def is_behind(self) -> bool:
        """Whether anything waits to be shown."""
        return self._queued_bytes > self._shown_bytes

    def start(self) -> None:
        """Let a thread write from here on; after the last fork."""
        if self._thread is None:
            self._queue = queue.SimpleQueue()  # an earlier thread may still be stuck with the old one
            self._queued_bytes = self._shown_bytes = 0
            self._thread = threading.Thread(target=self._print, args=(self._queue,), name="output", daemon=True)
            self._thread.start()

    def stop(self, patience_s: float) -> None:
        """Show what is waiting, which a person may cut short by a signal, and write at once from here on."""
        thread, self._thread = self._thread, None
        deadline_s = time.monotonic() + patience_s
        self._queue.put(None)
        while thread is not None and thread.is_alive() and time.monotonic() < deadline_s:
            thread.join(0.05)
            if set(self._signals.take()) & set(ENDING):
                return

    def show(self, fd: int, data: bytes, how: str = "lines", shown: Shown | None = None) -> None:
        """Show bytes of a rank: whole `lines`, `live` ones as they come, or the launcher's `own` lines."""
        if self._thread is None:
            self._put(fd, data, how)
            return
        self._queued_bytes += len(data)
        self._queue.put((fd, data, how, shown))

    def acknowledge(self, nbytes: int | None) -> None:
        """Nothing to do where the thread that writes counts."""

    def say(self, text: str) -> None:
        """Write the launcher's own lines to stderr, below whatever is unfinished there."""
        self.show(self.err_fd, text.encode(errors="surrogateescape"), "own")

    def restore(self) -> None:
        """Show the cursor again: a rank that was ended may have hidden it for a progress bar."""
        if self.is_terminal(self.err_fd):
            self.say(_SHOW_CURSOR)

    def _print(self, waiting: queue.SimpleQueue[tuple[int, bytes, str, Shown | None] | None]) -> None:
        while (item := waiting.get()) is not None:
            fd, data, how, shown = item
            self._put(fd, data, how)
            was_full = self.is_full
            self._shown_bytes += len(data)
            if shown is not None:
                shown(len(data))
            if was_full and not self.is_full:
                self._signals.poke()

    def _put(self, fd: int, data: bytes, how: str) -> None:
        # Two streams on terminals share one line: that of the person's screen.
        surface = -1 if self._is_terminal[fd] else fd
        unfinished = self._unfinished.get(surface, b"")
        if how == "live":
            # A bar that ends with a carriage return stays on the screen until something is written over it.
            body = data.removesuffix(b"\r")
            line_end = max(body.rfind(b"\n"), body.rfind(b"\r"))
            before = b"" if line_end >= 0 or (unfinished.endswith(b"\r") and body) else unfinished
            self._unfinished[surface] = (before + data[line_end + 1 :])[-_LIVE_LIMIT_BYTES:]
        elif unfinished and how == "lines" and self._is_terminal[fd]:
            data = _ERASE_LINE + data + unfinished
        elif unfinished:
            self._unfinished[surface] = b""
            data = b"\n" + data
        self._write(fd, data)

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view and fd not in self._broken:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # someone who shares the descriptor made it non-blocking
                select.select([], [fd], [])
            except OSError:  # closed pipe, vanished terminal, full disk: nobody can be told here
                self._broken.add(fd)
                self._signals.poke(signal.SIGPIPE)


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

    def __init__(
        self,
        screen: Screen,
        sink_fd: int,
        prefix: bytes,
        is_first: bool,
        tail: ErrorTail | None = None,
        log: RankLog | None = None,
    ) -> None:
        self._screen, self._sink_fd, self._prefix = screen, sink_fd, screen.painted(sink_fd, prefix)
        # A lone rank has no prefix; only rank 0 of several may leave a line unfinished, and only on a terminal.
        self._is_live = not prefix or (is_first and screen.is_terminal(sink_fd))
        self._is_first = is_first
        self._previous = b"\n"  # the last byte that was shown: whether a prefix is due
        self._held = b""  # an unfinished line
        self._tail, self._log = tail, log

    def feed(self, data: bytes) -> None:
        """Take the next bytes the rank wrote."""
        if self._tail is not None:
            self._tail.feed(data, time.monotonic())
        if self._log is not None:
            self._log.feed(self._sink_fd, data)
        if self._is_live:
            self._screen.show(self._sink_fd, self._tagged(data), "live")
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
        if self._log is not None:
            self._log.finish(self._sink_fd)

    def _emit(self, lines: bytes) -> None:
        if not self._is_first and b"\r" in lines:
            lines = b"\n".join(line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines.split(b"\n"))
        self._screen.show(self._sink_fd, self._tagged(lines))

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
