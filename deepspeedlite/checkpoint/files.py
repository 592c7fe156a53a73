"""Files and folders as users and others leave them: opened only where they are what they should be.

A FIFO blocks whoever opens it, a device may do anything, a link may lead in circles. So nothing of a checkpoint is
opened but regular files, and nothing is read that is larger than it can rightly be.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Strict

from deepspeedlite.runtime.errors import CheckpointError

_MOST_VALUES = 20_000_000  # of a JSON text: far more than a model of half a million parameters needs
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


def check_folder(path: Any, call: str) -> Path:
    """The folder that a user names; `call` is what it was passed to.

    Raises:
        CheckpointError: it is no path, or cannot be a folder.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise CheckpointError(
            f"{call}: the folder is {path!r}, a {type(path).__name__}; pass its path, as text or a pathlib.Path"
        ) from None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise CheckpointError(f"{call}: the folder is {text!r}, which names none; pass its path ('.' is this one)")
    folder = Path(text)
    if text[0] == "~" and not os.path.lexists(folder.parts[0]):
        raise CheckpointError(f"{call}: nothing expands the ~ of {text!r}; pass os.path.expanduser({text!r})")
    try:
        nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not stat.S_ISDIR(nearest.stat().st_mode):
            raise CheckpointError(f"{call}: {nearest} is a file and no folder; name another")
    except OSError as error:
        raise CheckpointError(f"{call}: {folder} is no folder: {error.strerror}") from error
    return folder


def is_plain_name(name: Any) -> bool:
    """Whether `name` is one that stays inside its directory and is no leftover's."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0") and name[0] != "."


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"the file name {name!r} leads outside the checkpoint")
    return name


PlainName = Annotated[str, Strict(), AfterValidator(_plain)]  # of a field that pydantic validates


def kind_of(path: Path) -> str:
    """What lies there, links not followed: "a folder", "a FIFO", "a link"; "a file" for a regular one, "" for none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return ""
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file; links to one are followed.

    Raises:
        CheckpointError: it is anything else.
        OSError: it cannot be opened.
    """
    _check_regular(path, os.stat(path))  # before opening, which a device may take for more than that
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise CheckpointError(f"{path} is {_KINDS.get(stat.S_IFMT(about.st_mode), 'no file')}, where a file should be")


def read_regular(path: Path, most_nbytes: int) -> bytes:
    """A regular file's content; raises as `open_regular`, and where it is larger than `most_nbytes`."""
    with open(open_regular(path), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > most_nbytes:
            raise CheckpointError(f"{path} is {nbytes} bytes, which none of its kind is")
        return file.read(nbytes)


def edge_of(path: Path, nbytes: int, at_end: bool = False) -> bytes | None:
    """The first or last bytes of a regular file; None where there is no such file."""
    try:
        with open(open_regular(path), "rb") as file:
            if at_end:
                file.seek(max(0, os.fstat(file.fileno()).st_size - nbytes))
            return file.read(nbytes)
    except (OSError, CheckpointError):
        return None


def parse_json(raw: bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it says nothing, or holds more values than any checkpoint has, in which case none was made.
    """
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > _MOST_VALUES:
        raise ValueError(f"it has about {count:,} values, which no checkpoint has")
    return json.loads(raw)


def write_bytes(path: Path, data: bytes, fsync: bool, mode: int = 0o666) -> None:
    """Write a file."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        if fsync:
            os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Flush a directory, so that its entries survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
