"""A save's workplace, `SAVE_DIR/.tmp.TAG.NUMBER`, and what its `owner.json` says of who works there; see `writer`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from deepspeedlite.checkpoint.files import kind_of, read_regular
from deepspeedlite.checkpoint.manifest import is_plain_name
from deepspeedlite.checkpoint.owner import Owner
from deepspeedlite.runtime.errors import CheckpointError

TMP = ".tmp."
OWNER = "owner.json"
_FORMAT = "deepspeedlite-save"
_NAME = re.compile(re.escape(TMP) + r".+\.[0-9a-f]{16}")
_MOST_NBYTES = 1 << 24


@dataclass
class Work:
    """What one save does."""

    owner: Owner
    tag: str
    files: list[str] = field(default_factory=list)  # that are written
    moves: list[str] = field(default_factory=list)  # those of them that go into a tag's folder that is there already
    is_latest: bool = False  # `latest` is to name the tag

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps({"format": _FORMAT, **vars(self), "owner": self.owner.record()}).encode()

    @classmethod
    def at(cls, workplace: Path) -> Work | None:
        """Of a workplace; None where there is no such file that can be believed."""
        try:
            body = json.loads(read_regular(workplace / OWNER, _MOST_NBYTES))
            owner, names = Owner.of(body["owner"]), [*body["files"], *body["moves"]]
            if body["format"] != _FORMAT or owner is None or not all(map(is_plain_name, [body["tag"], *names])):
                return None
            return cls(owner, body["tag"], list(body["files"]), list(body["moves"]), body["is_latest"] is True)
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, RecursionError):
            return None


def is_workplace(name: str) -> bool:
    """Whether a folder's name is one that a save gives."""
    return _NAME.fullmatch(name) is not None


def workplaces(save_dir: Path) -> list[tuple[Path, Work | None]]:
    """The workplaces of saves that go on or were interrupted, and what they say."""
    try:
        names = sorted(filter(is_workplace, os.listdir(save_dir)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [save_dir / name for name in names if kind_of(save_dir / name) == "a folder"]
    return [(path, Work.at(path)) for path in found]
