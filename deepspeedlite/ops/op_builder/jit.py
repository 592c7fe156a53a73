"""Compiling an op when it is first needed, once per machine.

The library lies in `$TORCH_EXTENSIONS_DIR` (~/.cache/torch_extensions) under a name that holds a hash of all that went
into it: sources, flags, compiler, torch, Python, kind of processor. So environments do not disturb each other, and a
change of any of them compiles anew. A lock of the kernel's, which ends with its holder, makes ranks that start together
compile once; the library appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.prebuilt import csrc, prebuilt, sources_hash
from deepspeedlite.ops.op_builder.spec import OPS, OpSpec
from deepspeedlite.ops.op_builder.toolchain import Build, Toolchain, build
from deepspeedlite.ops.op_builder.torch_build import find_torch

_logger = logging.getLogger("deepspeedlite")


def cache_folder() -> Path:
    """Where compiled ops are kept."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser() / "deepspeedlite"


def built(spec: OpSpec) -> Path:
    """The op's library for this machine and this torch: the wheel's, or compiled now if it was not before.

    Raises:
        OpBuildError: it has no kernels, there is no compiler, it failed, or the folder cannot be written.
    """
    if spec.pending:
        raise OpBuildError(f"{spec.name}: {spec.pending}")
    if found := prebuilt(spec, find_torch().accelerator):
        return found
    toolchain = Toolchain.find(spec)
    folder = cache_folder()
    library = folder / f"{spec.name}-{_key(spec, toolchain)}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock"), spec):
            if not library.exists():
                _compile(spec, toolchain, library)
    except OSError as error:
        raise OpBuildError(
            f"{spec.name} cannot be compiled into {folder} ({error}); set TORCH_EXTENSIONS_DIR to a folder that can be "
            "written"
        ) from error
    return library


def compiled(spec: OpSpec) -> Path | None:
    """The library that `built` would give without compiling, or None."""
    if spec.pending:
        return None
    try:
        if found := prebuilt(spec, find_torch().accelerator):
            return found
        library = cache_folder() / f"{spec.name}-{_key(spec, Toolchain.find(spec))}.so"
    except OpBuildError:
        return None
    return library if library.exists() else None


def why_not(spec: OpSpec) -> str | None:
    """Why the op cannot be had here, or None. Quick: nothing is compiled and torch is not imported."""
    try:
        if not spec.pending and prebuilt(spec, find_torch().accelerator):
            return None
    except OpBuildError as error:
        return str(error)
    return why_not_compile(spec)


def why_not_compile(spec: OpSpec) -> str | None:
    """Why the op cannot be compiled here, or None."""
    if spec.pending:
        return spec.pending
    try:
        Toolchain.find(spec)
    except OpBuildError as error:
        return str(error)
    return None


class CacheEntry(NamedTuple):
    """A compiled op in the cache, or what a build left there.

    Attributes:
        library: the file, or a build's folder that ends in `.tmp`.
        locked: a process is compiling it.
        stale: nothing here loads it: a killed build's folder, or made of other sources or with another torch, Python
            or compiler than these. (Another environment may still use it.)
    """

    library: Path
    size_bytes: int
    age_s: float
    locked: bool
    stale: bool


def cache_entries() -> list[CacheEntry]:
    """What lies in the cache. Nothing is written."""
    current = set()
    for spec in OPS.values():
        if not spec.pending:
            with suppress(OpBuildError):
                current.add(f"{spec.name}-{_key(spec, Toolchain.find(spec))}.so")
    found = []
    for path in sorted([*cache_folder().glob("*.so"), *cache_folder().glob("*.tmp")]):
        with suppress(FileNotFoundError):  # a build that ends now
            files = [path, *path.rglob("*")]
            size_bytes = sum(file.stat().st_size for file in files if file.is_file())
            locked = _is_locked(path.with_name(path.name.split(".")[0] + ".lock"))
            stale = path.name not in current and not locked
            found.append(CacheEntry(path, size_bytes, time.time() - path.stat().st_mtime, locked, stale))
    return found


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _compile(spec: OpSpec, toolchain: Toolchain, library: Path) -> None:
    started_s = time.monotonic()
    _logger.info("compiling %s, once for this machine", spec.name)
    for left in library.parent.glob(f"{library.stem}.*.tmp"):  # by builds that were killed: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: compilers that outlived a killed build may still write into that one's.
    scratch = Path(tempfile.mkdtemp(".tmp", f"{library.stem}.", library.parent))
    try:
        build([Build(spec, toolchain, scratch / library.name)], csrc(), scratch)
        os.replace(scratch / library.name, library)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _logger.info("compiled %s in %.1f s: %s", spec.name, time.monotonic() - started_s, library)


@contextmanager
def _locked(path: Path, spec: OpSpec) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process that compiles %s (it holds %s)", spec.name, path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(spec: OpSpec, toolchain: Toolchain) -> str:
    """A hash of all that the library depends on."""
    here = Path("/")  # flags, without folders that differ between checkouts
    bare = dataclasses.replace(toolchain, compiler=here, torch=toolchain.torch._replace(home=here))
    flags = [*bare.commands(spec, here, here), bare.link_command(spec, (), here)]
    versions = [sys.implementation.cache_tag, platform.machine()]
    text = repr([sources_hash(spec, csrc()), flags, toolchain.identity(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
