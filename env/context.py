"""What is sent to the engine: the files that the Dockerfiles copy, as one tar that is the same on every machine.

Owners, times and permissions of the checkout are left out, so that only contents decide whether a step is taken from
the cache. The version, the commit and its time travel as build arguments.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from env.environment import ROOT
from env.errors import ImageError


def pack(dockerfile: str, wheels: Path | None, rewrite: Callable[[str], str] = str) -> IO[bytes]:
    """The context as a tar file; `wheels` is a folder whose wheels go along in place of those in env/wheels.

    `rewrite` makes the Dockerfile that is sent from the one in the checkout.
    """
    from docker.utils.build import exclude_paths

    patterns = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    chosen = sorted(exclude_paths(str(ROOT), patterns, dockerfile=dockerfile))
    if wheels is not None:
        if not wheels.is_dir():
            raise ImageError(f"--wheels {wheels}: there is no such folder")
        chosen = [name for name in chosen if not (name.startswith("env/wheels/") and name.endswith(".whl"))]
    packed = tempfile.TemporaryFile()  # noqa: SIM115  (the caller's to close)
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in chosen:
            if name != dockerfile:
                tar.add(ROOT / name, arcname=name, recursive=False, filter=_alike)
        text = rewrite((ROOT / dockerfile).read_text()).encode()
        entry = tarfile.TarInfo(dockerfile)
        entry.size = len(text)
        tar.addfile(_alike(entry), io.BytesIO(text))
        for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
            tar.add(wheel, arcname=f"env/wheels/{wheel.name}", filter=_alike)
    packed.seek(0)
    return packed


def archive(files: dict[str, tuple[bytes, int]], owner: int) -> bytes:
    """A tar of name -> (contents, permissions) that belong to a user: what goes into a container."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, (contents, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid, entry.gid = len(contents), mode, owner, owner
            tar.addfile(entry, io.BytesIO(contents))
    return packed.getvalue()


def has_torch(wheels: Path | None, spec: str) -> bool:
    """Whether the wheels that go along have that torch, so that no index is needed for it."""
    folder = wheels or ROOT / "env" / "wheels"
    return any(folder.glob(f"torch-{spec.removeprefix('torch==')}-*.whl"))


def version() -> str:
    """The package's."""
    return re.findall(r'__version__ = "(.+)"', (ROOT / "deepspeedlite" / "_version.py").read_text())[0]


def commit() -> tuple[str, str]:
    """The commit, with -dirty where files differ from it, and its time in seconds; without git, neither."""
    name = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return (name or "unknown", _git("log", "-1", "--format=%ct") or "315532800")


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _alike(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
