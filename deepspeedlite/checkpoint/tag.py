"""Tag directories: what names one, what is one, and which there are.

SAVE_DIR/latest            the newest tag's name; replaced by rename
SAVE_DIR/TAG/              a checkpoint; whole as soon as it has its manifest.json
SAVE_DIR/.tmp.TAG.NUMBER/  where one save writes: see `writer`
SAVE_DIR/.old.TAG/         of earlier releases: what TAG was while a save under the same tag took its place
SAVE_DIR/NAME.py           a copy of the program that `Formats.companion` names

Beside these a folder may hold anything, and so may a tag's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepspeedlite.checkpoint.files import edge_of, is_plain_name, kind_of, read_regular
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.manifest import FILE_NAME, MOST_NBYTES, Manifest
from deepspeedlite.checkpoint.staging import stagings
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.process_record import ProcessRecord

LATEST = "latest"
OLD = ".old."
_MOST_TAG_NBYTES = 200  # a file's name has 255, and a staging folder's holds more than the tag
_MOST_SHOWN = 8
_HEAD = re.compile(rb'\{"crc32": "[0-9a-f]{8}",\s*"format":\s*"deepspeedlite"')
_SAVED_BY = re.compile(rb'"saved_by":\s*(\{[^{}]*\})')


def check_tag(tag: Any, reserved: Sequence[str] = ()) -> str:
    """The tag as a directory's name; numbers are taken too. `CheckpointError` for what leads elsewhere."""
    name = str(tag)
    if not is_plain_name(name) or name in (LATEST, *reserved):
        taken = f"neither {LATEST!r} nor {', '.join(map(repr, reserved))}" if reserved else f"not {LATEST!r}"
        raise CheckpointError(
            f"the checkpoint tag {name!r} cannot be a directory's name: no '/' (the folder is an argument of its own), "
            f"no leading '.', {taken}"
        )
    return name


def check_new_tag(tag: Any, formats: Formats) -> str:
    """The same for a tag that is to be written: one that the file `latest` can carry."""
    name = check_tag(tag, formats.reserved)
    if isinstance(tag, (bytes, bytearray)) or name != name.strip() or not name.isprintable():
        raise CheckpointError(
            f"the checkpoint tag {tag!r} cannot be told from others in the file `latest`: no blanks around it, no line "
            "breaks or other characters that cannot be printed"
        )
    if len(name.encode()) > _MOST_TAG_NBYTES:
        raise CheckpointError(
            f"the checkpoint tag {name[:40]!r}... has {len(name.encode())} bytes; {_MOST_TAG_NBYTES} are the most"
        )
    return name


def find_tag_dir(path: Path) -> Path:
    """`path`, or what a save of an earlier release, killed while replacing it, has left of it."""
    old = path.with_name(OLD + path.name)
    return old if not os.path.lexists(path) and is_ours(old) else path


def is_ours(tag_dir: Path) -> bool:
    """Whether a directory has a manifest of ours, which may be damaged."""
    head = edge_of(tag_dir / FILE_NAME, 100)
    return head is not None and _HEAD.match(head) is not None


def is_checkpoint(tag_dir: Path, formats: Formats) -> bool:
    """Whether a directory holds a checkpoint, ours or another program's."""
    return is_ours(tag_dir) or formats.of(tag_dir) is not None


def manifest_of(folder: Path, name: str = FILE_NAME) -> Manifest | None:
    """The manifest of ours in a folder; None where there is none that can be believed."""
    try:
        return Manifest.from_bytes(read_regular(folder / name, MOST_NBYTES), str(folder / name))
    except (OSError, CheckpointError):
        return None


def saver_of(tag_dir: Path) -> ProcessRecord | None:
    """Which process saved a checkpoint of ours; None where it does not say."""
    end = edge_of(tag_dir / FILE_NAME, 2000, at_end=True)
    found = _SAVED_BY.search(end or b"")
    with suppress(ValidationError):
        return ProcessRecord.model_validate_json(found[1]) if found else None
    return None


def tags_in(save_dir: Path, formats: Formats) -> list[str]:
    """The tags that lie in a folder, in the order of their names."""
    try:
        names = sorted(os.listdir(save_dir))
    except OSError:
        return []
    names = [name.removeprefix(OLD) for name in names if name[0] != "." or name.startswith(OLD)]
    names = [name for name in dict.fromkeys(names) if is_plain_name(name)]
    return [name for name in names if is_checkpoint(find_tag_dir(save_dir / name), formats)]


def in_words(names: list[str]) -> str:
    """The first of some names."""
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def find_tag(load_dir: Path, tag: Any, formats: Formats) -> Path | None:
    """The directory of `tag`, or of the one that `latest` names if it is None; None where nothing was ever saved.

    Raises:
        CheckpointError: there is no such tag; or there are some, and nothing says which is meant.
    """
    name = read_latest(load_dir) or _unnamed(load_dir, formats) if tag is None else check_tag(tag)
    if name is not None and (path := find_tag_dir(load_dir / name)).is_dir():
        return path
    if name is None and is_checkpoint(load_dir, formats):
        raise CheckpointError(
            f"{load_dir} is a checkpoint itself: name the folder it lies in, and {load_dir.resolve().name!r} as tag"
        )
    there = tags_in(load_dir, formats)
    if name is None:
        if not there:
            return None
        raise CheckpointError(
            f"{load_dir} has no file {LATEST!r} that names a checkpoint, and has some: {in_words(there)}; pass one as "
            "tag, or name another folder to start anew"
        )
    says = f"there is no checkpoint {name} in {load_dir}"
    if tag is None:
        says = f"{load_dir / LATEST} names {name}, and there is no such checkpoint"
    raise CheckpointError(f"{says}; it has {f'{in_words(there)}: name one as tag' if there else 'none'}")


def _unnamed(load_dir: Path, formats: Formats) -> str | None:
    """The checkpoint of a first save that was killed before it could write `latest`."""
    saves = [save for _, save in stagings(load_dir) if save is not None and save.is_latest]
    return next((save.tag for save in saves if is_checkpoint(load_dir / save.tag, formats)), None)


def read_latest(save_dir: Path) -> str | None:
    """The tag that `latest` names; None where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or names what cannot be a tag.
    """
    path = save_dir / LATEST
    try:
        if not kind_of(path):
            return None
        return check_tag(read_regular(path, 4096).decode().strip())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} names no checkpoint: {error}; name a tag") from error
