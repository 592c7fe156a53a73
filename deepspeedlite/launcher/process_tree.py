"""Keeps process trees from outliving the launcher, however either of them ends. Linux only.

Three kernel facts are used. A *subreaper* adopts the orphans below it, so that a rank's child which left the
rank's process group is still found. A *parent-death signal* kills a rank the moment the launcher dies. And the
*watchdog*, a forked child that waits on a pipe only the launcher holds, sees that death as end-of-file and kills
the rest of each rank's session: the parent-death signal reaches only the rank itself, not a python below a shell
wrapper or a data-loading worker, which would keep GPU memory. Both are needed: `kill -9` of everything named
deepspeedlite takes the watchdog too.

psutil is imported where processes are first looked for: by then the ranks have started, and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Adopt orphaned descendants of this process from now on."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(launcher_pid: int, cores: Sequence[int] = ()) -> Callable[[], None]:
    """What a rank runs between fork and exec: the kernel then kills it when the launcher dies. It is bound to `cores`.

    The signal is tied to the thread that forked, so ranks must be started from the launcher's main thread.
    """

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if cores:
            os.sched_setaffinity(0, cores)
        if os.getppid() != launcher_pid:  # it died before the line above
            os._exit(128 + signal.SIGKILL)

    return in_child


def _is_live(pid: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):  # it ended while we looked
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def descendants() -> set[int]:
    """Live processes below this one."""
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True) if _is_live(child.pid)}


def in_sessions(sessions: Iterable[int]) -> set[int]:
    """Live processes of these sessions."""
    import psutil

    wanted, found = set(sessions), set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            found |= {pid} if os.getsid(pid) in wanted and _is_live(pid) else set()
    return found


def send(number: int, pids: Iterable[int], groups: bool = False) -> None:
    """Signal each process that still exists, or each process group that these lead."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if groups else os.kill)(pid, number)


class Watchdog:
    """A forked process that outlives the launcher by a moment and kills the sessions it was told of.

    Fork it before any thread starts.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _watch_launcher(read_end)
            finally:
                os._exit(0)
        os.close(read_end)

    def watch(self, session: int) -> None:
        """Kill this session too if the launcher dies."""
        self._tell(f"{session}\n")

    def dismiss(self) -> None:
        """All is ended in order: nothing is left to kill."""
        self._tell("done\n")
        os.close(self._write_end)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # someone killed it; the parent-death signal remains
            os.write(self._write_end, line.encode())


def _watch_launcher(read_end: int) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Whoever reads the launcher's output must see it end with the launcher.
    os.dup2(read_end, 0)
    os.closerange(1, min(os.sysconf("SC_OPEN_MAX"), 65536))
    with open(0, "rb") as told:
        words = told.read().split()
    if b"done" in words:
        return
    sessions = [int(word) for word in words]
    for _ in range(20):  # again and again: a process may be forking while the first kill goes round
        left = in_sessions(sessions)
        if not left:
            return
        send(signal.SIGKILL, left)
        time.sleep(0.02)
