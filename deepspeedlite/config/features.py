"""What this release does not do, read from unsupported.json: features with their status, and the keys that name them.

A key that changes nothing or is refused is a row of that file, and a feature is one of its `verdicts`. A
release that gains a feature moves its rows into the models; the checks, the messages and docs/config.md follow.

`supported`: the engine acts on the key. `hint`: taken, and nothing changes; said once when the key is given.
`refused`: asking for it (a value other than the default) is an error that carries the note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

Status = Literal["supported", "hint", "refused"]


class Feature(NamedTuple):
    """What a feature's keys are worth in this release: `note` says what to do instead, unless it is supported."""

    status: Status
    note: str = ""


def verdict(text: str) -> Feature:
    """`refused: ZenFlow is not in this release; remove the section` -> a feature."""
    status, _, note = text.partition(": ")
    return Feature(cast(Status, status), note)


_TABLE: Any = json.loads(Path(__file__).with_name("unsupported.json").read_text("utf-8"))
FEATURES: dict[str, Feature] = {"core": Feature("supported")}
FEATURES |= {name: verdict(text) for name, text in _TABLE["verdicts"].items()}
# By the path of a model in this folder ("" is the file's top): the keys beside its own.
UNSUPPORTED: dict[str, Any] = _TABLE["beside"]
