"""Commands run as a user of another number, who has no entry in the list of users and no rights of root's.

    subprocess.run([*as_user(4242), sys.executable, ...])    # skips where this is not root, or may not mount

This Python, its environment and the checkout may lie below folders that only root may enter; in a mount namespace of
the command's own they are where that user finds them, and nothing else of such a folder is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT
from programs import program


def as_user(uid: int) -> list[str]:
    """What to write before a command."""
    program("setpriv")
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    script = "\n".join(["set -e", *_mounts(), f'exec setpriv --reuid {uid} --regid {uid} --clear-groups "$@"'])
    return ["unshare", "-m", "sh", "-c", script, "sh"]


@cache
def _mounts() -> tuple[str, ...]:
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT}
    by_closed: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        closed = next((p for p in [*reversed(path.parents), path] if not p.stat().st_mode & 0o001), None)
        if closed is not None:
            by_closed.setdefault(closed, []).append(path)
    if not by_closed:
        return ()
    lines = ["mount -t tmpfs tmpfs /mnt"]
    paths = [path for paths in by_closed.values() for path in paths]
    lines += [f"mkdir /mnt/{i} && mount --bind '{path}' /mnt/{i}" for i, path in enumerate(paths)]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs '{closed}'" for closed in by_closed]
    lines += [f"mkdir -p '{path}' && mount --bind /mnt/{i} '{path}'" for i, path in enumerate(paths)]
    trial = subprocess.run(["unshare", "-m", "sh", "-ec", "\n".join(lines)], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"needs the right to mount: {trial.stderr.strip()}")
    return tuple(lines)
