"""How a checkpoint appears whole or not at all, how old ones go, and that nothing else does.

A save works in a folder of its own beside the tags, `SAVE_DIR/.tmp.TAG.NUMBER`:

    owner.json          which process this is, the files it writes, and those that it moves into an existing folder
    new/                the tag's files
    next.NAME           what is about to become the file NAME, by rename
    retired.N.json      the manifest of a checkpoint that is being removed

A tag that is not there yet appears by one rename, of `new`. Into a folder that is there already, because the tag is
saved again or because it has files of the user's, the new files move one by one under names that are not taken; then
the manifest takes the old one's place by rename, and what the old one listed goes. So what is whole before is whole
until that rename, what is whole after it is the new one, and no other file is ever touched.

Removed is what a manifest of ours lists, or a save's `owner.json`, and folders that are empty then. What a save
that was killed has left, the next one removes, once the process that left it is known to have ended.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.files import check_folder, is_plain_name, kind_of, read_regular, sync_dir, write_bytes
from deepspeedlite.checkpoint.folder_lock import FolderLock, two_jobs
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.manifest import FILE_NAME, Manifest
from deepspeedlite.checkpoint.staging import OWNER, TMP, SaveRecord, is_staging, stagings
from deepspeedlite.checkpoint.tag import (
    LATEST,
    OLD,
    check_new_tag,
    find_tag_dir,
    in_words,
    is_ours,
    manifest_of,
    read_latest,
    saver_of,
)
from deepspeedlite.checkpoint.tensors import FileRecord, write_tensors
from deepspeedlite.offload.swap_file import DiskTensor
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import log_once, logger
from deepspeedlite.runtime.process_record import ProcessRecord

_NEW, _RETIRED, _NEXT = "new", "retired.", "next."
_SINCE_S = time.time()  # nearly when this process started


def survey(save_dir: Path, tag: str, formats: Formats) -> str:
    """Look whether a checkpoint can be saved, before anything is written.

    Returns:
        what to put into the new files' names, so that they are not among those in the tag's folder.

    Raises:
        CheckpointError: something that is not ours is in the way, or another job saves there.
    """
    check_folder(save_dir, "saving")
    _check_latest(save_dir / LATEST, formats)
    path = save_dir / tag
    kind = kind_of(path)
    if kind not in ("", "a folder"):
        raise CheckpointError(f"{path} is {kind} that is not ours, where the checkpoint's folder should be; move it")
    names = os.listdir(path) if kind else []
    if FILE_NAME in names and not is_ours(path) and not _is_blank(path / FILE_NAME):
        raise CheckpointError(
            f"{path / FILE_NAME} is not a checkpoint's, and is in the way of one; save under another tag, or move it"
        )
    if FILE_NAME not in names and (foreign := formats.of(path)) is not None:
        raise CheckpointError(
            f"{path} is a checkpoint of {foreign.program}'s, and stays; save under another tag, or move it"
        )
    if names and not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} may not be written to (PermissionError)")
    _check_alone(save_dir, [tag])
    is_taken = bool(names) or find_tag_dir(path) != path
    return f".{secrets.token_hex(4)}" if is_taken else ""


def _check_latest(path: Path, formats: Formats) -> None:
    kind = kind_of(path)
    if kind not in ("", "a file"):
        raise CheckpointError(f"{path} is {kind} that is not ours, where the newest tag's name should be; move it")
    if kind and not _is_blank(path):
        try:
            check_new_tag(read_latest(path.parent), formats)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is not ours, and is in the way: move it ({error})") from error


def _is_blank(path: Path) -> bool:
    """Whether a file holds nothing, as after a crash of the machine."""
    try:
        return not read_regular(path, 4096).strip(b"\0 \n")
    except (OSError, CheckpointError):
        return False


def _check_alone(save_dir: Path, tags: list[str]) -> None:
    """Raise where a living process saves into the folder, or has since this one started; warn where it only may."""
    here = ProcessRecord.here()
    for staging, save in stagings(save_dir):
        if save is None or save.owner == here or (alive := save.owner.is_alive()) is False:
            continue
        what = f"{save.owner} is saving {save.tag}"
        if alive:
            raise CheckpointError(two_jobs(save_dir, what))
        log_once(
            f"{what} in {save_dir}, or has been killed: that cannot be seen from {here.host}, and it may be another "
            f"job; if it has ended, remove {staging.name}",
            logging.WARNING,
        )
    with suppress(CheckpointError):
        tags = [*tags, *filter(None, [read_latest(save_dir)])]
    for tag in tags:
        saver = saver_of(save_dir / tag)
        if saver is None or saver == here or (alive := saver.is_alive()) is False or saver.is_kin():
            continue
        is_newer = (save_dir / tag / FILE_NAME).stat().st_mtime > _SINCE_S
        when = "and still runs" if alive else f"while this one runs on {here.host}"
        what = two_jobs(save_dir, f"{saver} has saved {tag} {when}")
        if alive and is_newer:
            raise CheckpointError(what)
        if alive or is_newer:  # an idle notebook, perhaps, whose work goes on here: no reason to lose this job's
            log_once(what, logging.WARNING)


class TagWriter:
    """Writes one checkpoint: any number of processes `write`, one of them calls `prepare` before and `commit` after.

    That one has the folder to itself from `prepare` until `commit` or `discard` ends.

    Args:
        save_dir: where tags are; made if it is missing.
        tag: the checkpoint's name.
        fsync: make it durable. Without, a crash of the machine (not of the process) may lose or damage it.
        number: of the save, the same for all its processes and no other's: 16 hexadecimal digits.
        formats: whose checkpoints stay, and what is left beside the tag.

    Raises:
        CheckpointError: the tag cannot be a directory's name, the folder cannot be one.
    """

    def __init__(
        self, save_dir: str | Path, tag: Any, fsync: bool = True, number: str = "", formats: Formats | None = None
    ) -> None:
        self._formats = formats or Formats()
        self.save_dir, self.tag = check_folder(save_dir, "saving"), check_new_tag(tag, self._formats)
        self.fsync = fsync
        self.path = self.save_dir / self.tag
        # All processes of a save write into one folder, which its number tells from those of saves that were killed.
        self._staging = self.save_dir / f"{TMP}{self.tag}.{number or secrets.token_hex(8)}"
        self._new = self._staging / _NEW
        self._lock = FolderLock(self.save_dir)
        # What `owner.json` says, so that whoever finds the folder knows what may go: see `_note`.
        self._record = SaveRecord(owner=ProcessRecord.here(), tag=self.tag)

    def prepare(self, files: Iterable[str] = (), save_latest: bool = True) -> list[str]:
        """Clear what interrupted saves have left, and make the staging folder for `files`; the leftovers' names."""
        missing = [folder for folder in (self.save_dir, *self.save_dir.parents) if not folder.exists()]
        self.save_dir.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            self._sync(folder.parent)
        self._lock.take(self._holder)
        survey(self.save_dir, self.tag, self._formats)
        leftovers = self._sweep()
        self._staging.mkdir()
        self._note(files=list(files), is_latest=save_latest)
        if not self._lock.is_certain:  # now that whoever comes at the same time sees this one
            _check_alone(self.save_dir, [self.tag])
        self._new.mkdir()
        return leftovers

    def write(self, name: str, tensors: Mapping[str, torch.Tensor | DiskTensor]) -> FileRecord:
        """Write one safetensors file; see `tensors.write_tensors`."""
        return write_tensors(self._new / name, tensors, self.fsync)

    def commit(self, manifest: Manifest, keep_last: int | None = None) -> None:
        """Make the checkpoint, which has all its files, appear under its tag; then remove all but the newest."""
        manifest.state["saved_by"] = self._record.owner.model_dump()  # the last one: `tag.saver_of` looks for it there
        write_bytes(self._new / FILE_NAME, manifest.to_bytes(), self.fsync)
        self._sync(self._new)
        take_back = self._appear(manifest)
        try:
            self._name()
        except OSError:
            with suppress(OSError, CheckpointError):
                if not self._record.is_latest or read_latest(self.save_dir) != self.tag:
                    take_back()
            raise
        if keep_last:
            self._remove_older(keep_last)
        self.discard()

    def _name(self) -> None:
        if (companion := self._formats.companion) is not None:
            self._put(companion.name, companion.read_bytes(), mode=0o777)
        self._sync(self.save_dir)
        if self._record.is_latest:
            self._put(LATEST, self.tag.encode())
            self._sync(self.save_dir)

    def _appear(self, manifest: Manifest) -> Callable[[], None]:
        """Put the files where they belong; what takes that back."""
        try:
            os.rename(self._new, self.path)  # where nothing is, or an empty folder
            return lambda: os.rename(self.path, self._new)
        except OSError:
            if not self.path.is_dir() or not os.listdir(self.path):
                raise
        return self._move_in(manifest.files)

    # --- into a folder that is there already ----------------------------------------------------------------------

    def _move_in(self, files: Iterable[str]) -> Callable[[], None]:
        taken = [name for name in files if os.path.lexists(self.path / name)]
        if taken:
            raise CheckpointError(f"{self.path} has got files of the checkpoint's names since: {in_words(taken)}")
        self._note(moves=list(files))
        there = self.path / FILE_NAME
        before = self._retire(self.path, there.read_bytes()) if manifest_of(self.path) is not None else None
        for name in files:
            os.rename(self._new / name, self.path / name)
        self._sync(self.path)
        os.rename(self._new / FILE_NAME, there)
        self._sync(self.path)
        return lambda: os.unlink(there) if before is None else os.rename(before, there)

    def _note(self, **changes: Any) -> None:
        """Write down what this save does from now on, old or new words at any instant."""
        self._record = self._record.model_copy(update=changes)
        path = self._staging / OWNER
        at = path if not path.exists() else self._staging / f"{_NEXT}{OWNER}"
        write_bytes(at, self._record.to_bytes(), self.fsync)
        if at != path:
            os.rename(at, path)
        self._sync(self._staging)

    def _retire(self, tag_dir: Path, manifest: bytes | None = None) -> Path:
        """Note that what a checkpoint's manifest lists is to go. It is taken from there, or is `manifest`."""
        noted = self._staging / f"{_RETIRED}{secrets.token_hex(4)}.json"
        if manifest is not None:
            write_bytes(noted, manifest, self.fsync)
        else:
            os.rename(tag_dir / FILE_NAME, noted)  # from now on nobody takes a part of it for whole
        self._sync(self._staging if manifest is not None else tag_dir)
        return noted

    def _sync(self, folder: Path) -> None:
        if self.fsync:
            sync_dir(folder)

    def _put(self, name: str, data: bytes, mode: int = 0o666) -> None:
        """Make a file beside the tags have these bytes, old or new ones at any instant."""
        path, temporary = self.save_dir / name, self._staging / f"{_NEXT}{name}"
        there = kind_of(path)
        if there == "a file":
            found = read_regular(path, 1 << 20) if path.stat().st_size <= 1 << 20 else b""
            if found == data or (name != LATEST and b"deepspeedlite" not in found):  # another program's of that name
                return
        elif there:
            logger.warning("%s is %s that is not ours, and stays", path, there)
            return
        write_bytes(temporary, data, self.fsync, mode)
        os.rename(temporary, path)

    # --- removing -------------------------------------------------------------------------------------------------

    def _remove_older(self, keep_last: int) -> None:
        """Remove all checkpoints of ours but the newest `keep_last`, this one, and the one that `latest` names."""
        kept: set[str | None] = {self.tag}
        with suppress(CheckpointError):
            kept.add(read_latest(self.save_dir))
        found = []
        for name in os.listdir(self.save_dir):
            path = self.save_dir / name
            if name[0] != "." and kind_of(path) == "a folder" and is_ours(path):
                manifest = manifest_of(path)
                if manifest is not None and manifest.tag == name:  # else a copy that somebody has made, or damaged
                    found.append(((path / FILE_NAME).stat().st_mtime_ns, name))
        for _, name in sorted(found)[:-keep_last]:
            if name in kept:
                continue
            try:
                self._retire(self.save_dir / name)
            except OSError as error:
                _cannot_be_removed(self.save_dir / name, error)

    def _holder(self) -> str | None:
        """Who has the folder."""
        saves = [save for _, save in stagings(self.save_dir) if save and save.owner != self._record.owner]
        return next((f"{save.owner} (tag {save.tag})" for save in saves if save.owner.is_alive()), None)

    def _sweep(self) -> list[str]:
        """Remove what interrupted saves have left, as far as it is ours and they have ended; its names."""
        leftovers = []
        for path, save in stagings(self.save_dir):
            try:
                if save is None:
                    has_ended = self._lock.is_certain and _was_just_made(path)
                else:
                    has_ended = save.owner == self._record.owner or save.owner.is_alive() is False
                if has_ended:
                    leftovers.append(path.name)
                    _clear(self.save_dir, path, save)
            except OSError as error:
                _cannot_be_removed(path, error)
        names = (name for name in os.listdir(self.save_dir) if name.startswith((TMP, OLD)))
        for path in sorted(self.save_dir / name for name in names if not is_staging(name)):
            if self._settle_earlier(path):
                leftovers.append(path.name)
        return leftovers

    def _settle_earlier(self, path: Path) -> bool:
        """What a save of an earlier release has left: put back what is whole and needed, remove what is ours."""
        tag = path.name.removeprefix(TMP).removeprefix(OLD)
        manifest = manifest_of(path) if kind_of(path) == "a folder" else None
        if manifest is None or manifest.tag != tag:
            log_once(
                f"{path} does not say who left it, and stays; if it is of a save that was interrupted, remove it",
                logging.WARNING,
            )
            return False
        if path.name.startswith(OLD) and not os.path.lexists(self.save_dir / tag):
            path.rename(self.save_dir / tag)
            return False
        _remove_files(path, [FILE_NAME, *manifest.files])
        return True

    def discard(self) -> None:
        """End the save: remove what has not gone to its place (after a failure all of it), as far as it can be done."""
        try:
            if self._staging.is_dir() and self._lock.is_held:
                save = SaveRecord.at(self._staging)
                if save is not None or _was_just_made(self._staging):
                    _clear(self.save_dir, self._staging, save)
        except OSError as error:
            _cannot_be_removed(self._staging, error)
        finally:
            self._lock.end()


def _clear(save_dir: Path, staging: Path, save: SaveRecord | None) -> None:
    """Remove what a save that has ended was about to remove, and what it has left."""
    if save is not None and save.moves and (kept := _listed(save_dir / save.tag)) is not None:
        _remove_files(save_dir / save.tag, set(save.moves) - kept)
    names = os.listdir(staging)
    for name in names:
        if name.startswith(_RETIRED):
            _finish_retiring(save_dir, staging / name)
        elif name.startswith(_NEXT):
            os.unlink(staging / name)
    if save is not None and _NEW in names:
        _remove_files(staging / _NEW, [FILE_NAME, *save.files])
    if not set(os.listdir(staging)) - {OWNER}:  # else the next save tries again
        (staging / OWNER).unlink(missing_ok=True)
        os.rmdir(staging)


def _finish_retiring(save_dir: Path, noted: Path) -> None:
    manifest = manifest_of(noted.parent, noted.name)
    if manifest is not None and is_plain_name(manifest.tag):
        tag_dir = save_dir / manifest.tag
        kept = _listed(tag_dir)
        if kept is None or not _remove_files(tag_dir, manifest.files.keys() - kept):
            return
    os.unlink(noted)


def _listed(tag_dir: Path) -> set[str] | None:
    """The files of a tag's folder that its manifest lists; None where that cannot be read, so that nothing may go."""
    if kind_of(tag_dir) != "a folder" or not kind_of(tag_dir / FILE_NAME) or _is_blank(tag_dir / FILE_NAME):
        return set()
    manifest = manifest_of(tag_dir)
    return None if manifest is None else {FILE_NAME, *manifest.files}


def _remove_files(folder: Path, names: Iterable[str]) -> bool:
    """Remove files, and their folder if it is empty then; whether all are gone.

    What cannot be removed now, such as a file that is open on NFS, is no reason to fail.
    """
    if kind_of(folder) != "a folder":
        return True
    gone = True
    for name in names:
        try:
            if kind_of(folder / name) == "a file":
                os.unlink(folder / name)
        except OSError as error:
            _cannot_be_removed(folder / name, error)
            gone = False
    try:
        if not os.listdir(folder):
            os.rmdir(folder)
    except OSError as error:
        _cannot_be_removed(folder, error)
        gone = False
    return gone


def _cannot_be_removed(path: Path, error: OSError) -> None:
    logger.warning("%s cannot be removed: %s; the next save tries again", path, error)


def _was_just_made(staging: Path) -> bool:
    """Whether a save was interrupted before it had said whose its staging folder is: there is nothing to lose."""
    names = os.listdir(staging)
    about = staging / OWNER
    return not names or (names == [OWNER] and kind_of(about) == "a file" and about.stat().st_size == 0)
