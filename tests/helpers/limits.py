"""Limits that the kernel sets to processes of a test."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def memory_group(mib: int) -> Iterator[Path]:
    """A control group whose processes may have so much memory, page cache and all."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (new, "memory.max")
    group = parent / f"deepspeedlite-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(mib << 20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"a memory limit needs a control group for memory, by root: {error}")
    try:
        yield group
    finally:
        for _ in range(100):  # its processes have ended; the kernel may take a moment to see it
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)
