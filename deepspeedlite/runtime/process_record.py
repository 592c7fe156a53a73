"""Which process it was: a record by which it can be found, and told from any other, wherever that can be known."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt

_MOST_GENERATIONS = 64  # of parents that are looked at


class ProcessRecord(BaseModel):
    """A process, so that it can be told from any other at any time; empty or 0 where the system does not say."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)

    host: str
    boot: str  # of the machine: changes when it starts anew
    space: str  # of process numbers: containers have their own
    pid: PositiveInt
    ticks: int  # of the kernel's clock, when the process started
    started: str  # the same for people

    @classmethod
    def here(cls) -> ProcessRecord:
        """This process."""
        pid, found = os.getpid(), _stat(os.getpid())
        ticks = found.ticks if found is not None else 0
        boot_s = next((float(line.split()[1]) for line in _read("/proc/stat").splitlines() if line[:5] == "btime"), 0.0)
        at = datetime.fromtimestamp(boot_s + ticks / os.sysconf("SC_CLK_TCK"), timezone.utc) if boot_s else None
        boot, space = _home()
        return cls(
            host=socket.gethostname(),
            boot=boot,
            space=space,
            pid=pid,
            ticks=ticks,
            started=f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "at an unknown time",
        )

    @property
    def is_near(self) -> bool:
        """Whether it runs, or has run, where this process can see it."""
        return bool(self.boot) and (self.boot, self.space) == _home()

    def state(self) -> str | None:
        """One letter, as Linux's proc(5) has it: "T" is stopped; empty: it has ended; None: it cannot be known here."""
        boot, _ = _home()
        if self.boot and boot and self.boot != boot and self.host == socket.gethostname():
            return ""  # the machine has started anew
        if not self.is_near:
            return None
        found = _stat(self.pid)
        if found is None and _is_hidden(self.pid):
            return None
        return found.state if found is not None and found.ticks == self.ticks else ""

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where that cannot be known from here."""
        state = self.state()
        return None if state is None else state != ""

    def is_kin(self) -> bool:
        """Whether this process descends from that one, or that one from this."""
        return self.is_near and (os.getpid() in _line(self.pid) or self.pid in _line(os.getpid()))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def _read(path: str) -> str:
    """A file of the system's, or where a link leads; empty where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return os.readlink(path) if os.path.islink(path) else Path(path).read_text()
    return ""


@cache
def _home() -> tuple[str, str]:
    """The running system and its space of process numbers, in which they mean something; empty if it does not say."""
    return _read("/proc/sys/kernel/random/boot_id").strip(), _read("/proc/self/ns/pid")


class _Stat(NamedTuple):
    """Of proc(5)."""

    state: str
    parent: int
    ticks: int


def _stat(pid: int) -> _Stat | None:
    """What is said of a living process; None if it has ended, or there is no /proc."""
    values = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # its name may hold blanks and parentheses
    if len(values) < 20 or values[0] in "ZX":
        return None
    return _Stat(values[0], int(values[1]), int(values[19]))


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
    while len(line) < _MOST_GENERATIONS and (found := _stat(line[-1])) is not None and found.parent > 1:
        line.append(found.parent)
    return line
