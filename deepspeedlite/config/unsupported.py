"""Makes models of the keys in unsupported.json, which this release takes or knows and does not act on.

`@beside("zero_optimization")` adds to a model the rows that the file has for its path. A row is
`[type, default, meaning, feature or verdict, section]`: the fourth may be left out for the section's own `verdict`, and
the fifth is there where the type is a section, with what `Section` has as class attributes and rows of its own. Types:

    bool  int, >= 1  float, > 0, < 1 | null  str  dtype  object  any  [str]  auto | int  one/of/these, any case
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

from deepspeedlite.config.base import AnyCase, Dtype, Flag, FreeForm, Int, Number, Section, Text, key, part
from deepspeedlite.config.features import UNSUPPORTED

Model = TypeVar("Model", bound=type[Section])
_TYPES: Mapping[str, Any] = {
    "bool": Flag,
    "int": Int,
    "float": Number,
    "str": Text,
    "dtype": Dtype,
    "object": FreeForm,
    "any": Any,
    "null": type(None),
}
_LIMITS = {">=": "ge", ">": "gt", "<=": "le", "<": "lt"}


def beside(path: str) -> Callable[[Model], Model]:
    """Add to a model, which is at this path of the file, the keys that the table lists there."""
    return lambda model: _extended(model.__name__, model, UNSUPPORTED[path], model.__doc__)


def _extended(title: str, base: Any, node: Mapping[str, Any], about: str | None) -> Any:
    usual = node.get("verdict", "core")
    rows = {name: _field(name, *row[:3], *(row[3:] or [usual])) for name, row in node["keys"].items()}
    namespace = {
        "__module__": base.__module__,
        "__doc__": about,
        "__annotations__": {name: annotation for name, (annotation, _) in rows.items()},
        **{name: field for name, (_, field) in rows.items()},
    }
    if "about" in node:  # a section of its own
        namespace |= {"SWITCH": node.get("switch"), "OFF": tuple(node.get("off", Section.OFF))}
        namespace["MAY_DIFFER"] = node.get("may_differ", False)
    return type(base)(title, (base,), namespace)


def _field(name: str, kind: str, default: Any, doc: str, stands: str, section: Any = None) -> tuple[Any, Any]:
    """A key's annotation and its declaration."""
    words, *more = kind.split(", ")
    options: dict[str, Any] = {"stands": stands}
    inner: Any = None
    if section is not None:
        title = "".join(word.capitalize() for word in name.split("_"))
        inner = _extended(title, Section, section, section["about"])
    annotation = _annotation(words, inner)
    if words == "section":
        return annotation, part(inner, doc, **options)
    if "any case" in more:
        annotation = Annotated[annotation, AnyCase]
    for sign, _, bound in (word.partition(" ") for word in more if word[0] in "<>"):
        options[_LIMITS[sign]] = float(bound) if "." in bound else int(bound)
    return annotation, key(type(default) if isinstance(default, list | dict) else default, doc, **options)


def _annotation(words: str, inner: Any) -> Any:
    arms: list[Any] = []
    for word in words.split(" | "):
        if word.startswith("["):
            arms.append(list[_annotation(word[1:-1], inner)])  # type: ignore[misc]
        else:
            arms.append(inner if word == "section" else _TYPES.get(word) or Literal[tuple(word.split("/"))])
    return Union[tuple(arms)]  # noqa: UP007
