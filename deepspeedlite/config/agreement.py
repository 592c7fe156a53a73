"""What ranks that train together must have alike in their configurations: `must_agree` lists it, key by key.

Paths, logging and what changes nothing may differ; each such key says so where it is declared (`may_differ`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from deepspeedlite.config.base import Section
from deepspeedlite.config.keys import may_differ
from deepspeedlite.config.root import DeepSpeedConfig


def must_agree(config: DeepSpeedConfig) -> dict[str, str]:
    """Each key that must be the same on all ranks, by its dotted path, to its value in words.

    Keys of a section that is switched off ask for nothing, and are left out but for the switch.
    """
    return dict(_section(config, ""))


def _section(section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    off = section.switched_off()
    for name, field in type(section).model_fields.items():
        if not may_differ(field) and not (off and name != section.SWITCH):
            yield from _value(getattr(section, name), prefix + name)


def _value(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Section):
        yield from _section(value, f"{path}.")
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _value(inner, f"{path}.{name}")
    elif isinstance(value, list) and any(isinstance(item, Section | dict) for item in value):
        for index, item in enumerate(value):
            yield from _value(item, f"{path}[{index}]")
    else:
        yield path, in_words(value)


def in_words(value: Any) -> str:
    """A value as JSON, alike on every rank that has the same: 1 and 1.0 are one number, an object is its class."""
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return _plain(value.tolist()) if hasattr(value, "tolist") else type(value).__qualname__
