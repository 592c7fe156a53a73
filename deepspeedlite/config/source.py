"""Reading a configuration from where it is: a JSON file, a dict, or JSON in base64 as DeepSpeed's launcher passes it.

JSON is strict: duplicate keys are faults with their full path, syntax errors name file, line and column and show the
line. One thing goes beyond the standard: Infinity and NaN are read, since Python's own json module writes them
(Accelerate sets steps_per_print to infinity); Infinity is then accepted where a key allows it and NaN nowhere.

What is no JSON, for it has comments or keys without quotes, is read as Hjson (hjson.github.io), as DeepSpeed reads
every file, where the package hjson is installed; its values are checked like any others.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from deepspeedlite.config.faults import MISSING, Fault, KeyPath, dotted, show
from deepspeedlite.runtime.errors import ConfigError

_DEEPEST = 40
_RELAXED = ", or `pip install hjson`, which reads it"


class _Object:
    """A JSON object as read, repeated keys included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def read_source(source: Any) -> tuple[str, dict[str, Any], list[Fault]]:
    """Return (what to call it in messages, a private copy as plain dicts, faults found so far)."""
    if isinstance(source, Mapping):
        origin, value = "configuration", source
    else:
        origin, value = _read_text(source)
    faults: list[Fault] = []
    if not isinstance(value, _Object | Mapping):
        raise ConfigError(f"{origin}: the top level is {show(value)}; it must be a JSON object, {{...}}")
    return origin, _plain(value, (), faults), faults


def _read_text(source: Any) -> tuple[str, Any]:
    if isinstance(source, bytes):
        source = source.decode("utf-8", "replace")
    try:
        name = os.fspath(source)
    except TypeError:
        kind = type(source).__name__
        raise ConfigError(f"configuration: expected a path, a dict or base64 JSON, got {kind}") from None
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not os.path.exists(name):
        return "base64 configuration", _decode_base64(name)
    try:
        with open(name, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); give the path of a JSON file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return name, parse_json(text, name)


def _decode_base64(text: str) -> Any:
    """Decode urlsafe or standard base64; anything else was meant as a path to a file that is not there."""
    remedy = "check the path (it is relative to the current directory), or pass a dict"
    if text.lstrip().startswith("{"):
        raise ConfigError("configuration: this string is JSON itself; pass json.loads(...) of it, or a file's path")
    try:
        packed = text.strip().translate(str.maketrans("+/", "-_")).encode("ascii")
        packed += b"=" * (-len(packed.rstrip(b"=")) % 4) if not packed.endswith(b"=") else b""
        decoded = base64.b64decode(packed, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, UnicodeError, ValueError):
        decoded = ""
    if not decoded.lstrip().startswith("{"):
        raise ConfigError(f"{show(text)}: no such file, and not base64 JSON either; {remedy}")
    return parse_json(decoded, "base64 configuration")


def parse_json(text: str, origin: str) -> Any:
    """Parse JSON, or Hjson; objects come back as `_Object`. ConfigError names line and column and shows the line."""
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        relaxed, nor_hjson = _parse_hjson(text)
        if isinstance(relaxed, _Object):
            return relaxed
        lines = text.splitlines() or [""]
        line = lines[min(error.lineno, len(lines)) - 1]
        start = max(0, error.colno - 60)
        shown = line[start : start + 110].replace("\t", " ")
        mark = " " * (error.colno - 1 - start) + "^"
        advice = _syntax_advice(text, line, error) + nor_hjson
        where = f"{origin}:{error.lineno}:{error.colno}"
        raise ConfigError(f"{where}: not valid JSON: {error.msg}{advice}\n    {shown}\n    {mark}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{origin}: not usable JSON: {error}") from None


def _parse_hjson(text: str) -> tuple[Any, str]:
    """What the text is as Hjson, and why it is none."""
    try:
        hjson = import_module("hjson")
    except ImportError:
        return None, ""
    try:
        return hjson.loads(text, object_pairs_hook=_Object) if text.strip() else None, ""
    except (ValueError, RecursionError) as error:
        return None, f"; nor is it Hjson: {error}"


def _syntax_advice(text: str, line: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].lstrip()
    before = text[: error.pos].rstrip()
    if not text.strip():
        return "; the file is empty"
    if rest.startswith(("//", "/*", "#")):
        return f"; JSON has no comments: remove this one{_RELAXED}"
    if (before.endswith(",") and rest.startswith(("}", "]"))) or rest.startswith((",}", ",]")):
        return f"; remove the comma before the closing bracket{_RELAXED}"
    if rest.startswith(",") and rest[1:].lstrip().startswith(("}", "]")):
        return f"; remove the comma before the closing bracket{_RELAXED}"
    if rest.startswith("'") or (before.endswith(("{", ",")) and rest[:1].isalpha()):
        return f"; keys and strings take double quotes{_RELAXED}"
    for wrong, right in (("True", "true"), ("False", "false"), ("None", "null")):
        if rest.startswith(wrong):
            return f"; write {right}"
    return ""


def _plain(value: Any, path: KeyPath, faults: list[Fault]) -> Any:
    """Copy containers into plain dicts and lists, recording keys that repeat or are no strings. Leaves are kept."""
    if len(path) > _DEEPEST:
        faults.append(Fault(path, MISSING, f"nested more than {_DEEPEST} levels deep", "flatten it"))
        return None
    if isinstance(value, _Object | Mapping):
        pairs = value.pairs if isinstance(value, _Object) else list(value.items())
        result: dict[str, Any] = {}
        for name, inner in pairs:
            where = (*path, name)
            if not isinstance(name, str):
                kind = type(name).__name__
                faults.append(Fault(where, MISSING, f"keys are strings, and this one is of type {kind}", "quote it"))
                continue
            copied = _plain(inner, where, faults)
            if name in result:
                both = f"{show(result[name])} and {show(copied)}"
                problem = f"the key is given more than once ({both})"
                faults.append(Fault(where, MISSING, problem, f"keep one {dotted((name,))}"))
            result[name] = copied
        return result
    if isinstance(value, list | tuple):
        return [_plain(inner, (*path, index), faults) for index, inner in enumerate(value)]
    return value


def copy_tree(value: Any) -> Any:
    """Copy dicts and lists and keep leaves, which may be objects that cannot be copied (process groups)."""
    if isinstance(value, dict):
        return {name: copy_tree(inner) for name, inner in value.items()}
    return [copy_tree(inner) for inner in value] if isinstance(value, list) else value
