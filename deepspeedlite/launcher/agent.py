"""The node agent: starts a Job's ranks, watches them, and leaves nothing behind.

Each rank leads its own session, so that its whole tree can be ended. `Agent.run` is a generator: it yields how long it
would sleep and is resumed when that is over or something has happened, so that the loop that turns it (the launcher's
on one machine, the agent's own elsewhere) can serve others too. Orders come by `signal` and `end`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from deepspeedlite.launcher import process_tree
from deepspeedlite.launcher.job import Job, RankCommand
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.output import RankLog, RankStream, Screen, open_channel, set_window_size
from deepspeedlite.launcher.report import EarlyEnds, ErrorTail, Failure, first_failure
from deepspeedlite.launcher.signals import ENDING, PASSED_ON
from deepspeedlite.runtime.errors import LaunchError

FAILURE_GRACE_S = 2.0  # from SIGTERM to SIGKILL after a rank failed
SIGNAL_GRACE_S = 5.0  # the same after Ctrl-C: a script may be saving
_SETTLE_S = 1.0  # how long a rank that has raised may take to exit before others are ended
_RECENT_S = 5.0  # a traceback older than this belongs to no failure of now
_KILL_S = 1.0  # SIGKILL is repeated this long: a process may be forking
_POLL_S = 0.05  # descendants that are not our children end without telling us
_CHUNK_BYTES = 1 << 16
# After the ranks' end a process they left behind may hold their pipes open, silent or not: stop listening then.
_DRAIN_S = 0.05
_DRAIN_LIMIT_BYTES = 16 << 20

Steps = Generator["float | None", None, None]
Wait = Generator["float | None", None, bool]


@dataclass
class Outcome:
    """How a job went. `failures` holds the ranks that ended badly on their own."""

    started_s: float
    ended_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    interrupted_by: int | None = None
    left_behind: int = 0
    unkillable: tuple[int | str, ...] = ()  # with their hosts, where there are several
    num_ranks: int = 0  # on all machines
    gone: tuple[str, ...] = ()  # machines that were lost

    @property
    def first(self) -> Failure | None:
        """The failure to blame."""
        return first_failure(self.failures) if self.failures else None

    @property
    def exit_status(self) -> int:
        """0, the first failing rank's status, or 128 + the signal that ended the job."""
        if self.interrupted_by is not None:
            return 128 + self.interrupted_by
        return self.first.exit_status if self.first else 0


@dataclass
class _Rank:
    command: RankCommand
    pid: int
    process: subprocess.Popen[bytes]  # kept referenced; the agent reaps by itself
    tail: ErrorTail
    log: RankLog | None
    status: int | None = None  # None: still running
    ended_s: float = 0.0


class Agent:
    """Runs one Job on this machine. Use once."""

    def __init__(self, job: Job, screen: Screen, loop: Loop) -> None:
        self.outcome = Outcome(time.monotonic())
        self._job, self._screen, self._loop = job, screen, loop
        self._ranks: list[_Rank] = []
        self._ptys: list[tuple[int, int, int]] = []  # the screen's stream, our end, the prefix's width
        self._streams: dict[int, RankStream] = {}  # our ends of the ranks' pipes that are still open
        self._is_reading = True  # False while the screen is full: a rank that writes on then waits, as for any pipe
        self._read_s, self._read_bytes = 0.0, 0  # when a rank's output last came, and how much there was of it
        self._is_asked = False  # somebody has asked for the end (again) since the last step
        self._is_ordered_to_end = False  # ranks elsewhere have failed
        self._is_ending = False
        self._signal_grace_s = SIGNAL_GRACE_S
        self._wall_start_s = time.time()

    # Orders

    def signal(self, number: int) -> None:
        """Do with the ranks what this signal asks for."""
        if number in ENDING:
            self._is_asked = True
            if self.outcome.interrupted_by is None and not self._is_ending and not self._is_ordered_to_end:
                self.outcome.interrupted_by = number
        elif number in PASSED_ON:
            process_tree.send(self._running_pids(), number)
        elif number in (signal.SIGTSTP, signal.SIGCONT):  # the ranks are in sessions of their own
            self._signal_groups(signal.SIGSTOP if number == signal.SIGTSTP else number)
        elif number == signal.SIGWINCH:
            for sink, pty, width in self._ptys:
                set_window_size(pty, self._screen.window_size(sink), width)

    def end(self) -> None:
        """End the ranks: others have failed."""
        self._is_ordered_to_end = True

    def lose_launcher(self) -> None:
        """End the ranks, and sooner than otherwise: nobody waits for what they save."""
        if not self._is_ending:
            self._signal_grace_s = FAILURE_GRACE_S
            self.signal(signal.SIGHUP)

    def run(self) -> Steps:
        """Start the ranks and end when every one of them, and all they started, has ended; then `outcome` is whole.

        Raises:
            LaunchError: a rank could not be started; those that were are ended first.
        """
        process_tree.become_subreaper()
        self._watchdog = process_tree.Watchdog()
        try:
            for command in self._job.ranks:
                self._start(command)
            self._screen.start()
            yield from self._supervise()
        finally:
            self.outcome.unkillable = tuple(sorted(self._kill_all()))
            self._watchdog.dismiss()
        self.outcome.ended_s = time.monotonic()
        yield from self._drain()

    # Starting

    def _start(self, command: RankCommand) -> None:
        is_first = command.rank == 0
        prefix = command.prefix.encode()
        sinks = (self._screen.out_fd, self._screen.err_fd)
        channels = [open_channel(self._screen, sink, prefix, is_first) for sink in sinks]
        try:
            process = subprocess.Popen(
                command.argv,
                env={**self._job.environ, **command.env},
                # One reader of the keyboard, for pdb in rank 0.
                stdin=None if is_first and self._job.keyboard else subprocess.DEVNULL,
                stdout=channels[0][1],
                stderr=channels[1][1],
                start_new_session=True,
                preexec_fn=process_tree.die_with(os.getpid(), command.cores),  # safe: no other thread runs yet
            )
        except OSError as error:
            raise LaunchError(f"rank {command.rank}: cannot start {command.argv[0]}: {error.strerror}") from error
        finally:
            for _, theirs in channels:
                os.close(theirs)
        self._watchdog.watch(process.pid)
        rank = _Rank(command, process.pid, process, ErrorTail(), self._open_log(command.rank))
        for sink, (ours, _) in zip(sinks, channels):
            tail = rank.tail if sink == self._screen.err_fd else None
            self._streams[ours] = RankStream(self._screen, sink, prefix, is_first, tail, rank.log)
            os.set_blocking(ours, False)
            self._loop.watch(ours, functools.partial(self._read, ours))
            if os.isatty(ours):
                self._ptys.append((sink, ours, len(prefix)))
        self._ranks.append(rank)

    def _open_log(self, rank: int) -> RankLog | None:
        if self._job.log_dir is None:
            return None
        clock = time.strftime("%Y%m%d%H%M%S", time.localtime(self._wall_start_s))
        return RankLog(os.path.join(self._job.log_dir, f"{clock}_rank{rank}.log"))

    # Reading

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the last holder of a pty's other side has closed it
                raise
            data = b""
        self._read_s, self._read_bytes = time.monotonic(), self._read_bytes + len(data)
        if data:
            self._streams[fd].feed(data)
        else:
            self._close(fd)
        if self._screen.is_full and self._is_reading:
            self._is_reading = False
            for other in self._streams:
                self._loop.forget(other)

    def _close(self, fd: int) -> None:
        self._loop.forget(fd)
        self._ptys = [pty for pty in self._ptys if pty[1] != fd]
        self._streams.pop(fd).finish()
        os.close(fd)

    def _drain(self) -> Steps:
        """Show what the ranks wrote to the end. A stopped pager is waited for unless the job is being ended."""
        self._read_s, limit_bytes = time.monotonic(), self._read_bytes + _DRAIN_LIMIT_BYTES
        late_s = time.monotonic() + (1.0 if self.outcome.interrupted_by is not None else 1e9)
        while self._streams and self._read_bytes < limit_bytes and time.monotonic() < late_s:
            if (yield from self._wait(_DRAIN_S)):
                break
            if self._is_reading and time.monotonic() > self._read_s + _DRAIN_S:
                break
        for fd in list(self._streams):
            self._close(fd)

    # Waiting

    def _wait(self, timeout_s: float | None) -> Wait:
        """Sleep until something happens, then note it. True if someone asked for the end (again)."""
        if not self._is_reading and not self._screen.is_full:
            self._is_reading = True
            for fd in self._streams:
                self._loop.watch(fd, functools.partial(self._read, fd))
        yield timeout_s
        self._reap()
        asked, self._is_asked = self._is_asked, False
        return asked

    def _pause(self, seconds: float) -> Steps:
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            yield from self._wait(left_s)

    def _reap(self) -> None:
        """Collect every child that has ended, adopted orphans included."""
        now_s = time.monotonic()
        by_pid = {rank.pid: rank for rank in self._ranks}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if ended is None:
                return
            rank = by_pid.get(ended.si_pid)
            if rank is not None:
                rank.status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                rank.process.returncode = rank.status
                rank.ended_s = now_s

    # Watching and ending

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.status is None]

    def _running_pids(self) -> list[int]:
        return [rank.pid for rank in self._running()]

    def _supervise(self) -> Steps:
        early, timeout_s = EarlyEnds("rank", self.outcome.started_s), None
        while self._running():
            yield from self._wait(timeout_s)
            ended = {str(rank.command.rank): rank.ended_s for rank in self._ranks if rank.status == 0}
            running = [str(rank.command.rank) for rank in self._running()]
            timeout_s = 1.0 if early.look(ended, running, time.monotonic()) else None
            failed = any(rank.status for rank in self._ranks)
            if (failed or self._is_ordered_to_end) and self.outcome.interrupted_by is None:
                yield from self._settle()
            if self.outcome.interrupted_by is not None:
                yield from self._end(self.outcome.interrupted_by, self._signal_grace_s)
                return
            if self.outcome.failures or self._is_ordered_to_end:
                yield from self._end(signal.SIGTERM, FAILURE_GRACE_S)
                return
        yield from self._end_left_behind()

    def _settle(self) -> Steps:
        """Give the rank that may be the true cause a moment to exit, then note who failed on their own.

        A rank that has raised can take longer to exit than its peers take to notice.
        """
        deadline_s = time.monotonic() + _SETTLE_S
        yield from self._pause(0.02)  # for what the dead rank wrote last
        while self._running() and time.monotonic() < deadline_s and self.outcome.interrupted_by is None:
            failures = self._failed()
            oldest_s = min((failure.exited_s for failure in failures), default=time.monotonic()) - _RECENT_S
            raised = [rank for rank in self._running() if (rank.tail.traceback_s or oldest_s) > oldest_s]
            if not raised and not (failures and all(failure.lost_peer for failure in failures)):
                break
            yield from self._wait(_POLL_S)
        # A scheduler that ends everything at once signals us and the ranks: that is no rank's failure.
        yield from self._pause(0.02)
        if self.outcome.interrupted_by is None:
            self.outcome.failures = self._failed()

    def _failed(self) -> list[Failure]:
        failures = []
        for rank in self._ranks:
            if rank.status:
                seen_s = rank.tail.traceback_s
                recent = seen_s is not None and seen_s > rank.ended_s - _RECENT_S
                failures.append(
                    Failure(
                        rank.command.rank,
                        rank.status,
                        rank.ended_s,
                        seen_s if recent else None,
                        rank.tail.text,
                        rank.log.path if rank.log else None,
                        self._job.host,
                        left=[r.command.rank for r in self._ranks if r.status == 0 and r.ended_s < rank.ended_s],
                    )
                )
        return failures

    def _end(self, number: int, grace_s: float) -> Steps:
        """Ask all ranks to end, and wait at most `grace_s`; being asked once more cuts the wait short."""
        self._is_ending = True
        if number == signal.SIGINT:
            self._signal_groups(number)  # as a terminal does
        else:
            # Workers of a rank that saves on SIGTERM must stay alive until it has saved.
            process_tree.send(self._running_pids(), number)
        leaders = {rank.pid for rank in self._ranks}
        deadline_s = time.monotonic() + grace_s
        while self._descendants() and time.monotonic() < deadline_s:
            for pid in leaders - set(self._running_pids()):
                leaders.remove(pid)  # the rank has gone before its children: it is their turn
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGTERM)
            if (yield from self._wait(_POLL_S)):
                return

    def _end_left_behind(self) -> Steps:
        """After a good end: what the ranks left running in their sessions is ended; what made its own stays."""
        sessions = [rank.pid for rank in self._ranks]
        yield from self._await_sessions(sessions, 0.5)  # helpers of multiprocessing end by themselves
        left = process_tree.in_sessions(sessions)
        self.outcome.left_behind = len(left)
        process_tree.send(left, signal.SIGTERM)
        yield from self._await_sessions(sessions, FAILURE_GRACE_S)

    def _await_sessions(self, sessions: list[int], grace_s: float) -> Steps:
        deadline_s = time.monotonic() + grace_s
        while process_tree.in_sessions(sessions) and time.monotonic() < deadline_s:
            if (yield from self._wait(_POLL_S)):
                return

    def _descendants(self) -> set[int]:
        return process_tree.descendants(os.getpid()) - {self._watchdog.pid}

    def _kill_all(self) -> set[int]:
        """SIGKILL whatever is left, and return what even that does not end (a process stuck in the kernel)."""
        in_order = len(self._ranks) == len(self._job.ranks) and not self._is_ending
        sessions = [rank.pid for rank in self._ranks]
        deadline_s = time.monotonic() + _KILL_S
        while left := process_tree.in_sessions(sessions) if in_order else self._descendants():
            if time.monotonic() > deadline_s:
                break
            process_tree.send(left, signal.SIGKILL)
            time.sleep(0.01)
            self._reap()
        return left

    def _signal_groups(self, number: int) -> None:
        for pid in self._running_pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)
