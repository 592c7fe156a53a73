"""Which process writes into a folder of checkpoints, whether it lives, and that there is one at a time.

While a save lasts, its process has the folder locked (`flock` on the folder itself: no file is left that somebody would
have to remove, and the kernel lets go when the process ends, however it ends). Where a file system has no such locks,
as on some NFS mounts, the records that saves leave tell: `ProcessRecord` says which process it was, and whether it is
alive where that can be known, which is on the machine it runs on.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from deepspeedlite import comm
from deepspeedlite.runtime.errors import CheckpointError

_PATIENCE_S = 2.0  # for another process that has locked a folder to say who it is
_MOST_GENERATIONS = 64  # of parents that are looked at


class ProcessRecord(BaseModel):
    """A process, so that it can be told from any other at any time; empty or 0 where the system does not say."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    host: str
    boot: str  # of the machine: changes when it starts anew
    space: str  # of process numbers: containers have their own
    pid: PositiveInt
    ticks: int  # of the kernel's clock, when the process started
    started: str  # the same for people

    @classmethod
    def here(cls) -> ProcessRecord:
        """This process."""
        pid, ticks = os.getpid(), (_stat(os.getpid()) or (0, 0))[1]
        boot_s = next((float(line.split()[1]) for line in _read("/proc/stat").splitlines() if line[:5] == "btime"), 0.0)
        at = datetime.fromtimestamp(boot_s + ticks / os.sysconf("SC_CLK_TCK"), timezone.utc) if boot_s else None
        return cls(
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id").strip(),
            space=_read("/proc/self/ns/pid"),
            pid=pid,
            ticks=ticks,
            started=f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "at an unknown time",
        )

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where that cannot be known from here."""
        here = ProcessRecord.here()
        if not self.boot or not here.boot:
            return None
        if self.boot != here.boot:
            return False if self.host == here.host else None  # the machine has started anew, or it is another one
        if self.space != here.space:
            return None
        found = _stat(self.pid)
        if found is None and _is_hidden(self.pid):
            return None
        return found is not None and found[1] == self.ticks

    def is_kin(self) -> bool:
        """Whether this process descends from that one, or that one from this."""
        here = ProcessRecord.here()
        if (self.boot, self.space) != (here.boot, here.space):
            return False
        return here.pid in _line(self.pid) or self.pid in _line(here.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def _read(path: str) -> str:
    """A file of the system's, or where a link leads; empty where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return os.readlink(path) if os.path.islink(path) else Path(path).read_text()
    return ""


def _stat(pid: int) -> tuple[int, int] | None:
    """A living process's parent and start; None if it has ended, or there is no /proc."""
    values = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # its name may hold blanks and parentheses
    if len(values) < 20 or values[0] in "ZX":
        return None
    return int(values[1]), int(values[19])


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, of another user, that /proc does not show."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _line(pid: int) -> list[int]:
    """A process, its parent, and so on."""
    line = [pid]
    while len(line) < _MOST_GENERATIONS and (found := _stat(line[-1])) is not None and found[0] > 1:
        line.append(found[0])
    return line


# --- one at a time ------------------------------------------------------------------------------------------------

_THREADS: dict[tuple[int, int], threading.Lock] = {}  # by folder: engines of one process take turns
_OPEN: set[int] = set()  # descriptors that hold locks


def _in_a_child() -> None:
    """A forked process, such as a loader's worker, holds nothing: it may outlive the one that saves."""
    for fd in _OPEN:
        os.close(fd)
    _OPEN.clear()
    _THREADS.clear()


os.register_at_fork(after_in_child=_in_a_child)


class FolderLock:
    """The right to write into a folder, from `take` until `end`; its holder loses it when it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Open while this holds the folder: the kernel's lock is on the open file, and goes with the last descriptor of
        # it. -1: none, or one that a fork has closed (see `_in_a_child`).
        self._fd = -1
        # Held along with it: locks of the kernel do not part the threads, and engines, of one process.
        self._thread: threading.Lock | None = None
        self.is_certain = False  # the file system has such locks, so that no other process writes there

    @property
    def is_held(self) -> bool:
        """Whether this has the folder."""
        return self._thread is not None

    def take(self, holder: Any) -> None:
        """Wait for this process's other engines, but for no other process.

        Args:
            holder: gives the name of the process that writes there, or None as long as it is not known.

        Raises:
            CheckpointError: another process has the folder.
        """
        about = self._folder.stat()
        thread = _THREADS.setdefault((about.st_dev, about.st_ino), threading.Lock())
        if not thread.acquire(timeout=comm.default_timeout().total_seconds()):
            raise CheckpointError(f"another engine of this process does not end its save into {self._folder}")
        self._thread = thread
        try:
            self._lock(holder)
        except BaseException:
            self.end()
            raise

    def _lock(self, holder: Any) -> None:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _OPEN.add(self._fd)
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_certain = True
                return
            except BlockingIOError:
                name = holder()
                if name is not None or time.monotonic() > until_s:
                    raise CheckpointError(two_jobs(self._folder, f"{name or 'a process'} is saving into it")) from None
                time.sleep(0.02)
            except OSError:  # no locks there
                return

    def end(self) -> None:
        """Let others write there."""
        fd, self._fd = self._fd, -1
        if fd in _OPEN:
            _OPEN.discard(fd)
            os.close(fd)
        thread, self._thread = self._thread, None
        if thread is not None and thread.locked():
            thread.release()


def two_jobs(folder: Path, what: str) -> str:
    """What to say of two jobs that save into one folder."""
    return f"two jobs save into {folder}: {what}; give each job a folder of its own, or end the other one"
