"""The base of every section: strict types, and `key`, which keeps a key's default, status, meaning and note together.

A section is a frozen pydantic model that refuses unknown keys and converts nothing silently: `true` is no number,
"1e5" is no number, 5e8 is a whole number because JSON has no other way to write it, 0 and 1 are false and true.
`key_info` reads back what `key` recorded; the checks, the generated documentation and the JSON Schema all live on it.
"""

from __future__ import annotations

import operator
import types
import typing
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

from deepspeedlite.config.features import FEATURES, Feature, Status, verdict

LARGEST = 2**63 - 1


def _whole(value: Any) -> Any:
    """Integral floats (5e8) and numpy integers become int; bool and text do not."""
    if isinstance(value, bool | str | bytes):
        raise ValueError("not a number")
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("not whole")
        value = int(value)
    else:
        try:
            value = operator.index(value)
        except TypeError:
            raise ValueError("not a number") from None
    if abs(value) > LARGEST:
        raise ValueError("more than 64 bits")
    return value


def _real(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise ValueError("not a number")
    if isinstance(value, int):
        if abs(value) > LARGEST:
            raise ValueError("more than 64 bits")
        return float(value)
    return value


DTYPE_NAMES: dict[str, str] = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
}


def _dtype(value: Any) -> Any:
    """Any spelling of a dtype, or a torch.dtype (recognised without importing torch), to its canonical name."""
    if type(value).__module__ == "torch":
        value = str(value)
    return DTYPE_NAMES.get(value.lower(), value) if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _path(value: Any) -> Any:
    return value.__fspath__() if hasattr(value, "__fspath__") else value


def _flag(value: Any) -> Any:
    """0 and 1, which DeepSpeed's files have for false and true; no other number."""
    return bool(value) if type(value) is int and value in (0, 1) else value


Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Int = Annotated[int, Strict(), BeforeValidator(_whole)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_real)]
Text = Annotated[str, Strict()]
Path = Annotated[str, Strict(), BeforeValidator(_path)]
Dtype = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_dtype)]
FreeForm = dict[str, Any]
AnyCase = BeforeValidator(_lower)


def key(
    default: Any,
    doc: str,
    *,
    stands: str = "core",
    may_differ: bool = False,
    **limits: Any,
) -> Any:
    """Declare one key.

    `stands` names a line of `features.FEATURES`, or says it on the spot for a key that stands alone: "hint: changes
    nothing".
    `may_differ`: ranks may have different values (the section's own MAY_DIFFER if left out).
    `limits` are pydantic's: ge, gt, le, lt, min_length.
    """
    extra = stands_as(stands)
    if may_differ:
        extra["may_differ"] = True
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=doc, json_schema_extra=extra, **given, **limits)


def stands_as(text: str) -> dict[str, Any]:
    """What a key's record says of its feature, or of its own verdict."""
    return {"feature": text} if text in FEATURES else dict(verdict(text)._asdict())


def part(section: type[Section], doc: str, stands: str = "core") -> Any:
    """Declare a key whose value is a section that is always there, all defaults when it is not given."""
    return Field(default_factory=section.model_construct, description=doc, json_schema_extra=stands_as(stands))


class Section(BaseModel):
    """A JSON object with known keys.

    SWITCH names the key that turns the whole section on; while its value is in OFF the other keys ask for nothing.
    MAY_DIFFER: ranks may differ in all of its keys.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, validate_default=False, protected_namespaces=()
    )

    SWITCH: ClassVar[str | None] = None
    OFF: ClassVar[tuple[Any, ...]] = (False, None, 0, "none")
    MAY_DIFFER: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Complete each key's record: what the section says where it says nothing, and its status for the Schema."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            extra = field.json_schema_extra
            if not isinstance(extra, dict):
                continue
            if "status" not in extra:
                extra.setdefault("feature", "core")
                extra.update(FEATURES[str(extra["feature"])]._asdict())
            if cls.MAY_DIFFER or extra["status"] == "hint":  # what changes nothing cannot do harm
                extra["may_differ"] = True

    def switched_off(self) -> bool:
        """True if the section has a switch and it is off."""
        return self.SWITCH is not None and getattr(self, self.SWITCH) in self.OFF


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


def copy_tree(value: Any) -> Any:
    """Copy dicts and lists and keep leaves, which may be objects that cannot be copied (process groups)."""
    if isinstance(value, dict):
        return {name: copy_tree(inner) for name, inner in value.items()}
    return [copy_tree(inner) for inner in value] if isinstance(value, list) else value


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
