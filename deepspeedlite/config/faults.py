"""Faults: one line each, with the key's full path, the value given, the nearest known key and the remedy.

Every stage of loading appends to one list of `Fault`; `raise_faults` turns the list into a single `ConfigError`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from deepspeedlite.runtime.errors import ConfigError

KeyPath = tuple[Any, ...]
MISSING: Any = object()
_SHOWN_LENGTH = 60


class Fault(NamedTuple):
    """One thing wrong with a configuration. `path` is () for the file as a whole."""

    path: KeyPath
    value: Any
    problem: str
    remedy: str = ""

    def line(self) -> str:
        """The fault as one line of the message."""
        where = dotted(self.path)
        given = "" if self.value is MISSING else f" = {show(self.value)}"
        text = f"{where}{given}: {self.problem}" if where else self.problem
        return f"{text}; {self.remedy}" if self.remedy else text


class Origin(NamedTuple):
    """How the user wrote a key: its path, and its value if it was another one then (MISSING: the same)."""

    path: KeyPath
    value: Any = MISSING


def dotted(path: Sequence[Any]) -> str:
    """("a", "b", 0, "odd key") -> a.b[0]["odd key"]."""
    text = ""
    for part in path:
        if isinstance(part, str) and part and part.replace("_", "a").replace("-", "a").isalnum():
            text += f".{part}" if text else part
        else:
            text += f"[{show(part)}]"
    return text


def show(value: Any) -> str:
    """A value as JSON where it has a JSON form, shortened to fit a line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except Exception:
            text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "..."


def raise_faults(origin: str, faults: Sequence[Fault]) -> NoReturn:
    """Raise one ConfigError that lists every fault."""
    lines = list(dict.fromkeys(fault.line() for fault in faults))
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  - {line}" for line in lines))
