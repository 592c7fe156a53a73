"""Where compiled ops are kept, and whether what lies there may be loaded.

`$TORCH_EXTENSIONS_DIR/deepspeedlite`, by default below ~/.cache/torch_extensions. Where that is no folder for this user
(no home, one that may not be entered or written, noexec, somebody else's, or one that others may write), a folder with
the user's number beside it, and at last one in the temporary directory, which is the user's alone.

A library is code: one that somebody else could have put there is never loaded. No function here raises for what a
folder is like; they say it.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.ops.op_builder.errors import OpBuildError

CHOOSE = "set TORCH_EXTENSIONS_DIR to a folder of your own that can be written"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Place(NamedTuple):
    """A folder for compiled ops.

    Attributes:
        doubt: why nothing that is there is loaded; "" where it is.
    """

    folder: Path
    doubt: str

    @property
    def obstacle(self) -> str:
        """Why nothing is put there; "" where it may be. (Looked at when it is asked for.)"""
        return self.doubt or _obstacle(self.folder)


def places() -> list[Place]:
    """The folders in which ops are looked for, in this order; new ones go to the first without an obstacle."""
    own = f"deepspeedlite-{os.getuid()}"
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = os.path.expanduser(named or "~/.cache/torch_extensions")
    if base.startswith("~"):
        whose = f"TORCH_EXTENSIONS_DIR={named}: " if named else ""
        nowhere = f"{whose}HOME is not set, and user {os.getuid()} has no entry in the list of users"
        found = [Place(Path(base), nowhere)]
    else:
        found = [_place(Path(os.path.abspath(base)) / name) for name in ("deepspeedlite", own)]
    if not named:
        with suppress(FileNotFoundError):  # none can be written; TMPDIR may name one that can
            found.append(_place(Path(os.path.abspath(tempfile.gettempdir())) / own))
    return found


def cache_folder() -> Path:
    """Where ops that are compiled now are kept; where nothing can be, the folder that was meant."""
    found = places()
    return next((place.folder for place in found if not place.obstacle), found[0].folder)


def writable_folder() -> Path:
    """`cache_folder`, made where it was not there, for its owner alone to write.

    Raises:
        OpBuildError: there is none that this user can write and that nobody else can.
    """
    found = places()
    place = next((place for place in found if not place.obstacle), None)
    if place is None:
        raise OpBuildError("; ".join(dict.fromkeys(place.obstacle for place in found)), CHOOSE)
    alone = place.folder.name != "deepspeedlite"
    os.makedirs(place.folder.parent, exist_ok=True)
    try:
        place.folder.mkdir(mode=0o700 if alone else 0o755)
    except FileExistsError:  # since it was looked at, perhaps: by whom?
        if reason := distrust(place.folder):
            raise OpBuildError(reason, CHOOSE) from None
    return place.folder


def detour(folder: Path) -> str:
    """Why ops are in this folder and not where they usually are; "" where they are there."""
    usual = places()[0]
    return usual.obstacle if folder != usual.folder else ""


def _place(folder: Path) -> Place:
    return Place(folder, distrust(folder))


def distrust(path: Path) -> str:
    """Why nothing is loaded from a file or folder: others may have put there what they like. "" where none is there."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"{path} cannot be looked at ({error.strerror})"
    if stat.S_ISLNK(found.st_mode) and found.st_uid in (os.getuid(), 0) and os.path.isdir(path):
        found = os.stat(path)  # a folder of one's own may be elsewhere
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        return f"{path} is neither a folder nor a file"
    if found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to {_name(found.st_uid)}, who could have put anything there"
    if found.st_mode & _OTHERS_WRITE:
        return f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _obstacle(folder: Path) -> str:
    """Why nothing can be put there and run, told by the nearest folder that is there."""
    near = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path("/"))
    if not os.path.isdir(near) or not os.access(near, os.W_OK | os.X_OK):
        return f"{folder} cannot be written{'' if near == folder else f', as {near} cannot be'}"
    if os.statvfs(near).f_flag & os.ST_NOEXEC:
        return f"{folder} is on a file system that is mounted noexec, from which no library can be loaded"
    return ""


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
