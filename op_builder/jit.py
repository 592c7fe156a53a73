"""Compiling an op when it is first needed, once per machine.

The library lies in `$TORCH_EXTENSIONS_DIR` (~/.cache/torch_extensions) under a name that holds a hash of all that went
into it: sources, flags, compiler, torch, Python, kind of processor. So environments do not disturb each other, and a
change of any of them compiles anew. A lock of the kernel's, which ends with its holder, makes ranks that start together
compile once; the library appears under its name only when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .spec import OpSpec
from .toolchain import OpBuildError, Toolchain

_logger = logging.getLogger("deepspeedlite")


def csrc() -> Path:
    """The folder of the sources, which lies beside this one in a checkout and in an installed package alike."""
    return Path(__file__).parent.parent / "csrc"


def cache_folder() -> Path:
    """Where compiled ops are kept."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser() / "deepspeedlite"


def built(spec: OpSpec) -> Path:
    """The op's library for this machine and this torch, compiled now if it was not before.

    Raises:
        OpBuildError: there is no compiler, it failed, or the folder cannot be written.
    """
    toolchain = Toolchain.find()
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


def _compile(spec: OpSpec, toolchain: Toolchain, library: Path) -> None:
    started_s = time.monotonic()
    _logger.info("compiling %s, once for this machine", spec.name)
    scratch = library.with_suffix(".tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed: this one holds the lock
    scratch.mkdir()
    try:
        toolchain.build(spec, csrc(), scratch / library.name)
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
    sources = [csrc() / name for name in (*spec.bindings, *spec.kernels)]
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    headers += sorted((csrc() / "common").glob("*.h"))
    digest = hashlib.sha256()
    for file in (*sources, *headers):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    here = Path("/")  # flags, without folders that differ between checkouts
    flags = Toolchain(toolchain.compiler, here).commands(spec, here, here)
    versions = [importlib.metadata.version("torch"), sys.implementation.cache_tag, platform.machine()]
    digest.update(repr([flags, toolchain.identity(), *versions]).encode())
    return digest.hexdigest()[:16]
