"""Where a save writes, `SAVE_DIR/.tmp.TAG.NUMBER`, and what its `owner.json` says of who writes there; see `writer`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deepspeedlite.checkpoint.files import PlainName, kind_of, read_regular
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.process_record import ProcessRecord

TMP = ".tmp."
OWNER = "owner.json"
_NAME = re.compile(re.escape(TMP) + r".+\.[0-9a-f]{16}")
_MOST_NBYTES = 1 << 24


class SaveRecord(BaseModel):
    """What one save does, for those that come after it was killed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)

    format: Literal["deepspeedlite-save"] = "deepspeedlite-save"
    owner: ProcessRecord
    tag: PlainName
    files: list[PlainName] = []  # that are written
    moves: list[PlainName] = []  # those of them that go into a tag's folder that is there already
    is_latest: bool = False  # `latest` is to name the tag

    def to_bytes(self) -> bytes:
        """The file's content."""
        return self.model_dump_json().encode()

    @classmethod
    def at(cls, staging: Path) -> SaveRecord | None:
        """Of a staging folder; None where there is no such file that can be believed."""
        try:
            return cls.model_validate_json(read_regular(staging / OWNER, _MOST_NBYTES))
        except (OSError, CheckpointError, ValidationError):
            return None


def is_staging(name: str) -> bool:
    """Whether a folder's name is one that a save gives."""
    return _NAME.fullmatch(name) is not None


def stagings(save_dir: Path) -> list[tuple[Path, SaveRecord | None]]:
    """The staging folders of saves that go on or were interrupted, and what they say."""
    try:
        names = sorted(filter(is_staging, os.listdir(save_dir)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [save_dir / name for name in names if kind_of(save_dir / name) == "a folder"]
    return [(path, SaveRecord.at(path)) for path in found]
