"""Compiling an op when it is first needed, once per machine.

The library lies in one of the folders of `folders.py` under a name that holds a hash of all that went into it: sources,
flags, compiler, torch, Python, kind of processor. So environments do not disturb each other, and a change of any of
them compiles anew. Ranks that start together compile once (`build_lock`); the library appears under its name only when
it is complete, and is believed only with its checksum (`library_file`).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.host.text import size_text
from deepspeedlite.ops.op_builder.build_lock import build_lock, is_locked
from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.folders import CHOOSE, detour, distrust, places, writable_folder
from deepspeedlite.ops.op_builder.library_file import NO_SUM, cut_off, damage, write_sum
from deepspeedlite.ops.op_builder.prebuilt import csrc, prebuilt, sources_hash
from deepspeedlite.ops.op_builder.spec import OPS, OpSpec
from deepspeedlite.ops.op_builder.toolchain import Build, Toolchain, build
from deepspeedlite.ops.op_builder.torch_build import find_torch

_logger = logging.getLogger("deepspeedlite")
_MOST_BESIDE = 4  # builders that hang, before nobody tries any longer
LEAST_BYTES = 16 << 20  # of room, for the object files and what compilers put aside meanwhile


def built(spec: OpSpec) -> Path:
    """The op's library for this machine and this torch: the wheel's, or compiled now if it was not before.

    Raises:
        OpBuildError: there is no compiler, it failed, there is no room, no folder can be written, or
            the wheel's library is damaged.
    """
    if found := _installed(spec):
        return found
    toolchain = Toolchain.find(spec)
    stem = f"{spec.name}-{_key(spec, toolchain)}"
    if not (library := _cached(stem)):
        toolchain.check()
        library = _compiled_now(spec, toolchain, stem)
    if reason := detour(library.parent):
        _say_detour(reason, library.parent)
    return library


def _installed(spec: OpSpec) -> Path | None:
    library = prebuilt(spec, find_torch().accelerator)
    if library is not None and (wrong := cut_off(library)):
        raise OpBuildError(
            f"{library}, which was installed, {wrong}", "reinstall it: pip install --force-reinstall deepspeedlite"
        )
    return library


def _cached(stem: str) -> Path | None:
    """The library of that name in the cache, if it is as it was written and only this user or root can have done it."""
    for place in places():
        if place.doubt:
            continue
        for library in _names(place.folder, stem):
            if os.path.exists(library) and not distrust(library) and not damage(library):
                return library
    return None


def _names(folder: Path, stem: str) -> list[Path]:
    """What a library may be called: with a number, where it was compiled beside a process that made no progress."""
    return [folder / f"{stem}{f'-{n}' if n else ''}.so" for n in range(_MOST_BESIDE)]


@cache
def _say_detour(reason: str, folder: Path) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _logger.warning("%s: compiled ops are kept in %s; %s", reason, folder, CHOOSE)


def _compiled_now(spec: OpSpec, toolchain: Toolchain, stem: str) -> Path:
    try:
        folder = writable_folder()
        for library in _names(folder, stem):
            with build_lock(library.with_suffix(".lock"), spec.name) as held:
                if held:
                    _compile_if_wrong(spec, toolchain, library)
                    return library
    except OSError as error:
        where = error.filename or "the folder of compiled ops"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OpBuildError(f"{spec.name} cannot be compiled: there is no room for {where}", CHOOSE) from error
        raise OpBuildError(f"{spec.name} cannot be compiled into {where} ({error})", CHOOSE) from error
    raise OpBuildError(f"{spec.name}: {_MOST_BESIDE} processes that compile it into {folder} make no progress", CHOOSE)


def _compile_if_wrong(spec: OpSpec, toolchain: Toolchain, library: Path) -> None:
    """Unless another process has done it while this one waited."""
    if os.path.lexists(library):
        wrong = distrust(library) or damage(library)
        if not wrong:
            return
        level = logging.INFO if wrong == NO_SUM else logging.WARNING
        _logger.log(level, "%s %s; it is compiled again", library, wrong)
    _compile(spec, toolchain, library)


def compiled(spec: OpSpec) -> Path | None:
    """The library that `built` would give without compiling, or None."""
    try:
        return _installed(spec) or _cached(f"{spec.name}-{_key(spec, Toolchain.find(spec))}")
    except OpBuildError:
        return None


def why_not(spec: OpSpec) -> OpBuildError | None:
    """Why the op cannot be had here, or None. Quick: nothing of it is compiled and torch is not imported."""
    try:
        if _installed(spec):
            return None
    except OpBuildError as error:
        return error
    return why_not_compile(spec)


def why_not_compile(spec: OpSpec) -> OpBuildError | None:
    """Why the op cannot be compiled here, or None."""
    try:
        Toolchain.find(spec).check()
    except OpBuildError as error:
        return error
    return None


class CacheEntry(NamedTuple):
    """A compiled op in the cache, or what a build left there.

    Attributes:
        library: the file, or a build's folder that ends in `.tmp`.
        locked: a process is compiling it.
        stale: nothing here loads it: a killed build's folder, or made of other sources or with another torch, Python
            or compiler than these. (Another environment may still use it.)
        wrong: why it is compiled again when it is needed: it is damaged, or others could have written it.
    """

    library: Path
    size_bytes: int
    age_s: float
    locked: bool
    stale: bool
    wrong: str


def cache_entries() -> list[CacheEntry]:
    """What lies in the cache. Nothing is written."""
    current = set()
    for spec in OPS.values():
        with suppress(OpBuildError):
            current |= {path.name for path in _names(Path(), f"{spec.name}-{_key(spec, Toolchain.find(spec))}")}
    found = []
    for place in places():
        if not os.path.isdir(place.folder):  # or not to be entered
            continue
        for path in sorted([*place.folder.glob("*.so"), *place.folder.glob("*.tmp")]):
            with suppress(OSError):  # a build that ends now, a folder of somebody else's
                files = [path, *path.rglob("*")]
                size_bytes = sum(file.stat().st_size for file in files if file.is_file())
                locked = is_locked(path.with_name(path.name.split(".")[0] + ".lock"))
                stale = path.name not in current and not locked
                wrong = "" if path.suffix == ".tmp" or locked else place.doubt or distrust(path) or damage(path)
                age_s = time.time() - path.stat().st_mtime
                found.append(CacheEntry(path, size_bytes, age_s, locked, stale, wrong))
    return found


def _compile(spec: OpSpec, toolchain: Toolchain, library: Path) -> None:
    started_s, folder = time.monotonic(), library.parent
    _logger.info("compiling %s, once for this machine", spec.name)
    for left in folder.glob(f"{library.stem}.*.tmp"):  # by builds that were killed: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    if (free_bytes := shutil.disk_usage(folder).free) < LEAST_BYTES:
        told = f"{size_text(free_bytes)} free in {folder}, and compiling {spec.name} takes {size_text(LEAST_BYTES)}"
        raise OpBuildError(told, f"make room there, or {CHOOSE}")
    # A name of its own: compilers that outlived a killed build may still write into that one's.
    scratch = Path(tempfile.mkdtemp(".tmp", f"{library.stem}.", folder))
    try:
        made = scratch / library.name
        build([Build(spec, toolchain, made)], csrc(), scratch)
        made.chmod(0o755)  # whatever the umask: nothing is loaded that others can write
        write_sum(made)
        os.replace(made, library)
        os.replace(made.with_suffix(".sum"), library.with_suffix(".sum"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if wrong := damage(library):
        raise OpBuildError(f"{library} {wrong}, just after it was written: its disk is not to be trusted", CHOOSE)
    _logger.info("compiled %s in %.1f s: %s", spec.name, time.monotonic() - started_s, library)


def _key(spec: OpSpec, toolchain: Toolchain) -> str:
    """A hash of all that the library depends on."""
    here = Path("/")  # flags, without folders that differ between checkouts
    bare = dataclasses.replace(toolchain, compiler=here, wrapper=(), torch=toolchain.torch._replace(home=here))
    flags = [*bare.commands(spec, here, here), bare.link_command(spec, (), here)]
    versions = [sys.implementation.cache_tag, platform.machine()]
    text = repr([sources_hash(spec, csrc()), flags, toolchain.identity(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
