"""The node agent: starts a Job's ranks, watches them, and leaves nothing behind.

Each rank leads its own session, so that its whole tree can be ended. The agent's main thread sleeps until a
signal arrives: a rank's end is SIGCHLD, a person's Ctrl-C is SIGINT, and all come through `SignalQueue` in order. On a
machine that is not the launcher's, a `Link` brings the same orders, and its silence ends the ranks. Output runs in a
thread of its own (output.py), so that a stopped pager cannot delay the end of a failed run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field

from deepspeedlite.launcher import process_tree, protocol
from deepspeedlite.launcher.early import EarlyEnds
from deepspeedlite.launcher.job import Job, RankCommand
from deepspeedlite.launcher.output import Pump, RankLog, RankStream, Screen, open_channel, set_window_size
from deepspeedlite.launcher.report import ErrorTail, Failure, first_failure
from deepspeedlite.launcher.signals import ENDING, PASSED_ON, SignalQueue
from deepspeedlite.runtime.errors import LaunchError

FAILURE_GRACE_S = 2.0  # from SIGTERM to SIGKILL after a rank failed
SIGNAL_GRACE_S = 5.0  # the same after Ctrl-C: a script may be saving
_SETTLE_S = 1.0  # how long a rank that has raised may take to exit before others are ended
_RECENT_S = 5.0  # a traceback older than this belongs to no failure of now
_KILL_S = 1.0  # SIGKILL is repeated this long: a process may be forking
_POLL_S = 0.05  # descendants that are not our children end without telling us


@dataclass
class Outcome:
    """How a job went. `failures` holds the ranks that ended badly on their own."""

    started_s: float
    ended_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    interrupted_by: int | None = None
    left_behind: int = 0
    unkillable: tuple[int | str, ...] = ()  # with their hosts, where there are several

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

    def __init__(self, job: Job, screen: Screen, signals: SignalQueue, link: protocol.Link | None = None) -> None:
        self._job, self._screen, self._signals, self._link = job, screen, signals, link
        self._ranks: list[_Rank] = []
        self._ptys: list[tuple[int, int, int]] = []
        self._streams: list[tuple[int, RankStream]] = []
        self._is_ending = self._is_ordered_to_end = self._is_paused = False
        self._wall_start_s = time.time()
        screen.on_broken = lambda: signals.poke(signal.SIGPIPE)  # end as a program in a shell pipeline would

    def run(self) -> Outcome:
        """Start the ranks and return when every one of them, and all they started, has ended.

        Raises:
            LaunchError: a rank could not be started; those that were are ended first.
        """
        process_tree.become_subreaper()
        self._watchdog = process_tree.Watchdog()
        self._outcome = Outcome(time.monotonic())
        try:
            for command in self._job.ranks:
                self._start(command)
            self._pump = Pump(self._streams)
            self._pump.start()
            self._supervise()
        finally:
            self._outcome.unkillable = tuple(sorted(self._kill_all()))
            self._watchdog.dismiss()
        self._outcome.ended_s = time.monotonic()
        self._flush()
        return self._outcome

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
                stdin=None
                if is_first and self._job.keyboard
                else subprocess.DEVNULL,  # one reader of the keyboard, for pdb in rank 0
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
        log = self._open_log(command.rank)
        rank = _Rank(command, process.pid, process, ErrorTail(), log)
        for sink, (ours, _) in zip(sinks, channels):
            stream = RankStream(self._screen, sink, prefix, is_first)
            stream.log = log
            stream.tail = rank.tail if sink == self._screen.err_fd else None
            self._streams.append((ours, stream))
            if os.isatty(ours):
                self._ptys.append((sink, ours, len(prefix)))
        self._ranks.append(rank)

    def _open_log(self, rank: int) -> RankLog | None:
        if self._job.log_dir is None:
            return None
        clock = time.strftime("%Y%m%d%H%M%S", time.localtime(self._wall_start_s))
        return RankLog(os.path.join(self._job.log_dir, f"{clock}_rank{rank}.log"))

    # Waiting

    def _wait(self, timeout_s: float | None) -> bool:
        """Sleep until something happens, then note it. True if someone asked for the end (again)."""
        if self._link is None:
            select.select([self._signals], [], [], timeout_s)
            numbers = self._signals.take()
        else:
            timeout_s = protocol.BEAT_S if timeout_s is None else min(timeout_s, protocol.BEAT_S)
            link_fd = [] if self._link.closed else [self._link.fileno()]
            select.select([self._signals.fileno(), *link_fd], [], [], timeout_s)
            numbers = self._signals.take() + self._orders(self._link)
        self._reap()
        asked = False
        for number in numbers:
            if number in ENDING:
                asked = True
                if self._outcome.interrupted_by is None and not self._is_ending and not self._is_ordered_to_end:
                    self._outcome.interrupted_by = number
            elif number in PASSED_ON:
                process_tree.send(self._running_pids(), number)
            elif number in (signal.SIGTSTP, signal.SIGCONT):
                self._suspend(number)
            elif number == signal.SIGWINCH:
                for sink, pty, width in self._ptys:
                    set_window_size(pty, self._screen.window_size(sink), width)
        return asked

    def _orders(self, link: protocol.Link) -> bytes:
        """What the launcher has sent, as signals."""
        numbers = []
        for kind, value in link.receive():
            if kind == protocol.BEAT:
                link.send(protocol.BEAT, [time.monotonic(), value])
            elif kind == protocol.SIGNAL:
                numbers.append(int(value))
            elif kind == protocol.END:
                self._is_ordered_to_end = True
            elif kind == protocol.ACK:
                self._screen.acknowledge(value)
        link.flush()
        silent = not self._is_paused and time.monotonic() - link.heard_s > protocol.SILENCE_S
        if (link.closed or silent) and not self._is_ending:
            link.closed = True
            self._screen.acknowledge(None)
            numbers.append(signal.SIGHUP)
        return bytes(numbers)

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

    def _suspend(self, number: int) -> None:
        """Ctrl-Z stops the ranks too, which are in sessions of their own; `fg` wakes all."""
        self._is_paused = number == signal.SIGTSTP
        self._signal_groups(signal.SIGSTOP if self._is_paused else signal.SIGCONT)
        if self._is_paused and self._link is None:
            os.kill(os.getpid(), signal.SIGSTOP)
            self._suspend(signal.SIGCONT)

    # Watching and ending

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.status is None]

    def _running_pids(self) -> list[int]:
        return [rank.pid for rank in self._running()]

    def _supervise(self) -> None:
        early, timeout_s = EarlyEnds("rank", self._outcome.started_s), None
        while self._running():
            self._wait(timeout_s)
            ended = {str(rank.command.rank): rank.ended_s for rank in self._ranks if rank.status == 0}
            running = [str(rank.command.rank) for rank in self._running()]
            timeout_s = 1.0 if early.look(ended, running, time.monotonic()) else None
            failed = any(rank.status for rank in self._ranks)
            if (failed or self._is_ordered_to_end) and self._outcome.interrupted_by is None:
                self._settle()
            if self._outcome.interrupted_by is not None:
                self._end(self._outcome.interrupted_by, SIGNAL_GRACE_S)
                return
            if self._outcome.failures or self._is_ordered_to_end:
                if self._link is not None:  # ending takes seconds; the launcher should know now
                    self._link.send(protocol.FAILED, [asdict(failure) for failure in self._outcome.failures])
                self._end(signal.SIGTERM, FAILURE_GRACE_S)
                return
        self._end_left_behind()

    def _settle(self) -> None:
        """Give the rank that may be the true cause a moment to exit, then note who failed on their own.

        A rank that has raised can take longer to exit than its peers take to notice.
        """
        deadline_s = time.monotonic() + _SETTLE_S
        time.sleep(0.02)  # for the pump to read what the dead rank wrote last
        while self._running() and time.monotonic() < deadline_s and self._outcome.interrupted_by is None:
            failures = self._failed()
            oldest_s = min((failure.exited_s for failure in failures), default=time.monotonic()) - _RECENT_S
            raised = [rank for rank in self._running() if (rank.tail.traceback_s or oldest_s) > oldest_s]
            if not raised and not (failures and all(failure.lost_peer for failure in failures)):
                break
            self._wait(_POLL_S)
        time.sleep(0.02)
        self._wait(0)  # a scheduler that ends everything at once signals us and the ranks: that is no rank's failure
        if self._outcome.interrupted_by is None:
            self._outcome.failures = self._failed()

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

    def _end(self, number: int, grace_s: float) -> None:
        """Ask all ranks to end, and wait at most `grace_s`; being asked once more cuts the wait short."""
        self._is_ending = True
        if number == signal.SIGINT:
            self._signal_groups(number)  # as a terminal does
        else:
            # Workers of a rank that saves on SIGTERM must stay alive until it has saved.
            process_tree.send(self._running_pids(), signal.SIGTERM if number == signal.SIGPIPE else number)
        leaders = {rank.pid for rank in self._ranks}
        if self._link is not None and self._link.closed:
            grace_s = min(grace_s, FAILURE_GRACE_S)  # nobody to wait for
        deadline_s = time.monotonic() + grace_s
        while self._descendants() and time.monotonic() < deadline_s:
            for pid in leaders - set(self._running_pids()):
                leaders.remove(pid)  # the rank has gone before its children: it is their turn
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGTERM)
            if self._wait(_POLL_S):
                return

    def _end_left_behind(self) -> None:
        """After a good end: what the ranks left running in their sessions is ended; what made its own stays."""
        sessions = [rank.pid for rank in self._ranks]
        self._await_sessions(sessions, 0.5)  # helpers of multiprocessing end by themselves
        left = process_tree.in_sessions(sessions)
        self._outcome.left_behind = len(left)
        process_tree.send(left, signal.SIGTERM)
        self._await_sessions(sessions, FAILURE_GRACE_S)

    def _await_sessions(self, sessions: list[int], grace_s: float) -> None:
        deadline_s = time.monotonic() + grace_s
        while process_tree.in_sessions(sessions) and time.monotonic() < deadline_s and not self._wait(_POLL_S):
            pass

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

    def _flush(self) -> None:
        """Show what the ranks wrote to the end. A stopped pager is waited for unless the job is being ended."""
        self._pump.stop()
        is_hurried = self._outcome.interrupted_by is not None
        deadline_s = time.monotonic() + 1.0
        while self._pump.is_alive() and not (is_hurried and time.monotonic() > deadline_s):
            self._pump.join(_POLL_S)
            if self._wait(0):
                return
