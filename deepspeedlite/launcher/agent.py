"""The node agent: starts a Job's ranks, tells how each of them ends, ends them when told, and leaves nothing behind.

Each rank leads its own session, so that its whole tree can be ended. It is the cluster that decides when all are to
end (cluster.py); on the launcher's own machine it calls the agent, on others a session does (node.py). The agent's
life is a generator: it yields how long it would sleep and is resumed, by `turn`, after every turn of the loop.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from deepspeedlite.launcher import process_tree
from deepspeedlite.launcher.job import Job, RankCommand
from deepspeedlite.launcher.loop import PASSED_ON, Loop
from deepspeedlite.launcher.output import RankStream, Surface, open_channel, set_window_size
from deepspeedlite.launcher.report import CLOSED, ENDED, RAISED, ErrorTail, RankEnd
from deepspeedlite.runtime.errors import LaunchError

FAILURE_GRACE_S = 2.0  # from SIGTERM to SIGKILL after a rank failed
SIGNAL_GRACE_S = 5.0  # the same after Ctrl-C: a script may be saving
RECENT_S = 5.0  # a traceback older than this belongs to no failure of now
_HELPERS_S = 0.5  # helpers of multiprocessing end by themselves within this
_KILL_S = 1.0  # SIGKILL is repeated this long: a process may be forking
_POLL_S = 0.05  # descendants that are not our children end without telling us
_CHUNK_BYTES = 1 << 16
_PIPE_BYTES = 1 << 20  # the most that a pipe holds

Steps = Generator["float | None", None, None]


@dataclass
class _Rank:
    command: RankCommand
    process: subprocess.Popen[bytes]  # kept referenced; the agent reaps by itself
    tail: ErrorTail
    fds: tuple[int, ...]  # our ends of its pipes
    raised_s: float | None = None  # what was told of it
    status: int | None = None  # None: still running


class Agent:
    """Runs one Job on this machine. Use once. The first turn starts the ranks.

    Args:
        tell: hears a kind of event and its value, as JSON has it: see report.py.

    Raises (by `turn`):
        LaunchError: a rank could not be started; those that were are ended first.
    """

    def __init__(self, job: Job, surface: Surface, loop: Loop, tell: Callable[[bytes, Any], None]) -> None:
        self.is_done = False
        self._job, self._surface, self._loop, self._tell = job, surface, loop, tell
        self._ranks: dict[int, _Rank] = {}  # by process id
        self._streams: dict[int, RankStream] = {}  # by our ends of those pipes that are still open
        self._is_reading = True  # False while the screen is full: a rank that writes on then waits, as for any pipe
        self._kill_at_s: float | None = None  # None: nobody has asked for the end
        self._life = self._live()

    # Orders

    def turn(self) -> float | None:
        """Do what is due. Gives how long the loop may sleep; None: until something happens."""
        if not self.is_done:
            try:
                return next(self._life)
            except StopIteration:
                self.is_done = True
        return None

    def signal(self, number: int) -> None:
        """Do with the ranks what this signal asks for; not for those that end them."""
        if number in PASSED_ON:
            process_tree.send(number, self._running())
        elif number in (signal.SIGTSTP, signal.SIGCONT):  # the ranks are in sessions of their own
            process_tree.send(signal.SIGSTOP if number == signal.SIGTSTP else number, self._running(), groups=True)
        elif number == signal.SIGWINCH:
            for fd, stream in self._streams.items():
                if os.isatty(fd):
                    set_window_size(fd, self._surface.terminals[stream.stream], len(stream.prefix))

    def end(self, number: int, grace_s: float) -> None:
        """Ask the ranks to end, and kill them after `grace_s`; of several orders the first asks, and any kills."""
        is_first, kill_at_s = self._kill_at_s is None, time.monotonic() + grace_s
        self._kill_at_s = min(kill_at_s, self._kill_at_s or kill_at_s)
        if is_first:
            # A terminal's Ctrl-C is heard by the whole group. Else workers of a rank that saves must stay until it has.
            process_tree.send(number, self._running(), groups=number == signal.SIGINT)
            process_tree.send(signal.SIGTERM, self._ranks.keys() - self._running(), groups=True)

    def has_answered(self, begin_s: float) -> bool:
        """At once: what has happened was told."""
        return True

    def close(self, status: int) -> None:
        """Kill what an error has left running."""
        self._life.close()

    # Living

    def _live(self) -> Steps:
        process_tree.become_subreaper()
        self._watchdog = process_tree.Watchdog()
        left, left_behind = self._descendants, 0
        try:
            for command in self._job.ranks if self._kill_at_s is None else ():
                self._start(command)
            while self._kill_at_s is None and (self._running() or any(rank.status for rank in self._ranks.values())):
                yield from self._pause(None)
            if self._kill_at_s is None:  # all is well: what ranks left in their sessions goes, what made its own stays
                left = functools.partial(process_tree.in_sessions, self._ranks)
                yield from self._wait(left, _HELPERS_S)
                left_behind = len(left())
                process_tree.send(signal.SIGTERM, left())
            yield from self._wait(left, FAILURE_GRACE_S)
        finally:
            unkillable = self._kill(left)
            self._watchdog.dismiss()
            for fd in list(self._streams):
                self._close(fd)
        self._tell(CLOSED, [left_behind, sorted(unkillable)])

    def _start(self, command: RankCommand) -> None:
        is_first, prefix = command.rank == 0, command.prefix.encode()
        log: BinaryIO | None = None
        channels: list[tuple[int, int]] = []
        try:
            if command.log_path is not None:
                log = open(command.log_path, "wb", buffering=0)  # noqa: SIM115 - its streams hold it
            for stream in (1, 2):
                channels.append(open_channel(self._surface, stream, prefix, is_first))
            process = subprocess.Popen(
                command.argv,
                env={**self._job.environ, **command.env},
                # One reader of the keyboard, for pdb in rank 0.
                stdin=None if is_first and self._job.keyboard else subprocess.DEVNULL,
                stdout=channels[0][1],
                stderr=channels[1][1],
                start_new_session=True,
                preexec_fn=process_tree.die_with(os.getpid(), command.cores),  # safe: there is no other thread
            )
        except OSError as error:
            hint = "; raise `ulimit -n`: each rank takes three here" if error.errno == errno.EMFILE else ""
            raise LaunchError(f"rank {command.rank}: cannot start {command.argv[0]}: {error.strerror}{hint}") from error
        finally:
            for _, theirs in channels:
                os.close(theirs)
        self._watchdog.watch(process.pid)
        rank = _Rank(command, process, ErrorTail(), tuple(ours for ours, _ in channels))
        self._ranks[process.pid] = rank
        for stream, fd in enumerate(rank.fds, 1):
            tail = rank.tail if stream == 2 else None
            self._streams[fd] = RankStream(self._surface, stream, prefix, is_first, tail, log)
            os.set_blocking(fd, False)
            self._loop.watch(fd, functools.partial(self._read, fd))

    def _pause(self, timeout_s: float | None) -> Steps:
        """Let the loop turn, and tell what it has brought."""
        if not self._is_reading and not self._surface.is_full:
            self._is_reading = True
            for fd in self._streams:
                self._loop.watch(fd, functools.partial(self._read, fd))
        yield timeout_s
        self._reap()
        for rank in self._ranks.values():
            if rank.tail.traceback_s != rank.raised_s:
                rank.raised_s = rank.tail.traceback_s
                self._tell(RAISED, [rank.command.rank, rank.raised_s])

    def _running(self) -> list[int]:
        return [pid for pid, rank in self._ranks.items() if rank.status is None]

    # Reading

    def _read(self, fd: int) -> int:
        """Show some of what a rank has written; how many bytes."""
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return 0
        except OSError:  # EIO: the last holder of a pty's other side has closed it
            data = b""
        if data:
            self._streams[fd].feed(data)
        else:
            self._forget(fd)
        if self._surface.is_full and self._is_reading:
            self._is_reading = False
            for other in self._streams:
                self._loop.forget(other)
        return len(data)

    def _read_all(self, fd: int) -> None:
        """Show what its rank has written to the end; another may go on, and is not waited for."""
        left_bytes = _PIPE_BYTES
        while fd in self._streams and left_bytes > 0 and (nbytes := self._read(fd)):
            left_bytes -= nbytes

    def _forget(self, fd: int) -> None:
        self._loop.forget(fd)
        self._streams.pop(fd).finish()
        os.close(fd)

    def _close(self, fd: int) -> None:
        self._read_all(fd)
        if fd in self._streams:
            self._forget(fd)

    # Ending

    def _reap(self) -> None:
        """Collect every child that has ended, adopted orphans included, and tell of ranks."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
                if (rank := self._ranks.get(ended.si_pid)) is None:
                    continue
                rank.status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                rank.process.returncode = rank.status
                for fd in rank.fds:
                    self._read_all(fd)
                now_s, seen_s, command = time.monotonic(), rank.tail.traceback_s, rank.command
                seen_s = seen_s if seen_s is not None and seen_s > now_s - RECENT_S else None
                said = rank.tail.text if rank.status else ""
                self._tell(ENDED, asdict(RankEnd(command.rank, rank.status, now_s, seen_s, said, command.log_path)))
                if self._kill_at_s is not None:  # the rank has gone before its children: it is their turn
                    process_tree.send(signal.SIGTERM, [ended.si_pid], groups=True)

    def _wait(self, left: Callable[[], set[int]], seconds: float) -> Steps:
        """Until nothing is left, or time is over: the order's, if there is one."""
        deadline_s = time.monotonic() + seconds
        while left() and time.monotonic() < (self._kill_at_s or deadline_s):
            yield from self._pause(_POLL_S)

    def _descendants(self) -> set[int]:
        return process_tree.descendants() - {self._watchdog.pid}

    def _kill(self, left: Callable[[], set[int]]) -> set[int]:
        """SIGKILL whatever is left, and return what even that does not end (a process stuck in the kernel)."""
        deadline_s = time.monotonic() + _KILL_S
        while (found := left()) and time.monotonic() < deadline_s:
            process_tree.send(signal.SIGKILL, found)
            time.sleep(0.01)
            self._reap()
        return found
