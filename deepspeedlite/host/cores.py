"""How many processors this process may keep busy: its affinity, and the CPU quota of its control groups (v1 and v2)."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """The lesser of the processors it may run on and those that its quota pays for, at least 1."""
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), cpu_quota(root) or math.inf)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many processors' time the strictest control group around this process allows; None: no limit.

    Its path in /proc is the host's where the container shares the host's namespace of control groups: then it is not
    below what is mounted here, whose top is the container's own group.
    """
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, place = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for mount in ("", "unified") if number == "0" else ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
            top = root / "sys/fs/cgroup" / mount
            for folder in (PurePosixPath(place), *PurePosixPath(place).parents):
                quotas.append(_quota_of(top / folder.relative_to("/")))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    words = words or [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    with contextlib.suppress(ValueError, IndexError, ZeroDivisionError):  # "max", -1: no limit
        return int(words[0]) / int(words[1]) if int(words[0]) > 0 else None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
