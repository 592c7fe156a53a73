"""The base of every section: strict types, and `key`, which keeps a key's default, status, meaning and note together.

A section is a frozen pydantic model that refuses unknown keys and converts nothing silently: `true` is no number,
"1e5" is no number, 5e8 is a whole number because JSON has no other way to write it, 0 and 1 are false and true.
`keys` reads back what `key` recorded; the checks, the generated documentation and the JSON Schema live on it.

[Note: keys that are not acted on]
`class Fp16(Section, beside="fp16")` has, after its own keys, those of the rows that unsupported.json lists for it. A
row is `[type, default, meaning, feature or verdict, section]`: the fourth may be left out for the `verdict` of all
rows, and the fifth is there where the type is a section, with what `Section` has as class attributes and rows of its
own. Types:

    bool  int, >= 1  float, > 0, < 1 | null  str  dtype  object  any  [str]  auto | int  one/of/these, any case
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from deepspeedlite.config.features import FEATURES, UNSUPPORTED, verdict

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
    """Declare one key. Where `default` is a class of sections, its section is always there, all defaults if not given.

    `stands` names a line of `features.FEATURES`, or says it on the spot for a key that stands alone: "hint: changes
    nothing".
    `may_differ`: ranks may have different values (the section's own MAY_DIFFER if left out).
    `limits` are pydantic's: ge, gt, le, lt, min_length.
    """
    extra: dict[str, Any] = {"feature": stands} if stands in FEATURES else dict(verdict(stands)._asdict())
    if may_differ:
        extra["may_differ"] = True
    default = getattr(default, "model_construct", default)
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=doc, json_schema_extra=extra, **given, **limits)


class Section(BaseModel):
    """A JSON object with known keys; `beside` names the rows of unsupported.json that it has too (see the note above).

    SWITCH names the key that turns the whole section on; while its value is in OFF the other keys ask for nothing.
    MAY_DIFFER: ranks may differ in all of its keys.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, validate_default=False, protected_namespaces=()
    )

    SWITCH: ClassVar[str | None] = None
    OFF: ClassVar[tuple[Any, ...]] = (False, None, 0, "none")
    MAY_DIFFER: ClassVar[bool] = False

    def __init_subclass__(cls, beside: str | Mapping[str, Any] = {}, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        node = UNSUPPORTED[beside] if isinstance(beside, str) else beside
        annotations = inspect.get_annotations(cls)
        for name, row in node.get("keys", {}).items():
            annotations[name], declared = _of_row(name, *row[:3], *(row[3:] or [node.get("verdict", "core")]))
            setattr(cls, name, declared)
        cls.__annotations__ = annotations

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


def _of_row(name: str, kind: str, default: Any, doc: str, stands: str, inner: Any = None) -> tuple[Any, Any]:
    """The annotation and the declaration of a key of unsupported.json."""
    words, *more = kind.split(", ")
    section = None if inner is None else _section(name, inner)
    annotation = _annotation(words, section)
    if "any case" in more:
        annotation = Annotated[annotation, AnyCase]
    limits: dict[str, Any] = {}
    for sign, _, bound in (word.partition(" ") for word in more if word[0] in "<>"):
        limits[_LIMITS[sign]] = float(bound) if "." in bound else int(bound)
    if words == "section":
        default = section
    elif isinstance(default, list | dict):
        default = type(default)
    return annotation, key(default, doc, stands=stands, **limits)


def _section(name: str, node: Mapping[str, Any]) -> type[Section]:
    attributes = {
        "__module__": __name__,
        "__doc__": node["about"],
        "SWITCH": node.get("switch"),
        "OFF": tuple(node.get("off", Section.OFF)),
        "MAY_DIFFER": node.get("may_differ", False),
    }
    title = "".join(word.capitalize() for word in name.split("_"))
    made: type[Section] = types.new_class(title, (Section,), {"beside": node}, lambda body: body.update(attributes))
    return made


def _annotation(words: str, section: Any) -> Any:
    arms: list[Any] = []
    for word in words.split(" | "):
        if word.startswith("["):
            arms.append(list[_annotation(word[1:-1], section)])  # type: ignore[misc]
        else:
            arms.append(section if word == "section" else _TYPES.get(word) or Literal[tuple(word.split("/"))])
    return Union[tuple(arms)]  # noqa: UP007
