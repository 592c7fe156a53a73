"""The formats of other programs, each in a folder of its own, and checkpoints of whatever format opened by a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.formats.deepspeed import DeepSpeedFormat
from deepspeedlite.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeedlite.checkpoint.reader import Reader

FORMATS = Formats((DeepSpeedFormat(),), companion=Path(__file__).parent / "deepspeed" / "zero_to_fp32.py")


def open_checkpoint(folder: str | Path, tag: Any = None) -> Reader:
    """A tag's own folder, or `tag` (what `latest` names, if None) of a folder of tags; ours or another program's.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from deepspeedlite.checkpoint.reader import open_tag  # no training's start waits for these
    from deepspeedlite.checkpoint.tag import find_tag, is_checkpoint

    folder = check_folder(folder, "reading")
    if tag is None and is_checkpoint(folder, FORMATS):
        return open_tag(folder, FORMATS)
    path = find_tag(folder, tag, FORMATS)
    if path is None:
        raise CheckpointError(f"{folder} is no checkpoint, and has none in it")
    return open_tag(path, FORMATS)
