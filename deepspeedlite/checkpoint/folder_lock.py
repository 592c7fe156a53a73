"""That one process at a time writes into a folder of checkpoints.

While a save lasts, its process has the folder locked (`flock` on the folder itself: no file is left that somebody would
have to remove, and the kernel lets go when the process ends, however it ends). Where a file system has no such locks,
as on some NFS mounts, the records that saves leave tell (`runtime.process_record`).
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deepspeedlite import comm
from deepspeedlite.runtime.errors import CheckpointError

_PATIENCE_S = 2.0  # for another process that has locked a folder to say who it is


class _Held:
    """What the engines of this process have locked."""

    def __init__(self) -> None:
        self.threads: dict[tuple[int, int], threading.Lock] = {}  # by folder: engines of one process take turns
        self.open: set[int] = set()  # descriptors that hold locks

    def close(self) -> None:
        """A forked process, such as a loader's worker, holds nothing: it may outlive the one that saves."""
        for fd in self.open:
            os.close(fd)
        self.open.clear()
        self.threads.clear()


_held = _Held()
os.register_at_fork(after_in_child=_held.close)


class FolderLock:
    """The right to write into a folder, from `take` until `end`; its holder loses it when it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Open while this holds the folder: the kernel's lock is on the open file, and goes with the last descriptor of
        # it. -1: none, or one that a fork has closed (see `_Held`).
        self._fd = -1
        # Held along with it: locks of the kernel do not part the threads, and engines, of one process.
        self._thread: threading.Lock | None = None
        self.is_certain = False  # the file system has such locks, so that no other process writes there

    @property
    def is_held(self) -> bool:
        """Whether this has the folder."""
        return self._thread is not None

    def take(self, holder: Callable[[], str | None]) -> None:
        """Wait for this process's other engines, but for no other process.

        Args:
            holder: gives the name of the process that writes there, or None as long as it is not known.

        Raises:
            CheckpointError: another process has the folder.
        """
        about = self._folder.stat()
        thread = _held.threads.setdefault((about.st_dev, about.st_ino), threading.Lock())
        if not thread.acquire(timeout=comm.default_timeout().total_seconds()):
            raise CheckpointError(f"another engine of this process does not end its save into {self._folder}")
        self._thread = thread
        try:
            self._lock(holder)
        except BaseException:
            self.end()
            raise

    def _lock(self, holder: Callable[[], str | None]) -> None:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _held.open.add(self._fd)
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
        if fd in _held.open:
            _held.open.discard(fd)
            os.close(fd)
        thread, self._thread = self._thread, None
        if thread is not None and thread.locked():
            thread.release()


def two_jobs(folder: Path, what: str) -> str:
    """What to say of two jobs that save into one folder."""
    return f"two jobs save into {folder}: {what}; give each job a folder of its own, or end the other one"
