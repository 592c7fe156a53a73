"""Who compiles a library, and who waits for that: a lock of the kernel's, which ends with its holder.

The holder writes into the lock's file who it is, and touches the file twice a second if its compilers have used the
processor. One that stops doing so (stopped, frozen with its node on a shared disk, a compiler that hangs), or that
compiles for longer than anything takes, is not waited for any longer.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_logger = logging.getLogger("deepspeedlite")
_BEAT_S = 0.5
_SILENCE_S = 20.0  # without a beat, before the holder is given up
_LONGEST_S = 1200.0  # of waiting for one holder: kernels for many GPUs on few processors
# Of a process, as ProcessRecord.state says them.
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "": "ended", None: "not seen here"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def build_lock(path: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a library; waits while another compiles `name`.

    Yields:
        Whether it is held, or this file system has no locks: go on. Else the holder makes no progress, which was said.

    Raises:
        OSError: the lock's file cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if not _acquire(descriptor, path, name):
            yield False
            return
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(descriptor, done), name="op build", daemon=True)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{time.time():.0f} {_here()}\n".encode(), 0)
        beat.start()
        try:
            yield True
        finally:
            done.set()
            beat.join()
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody compiles the library of this lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _acquire(descriptor: int, path: Path, name: str) -> bool:
    started_s = heard_s = time.monotonic()
    told, last = False, None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:  # then each compiles, and the last one's file stays
                return True
            raise
        if not told:
            told = True
            _logger.info("waiting for another process that compiles %s (it holds %s)", name, path)
        now_s, at = time.monotonic(), os.fstat(descriptor).st_mtime_ns
        if at != last:
            last, heard_s = at, now_s
        silent_s, waited_s = now_s - heard_s, now_s - started_s
        if silent_s > _SILENCE_S or waited_s > _LONGEST_S:
            why = f"has shown no sign of life for {silent_s:.0f} s" if silent_s > _SILENCE_S else "is not done"
            _logger.warning(
                "not waiting for %s any longer: %s, which compiles it, %s; it is compiled beside",
                name,
                _holder(path),
                why,
            )
            return False
        time.sleep(0.05)


def _beat(descriptor: int, done: threading.Event) -> None:
    before: dict[str, str] = {}
    while not done.wait(_BEAT_S):
        now = _work(os.getpid())
        if now != before or not now:  # without /proc nothing is known but that this thread runs
            with suppress(OSError):  # a disk that is full or gone is told of by the compilers
                os.utime(descriptor)
        before = now


def _work(pid: int) -> dict[str, str]:
    """The processor time that each descendant of a process has used, in the kernel's ticks."""
    found = {}
    for threads_children in glob.glob(f"/proc/{pid}/task/*/children"):
        with suppress(OSError):  # of processes that end now
            for child in Path(threads_children).read_text().split():
                found[child] = " ".join(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13])
                found |= _work(int(child))
    return found


def _here() -> str:
    # Whoever builds a wheel imports this module too, and pydantic is not there then.
    from deepspeedlite.runtime.process_record import ProcessRecord

    return ProcessRecord.here().model_dump_json()


def _holder(path: Path) -> str:
    """Who holds a lock, for how long, and in which state."""
    from deepspeedlite.runtime.process_record import ProcessRecord

    try:
        since, _, record = path.read_text().partition(" ")
        age_s, holder = time.time() - int(since), ProcessRecord.model_validate_json(record)
    except (OSError, ValueError):
        return "a process that has not said which it is"
    states = {
        "T": "stopped",
        "t": "stopped by a debugger",
        "D": "waiting for a disk",
        "": "ended",
        None: "not seen here",
    }
    return f"{holder} ({states.get(holder.state(), 'alive')}, compiling for {age_s:.0f} s)"
