"""Everything that a configuration knows, read back from where it is declared: `ALL_SECTIONS` and `iter_keys`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from deepspeedlite.config.base import Section
from deepspeedlite.config.features import Status
from deepspeedlite.config.keys import default_of, inner_section, kind_of, may_differ, standing
from deepspeedlite.config.root import DeepSpeedConfig
from deepspeedlite.config.sections.monitors import Monitors


class KeyInfo(NamedTuple):
    """What is known about one key; `path` is dotted from the file's top."""

    path: str
    kind: str
    default: Any
    status: Status
    note: str
    doc: str
    section: type[Section] | None
    may_differ: bool = False


def key_info(path: str, field: FieldInfo) -> KeyInfo:
    """Read back what `key` recorded."""
    status, note = standing(field)
    return KeyInfo(
        path=path,
        kind=kind_of(field),
        default=default_of(field),
        status=status,
        note=note,
        doc=field.description or "",
        section=inner_section(field.annotation),
        may_differ=may_differ(field),
    )


ALL_SECTIONS: dict[str, type[Section]] = {
    name: section
    for name, field in sorted(DeepSpeedConfig.model_fields.items(), key=lambda item: item[0] in Monitors.model_fields)
    if (section := inner_section(field.annotation)) is not None
}


def iter_keys(section: type[Section] = DeepSpeedConfig, prefix: str = "") -> Iterator[KeyInfo]:
    """Every key with its dotted path, a section's own keys right after it ("layer_specs[]" for lists of objects)."""
    for name, field in section.model_fields.items():
        info = key_info(prefix + name, field)
        yield info
        if info.section is not None:
            yield from iter_keys(info.section, info.path + ("[]." if info.kind.startswith("a list") else "."))
