"""Tag directories: how a checkpoint appears whole or not at all, and how old ones go.

    SAVE_DIR/latest            the newest tag's name; replaced by rename
    SAVE_DIR/TAG/              a whole checkpoint
    SAVE_DIR/.tmp.TAG/         one being written, or removed; a leftover once its process is gone
    SAVE_DIR/.old.TAG/         what TAG was while a save under the same tag takes its place
    SAVE_DIR/zero_to_fp32.py   a copy of the program that takes weights out, as DeepSpeed leaves one

A tag is replaced by two renames. Between them TAG is missing and .old.TAG is whole: readers take that, and the next
save puts it back. Leftovers are removed by the next save into the directory; two jobs must not save into one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.deepspeed_layout import is_deepspeed
from deepspeedlite.checkpoint.manifest import FILE_NAME, Manifest, is_plain_name
from deepspeedlite.checkpoint.tensors import FileRecord, write_tensors
from deepspeedlite.errors import CheckpointError
from deepspeedlite.log import logger
from deepspeedlite.memory.disk import Stored

LATEST = "latest"
_PROGRAM = Path(__file__).with_name("zero_to_fp32.py")
_TMP, _OLD = ".tmp.", ".old."


def check_tag(tag: Any) -> str:
    """The tag as a directory's name; numbers are taken too. `CheckpointError` for what leads elsewhere."""
    name = str(tag)
    if not is_plain_name(name) or name == LATEST:
        raise CheckpointError(f"the checkpoint tag {name!r} cannot be a directory's name: no '/', no leading '.'")
    return name


def find_tag_dir(path: Path) -> Path:
    """`path`, or what a save killed while replacing it has left of it."""
    old = path.with_name(_OLD + path.name)
    return old if not path.exists() and is_whole(old) else path


def is_whole(tag_dir: Path) -> bool:
    """Whether a directory holds a checkpoint, ours or DeepSpeed's."""
    return (tag_dir / FILE_NAME).is_file() or is_deepspeed(tag_dir)


def read_latest(save_dir: Path) -> str | None:
    """The tag that `latest` names; None where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or names what cannot be a tag.
    """
    try:
        return check_tag((save_dir / LATEST).read_text().strip())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{save_dir / LATEST} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{save_dir / LATEST} names no checkpoint: {error}; name a tag") from error


def sync_dir(path: Path) -> None:
    """Flush a directory, so that its entries survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class TagWriter:
    """Writes one checkpoint: any number of processes `write`, one of them calls `prepare` before and `commit` after.

    Args:
        save_dir: where tags are; made if it is missing.
        tag: the checkpoint's name.
        fsync: make it durable. Without, a crash of the machine (not of the process) may lose or damage it.

    Raises:
        CheckpointError: the tag cannot be a directory's name.
    """

    def __init__(self, save_dir: str | Path, tag: Any, fsync: bool = True) -> None:
        self.save_dir, self.tag, self.fsync = Path(save_dir), check_tag(tag), fsync
        self.path = self.save_dir / self.tag
        self.temporary = self.save_dir / (_TMP + self.tag)

    def prepare(self) -> list[str]:
        """Clear what interrupted saves have left and make the temporary directory; the names of the leftovers."""
        missing = [folder for folder in (self.save_dir, *self.save_dir.parents) if not folder.exists()]
        self.save_dir.mkdir(parents=True, exist_ok=True)
        for folder in missing if self.fsync else ():
            sync_dir(folder.parent)
        leftovers = self._clear()
        self.temporary.mkdir()
        return leftovers

    def _clear(self) -> list[str]:
        leftovers = []
        for entry in sorted(self.save_dir.iterdir()):
            if entry.name.startswith(_OLD):
                tag_dir = self.save_dir / entry.name.removeprefix(_OLD)
                if not tag_dir.exists() and is_whole(entry):
                    entry.rename(tag_dir)
                    continue
            elif not entry.name.startswith(_TMP):
                continue
            leftovers.append(entry.name)
            _remove(entry)
        return leftovers

    def write(self, name: str, tensors: Mapping[str, torch.Tensor | Stored]) -> FileRecord:
        """Write one safetensors file; see `tensors.write_tensors`."""
        return write_tensors(self.temporary / name, tensors, self.fsync)

    def commit(self, manifest: Manifest, save_latest: bool = True) -> None:
        """Write the manifest and make the checkpoint, which has all its files, appear under its tag."""
        _write_bytes(self.temporary / FILE_NAME, manifest.to_bytes(), self.fsync)
        if self.fsync:
            sync_dir(self.temporary)
        old = self.save_dir / (_OLD + self.tag)
        if self.path.exists():
            self.path.rename(old)
        self.temporary.rename(self.path)
        self._put(_PROGRAM.name, _PROGRAM.read_bytes(), mode=0o777)
        if self.fsync:
            sync_dir(self.save_dir)
        if save_latest:
            self._put(LATEST, self.tag.encode())
            if self.fsync:
                sync_dir(self.save_dir)
        if old.exists():
            _remove(old)

    def _put(self, name: str, data: bytes, mode: int = 0o666) -> None:
        """Make a file beside the tags have these bytes, old or new ones at any instant."""
        path, temporary = self.save_dir / name, self.save_dir / (_TMP + name)
        if not path.is_file() or path.read_bytes() != data:
            _write_bytes(temporary, data, self.fsync, mode)
            temporary.rename(path)

    def discard(self) -> None:
        """Remove what was written, after a failure, as far as that can be done."""
        with contextlib.suppress(OSError):
            self._clear()

    def remove_older(self, keep_last: int) -> list[str]:
        """Remove all checkpoints but the newest `keep_last` and this one; their names."""
        tags = [path for path in self.save_dir.iterdir() if path.name[0] != "." and (path / FILE_NAME).is_file()]
        tags.sort(key=lambda path: (path / FILE_NAME).stat().st_mtime_ns)
        removed = [path for path in tags[:-keep_last] if path != self.path]
        for path in removed:
            _remove(path, self.save_dir / (_TMP + path.name))  # under that name nobody takes a part of it for whole
        return [path.name for path in removed]


def _remove(path: Path, under_name: Path | None = None) -> None:
    """Remove what no checkpoint needs. What cannot be removed now, such as a file open on NFS, is no reason to fail."""
    try:
        path = path if under_name is None else path.rename(under_name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s cannot be removed: %s; the next save tries again", path, error)


def _write_bytes(path: Path, data: bytes, fsync: bool, mode: int = 0o666) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
