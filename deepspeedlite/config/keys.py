"""What is known about a key, read back from where it is declared: its type in words, its default, its standing."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

from deepspeedlite.config.base import Section
from deepspeedlite.config.features import FEATURES, Feature


def inner_section(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `X`, `X | None` or `list[X]`, if there is one."""
    if isinstance(annotation, type) and issubclass_safe(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        if (found := inner_section(argument)) is not None:
            return found
    return None


def issubclass_safe(cls: Any, parent: type) -> bool:
    """`issubclass` that is False for the generic aliases that Python 3.10 calls types."""
    try:
        return issubclass(cls, parent)
    except TypeError:
        return False


def _literals(annotation: Any) -> str:
    words = [f'"{word}"' if isinstance(word, str) else str(word) for word in typing.get_args(annotation)]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "null",
    dict: "an object",
    Any: "any value",
}


def describe(annotation: Any) -> str:
    """What a value of this type looks like in JSON, in words: "a whole number", "a list of strings"."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return describe(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arm) for arm in typing.get_args(annotation)))
    if origin is Literal:
        return _literals(annotation)
    if origin is list:
        (item,) = typing.get_args(annotation)
        word = describe(item)
        return "a list of " + (word.split(" ", 1)[1] + "s" if word.startswith(("a ", "an ")) else word)
    if issubclass_safe(annotation, Section):
        return "an object"
    return _PLAIN.get(origin or annotation, "any value")


_LIMITS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def kind_of(field: FieldInfo) -> str:
    """A key's type in words with its limits: "a whole number >= 1 or null"."""
    limits = [
        f"{sign} {getattr(item, name)}" for item in field.metadata for name, sign in _LIMITS if hasattr(item, name)
    ]
    words = describe(field.annotation)
    if limits:
        bound = " and ".join(limits)
        words = words[: -len(" or null")] + f" {bound} or null" if words.endswith(" or null") else f"{words} {bound}"
    if any(getattr(item, "min_length", 0) for item in field.metadata):
        words += ", not empty"
    return words


def default_of(field: FieldInfo) -> Any:
    """The value a key has when it is not given; `...` if it must be given."""
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def standing(field: FieldInfo) -> Feature:
    """A key's status and note in this release."""
    extra = typing.cast(dict[str, Any], field.json_schema_extra)
    return FEATURES[extra["feature"]] if "feature" in extra else Feature(extra["status"], extra["note"])


def may_differ(field: FieldInfo) -> bool:
    """Whether ranks may have different values of a key."""
    return "may_differ" in typing.cast(dict[str, Any], field.json_schema_extra)
