"""Carries the ranks' output to the launcher's own stdout and stderr.

A line of one rank is written whole, with the rank in front, in colour only on a terminal: `[1] text`. With a single
rank there is no prefix and every byte passes at once. Bytes are never decoded.

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
import re
import select
import signal
import struct
import termios
import time
from collections import deque
from collections.abc import Callable
from typing import BinaryIO, Protocol

from deepspeedlite.launcher.loop import ENDING, Loop
from deepspeedlite.launcher.report import ErrorTail, Quiet

_LINE_LIMIT_BYTES = 1 << 20  # a longer line is broken rather than held in memory
_LIVE_LIMIT_BYTES = 1 << 12  # what is redrawn of an unfinished line
WINDOW_BYTES = 1 << 20  # output on its way that has not been shown yet
_PIECE_BYTES = select.PIPE_BUF  # what a pipe that can be written takes without blocking
_ERASE_LINE, _SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25h"
# Where a prefix goes: at a line's first byte, and after a carriage return that goes back to the line's start.
_LINE_START = re.compile(rb"(?<=\n)(?=[^\r])|(?<=\r)(?=[^\r\n])")


class Surface(Protocol):
    """Where ranks' output is shown: this process's own streams, or the launcher's at the other end of a link."""

    terminals: dict[int, bytes]  # of streams 1 and 2 those that a person may be looking at, with their struct winsize
    has_colour: bool

    @property
    def is_full(self) -> bool:
        """Whether too much waits to be shown: whoever writes it should wait too."""

    def show(self, stream: int, data: bytes, is_live: bool) -> None:
        """Show bytes of a rank: live ones as they come, or whole lines."""


class Screen(io.TextIOBase):
    """The launcher's stdout and stderr, shared by the ranks' streams and its own lines, for which it is a text file.

    A stopped pager delays neither the launcher's answers nor the end of a failed run: what is not taken now is written
    at a later turn of the loop, which learns by a SIGPIPE that a stream can no longer be written.
    """

    def __init__(self, loop: Loop, out_fd: int = 1, err_fd: int = 2) -> None:
        self._loop, self._fds = loop, {1: _opened_anew(out_fd), 2: _opened_anew(err_fd)}
        self._broken: set[int] = set()
        self.has_colour = not os.environ.get("NO_COLOR")
        self.terminals: dict[int, bytes] = {}
        self.measure()
        # Text after the last line end, by stream; 0 for both where they are terminals: they share the person's screen.
        self._unfinished: dict[int, bytes] = {}
        # Bytes on their way to a descriptor, and what is called once they are there.
        self._waiting: deque[tuple[int, memoryview, Callable[[], object] | None]] = deque()
        self._waiting_bytes = 0
        loop.serve(self)

    def measure(self) -> None:
        """Learn the terminals' sizes."""
        for stream, fd in self._fds.items():
            with contextlib.suppress(OSError):  # it is no terminal
                self.terminals[stream] = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)

    @property
    def is_full(self) -> bool:
        """Whether too much waits to be shown."""
        return self._waiting_bytes > WINDOW_BYTES

    @property
    def waits_for(self) -> int | None:
        """The descriptor that must take something first."""
        return self._waiting[0][0] if self._waiting else None

    def show(self, stream: int, data: bytes, is_live: bool = False, shown: Callable[[], object] | None = None) -> None:
        """Show bytes of a rank; `shown` is called when they are."""
        surface = 0 if stream in self.terminals else stream
        unfinished = self._unfinished.get(surface, b"")
        if is_live:
            # A bar that ends with a carriage return stays on the screen until something is written over it.
            line = (unfinished + data).rpartition(b"\n")[2]
            self._unfinished[surface] = line[line.rfind(b"\r", 0, -1) + 1 :][-_LIVE_LIMIT_BYTES:]
        elif surface == 0 and unfinished:
            data = _ERASE_LINE + data + unfinished
        self._put(stream, data, shown)

    def write(self, text: str) -> int:
        """Write the launcher's own lines to stderr, below whatever is unfinished there."""
        start = b"\n" * bool(self._unfinished.pop(0 if 2 in self.terminals else 2, b""))
        self._put(2, start + text.encode(errors="surrogateescape"))
        return len(text)

    def restore(self) -> None:
        """Show the cursor again: a rank that was ended may have hidden it for a progress bar."""
        if 2 in self.terminals:
            self._put(2, _SHOW_CURSOR)

    def finish(self, patience_s: float) -> None:
        """Wait until all is shown; what is stuck after that time, or when a person ends it by a signal, is given up."""
        deadline_s = time.monotonic() + patience_s
        while self._waiting:
            is_asked = bool(set(self._loop.turn(0.05)) & set(ENDING))
            if self._waiting and (is_asked or time.monotonic() > deadline_s):
                self._broken.add(self._waiting[0][0])
                self.flush()

    def _put(self, stream: int, data: bytes, shown: Callable[[], object] | None = None) -> None:
        self._waiting.append((self._fds[stream], memoryview(data), shown))
        self._waiting_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        while self._waiting and (self._waiting[0][0] in self._broken or _takes_more(self._waiting[0][0])):
            fd, data, shown = self._waiting.popleft()
            taken = len(data)
            try:
                if fd not in self._broken:
                    taken = os.write(fd, data[:_PIECE_BYTES])
            except BlockingIOError:
                self._waiting.appendleft((fd, data, shown))
                return
            except OSError:  # closed pipe, vanished terminal, full disk: nobody can be told here
                self._broken.add(fd)
                self._loop.poke(signal.SIGPIPE)
            self._waiting_bytes -= taken
            if taken < len(data):
                self._waiting.appendleft((fd, data[taken:], shown))
            elif shown is not None:
                shown()


def _opened_anew(fd: int) -> int:
    """A terminal by a non-blocking description of our own: who shares the given one would notice the flag."""
    if os.isatty(fd):
        with contextlib.suppress(OSError):  # another user's
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


def _takes_more(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


class RankStream:
    """One of a rank's two streams, from the pipe's end to the screen, and to the rank's log."""

    def __init__(
        self,
        surface: Surface,
        stream: int,
        prefix: bytes,
        is_first: bool,
        tail: ErrorTail | None = None,
        log: BinaryIO | None = None,
    ) -> None:
        self._surface, self.stream, self.prefix = surface, stream, prefix
        self._painted = prefix
        if prefix and surface.has_colour and stream in surface.terminals:
            self._painted = b"\x1b[%dm%b\x1b[0m " % (31 + sum(prefix) % 6, prefix.rstrip())
        # A lone rank has no prefix; only rank 0 of several may leave a line unfinished, and only on a terminal.
        self._is_live = not prefix or (is_first and stream in surface.terminals)
        self._is_first = is_first
        self._previous = b"\n"  # the last byte that was shown: whether a prefix is due
        self._rest = b""  # what follows the last line end or carriage return
        self._state = b""  # what a rank that is not the first has written over in this line, up to there
        self._tail, self._log = tail, log
        self._quiet = Quiet()

    def feed(self, data: bytes) -> None:
        """Take the next bytes the rank wrote."""
        if self._tail is not None:
            self._tail.feed(data, time.monotonic())
        if self._is_live:
            self._surface.show(self.stream, self._tagged(self._quiet(data)), True)
        data = self._rest + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if end:
            self._emit(data[:end])
        self._rest = data[end:]
        if len(self._rest) > _LINE_LIMIT_BYTES:
            self.finish()

    def finish(self) -> None:
        """The rank closed the stream: its last line is complete as it stands."""
        if self._rest or self._state:
            self._emit(self._rest, b"\n")
            self._rest = b""

    def _emit(self, data: bytes, end: bytes = b"") -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk must not stop the training: the lines are on the screen
                self._log.write(data)
        if self._is_live:
            return
        lines = self._quiet(data + end)
        if not self._is_first:
            whole = self._state + lines
            at = whole.rfind(b"\n") + 1
            lines, state = whole[:at], whole[at:]
            self._state = state[state.rstrip(b"\r").rfind(b"\r") + 1 :]
            lines = b"\n".join(line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines.split(b"\n"))
        if lines:
            self._surface.show(self.stream, self._tagged(lines), False)

    def _tagged(self, data: bytes) -> bytes:
        if not self._painted:
            return data
        text = _LINE_START.sub(self._painted, self._previous + data)[1:]
        self._previous = data[-1:]
        return text


def open_channel(surface: Surface, stream: int, prefix: bytes, is_first: bool) -> tuple[int, int]:
    """The (read, write) ends between a rank's stream and the screen: a pipe, or for rank 0 on a terminal a pty."""
    if is_first and stream in surface.terminals:
        with contextlib.suppress(OSError):  # no ptys left, or none in this container
            ours, theirs = os.openpty()
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # the real terminal turns \n into \r\n; twice would be once too often
            modes[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            set_window_size(ours, surface.terminals[stream], len(prefix))
            return ours, theirs
    return os.pipe()


def set_window_size(pty_fd: int, size: bytes, prefix_width: int) -> None:
    """Give a pty the terminal's size less the room the prefix takes."""
    with contextlib.suppress(OSError, struct.error):
        rows, columns, width, height = struct.unpack("HHHH", size)
        fcntl.ioctl(
            pty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, max(columns - prefix_width, 0), width, height)
        )
