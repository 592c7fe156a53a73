"""`load_config`: from a source to a checked `DeepSpeedConfig`, or to one ConfigError with everything that is wrong.

Stages, each adding to one list of faults: read (source), older spellings (a plug-in), placeholders, types and unknown
keys (pydantic), features of this release (features), contradictions (rules), the batch triangle (batch). A value at
fault is taken out and the rest checked again, so no mistake hides another.

[Note: "auto"]
A client such as transformers' Trainer writes "auto" for what it will fill in before `initialize`. Whoever reads a
configuration before that (`zero.Init`, `config check`) does so with `peek=True`: such a key is left open, neither right
nor wrong. Where the values count, what is still "auto" is a fault. Where there is a plug-in for
DeepSpeed's rules it means the default, and unknown keys at the top level are passed over; both are said once.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from deepspeedlite.config.base import Section
from deepspeedlite.config.batch import NAMES, batch_problem
from deepspeedlite.config.faults import MISSING, Fault, KeyPath, Origin, dotted, raise_faults
from deepspeedlite.config.keys import default_of, inner_section, kind_of, standing
from deepspeedlite.config.recipes import OTHER_NAMES, Faults, optimizer_faults, refused_combination, scheduler_faults
from deepspeedlite.config.root import DeepSpeedConfig
from deepspeedlite.config.rules import RULES
from deepspeedlite.config.source import copy_tree, read_source
from deepspeedlite.runtime.log import log_dist_once, log_once
from deepspeedlite.runtime.plugins import plugins
from deepspeedlite.runtime.text import nearest

AUTO = "auto"
_NEAR = 0.72  # how like a known key an unknown one must be: many keys are alike
AUTO_REMEDY = (
    'give a value: "auto" is a placeholder that the Hugging Face Trainer or Accelerate replaces before it calls '
    "`initialize`"
)


class Examined(NamedTuple):
    """What `examine` found: a name for messages, the model (of what is right), and the faults."""

    origin: str
    config: DeepSpeedConfig
    faults: list[Fault]


def load_config(
    source: str | os.PathLike | Mapping[str, Any] | DeepSpeedConfig,
    world_size: int | None = None,
    *,
    peek: bool = False,
    handed: Collection[str] = (),
) -> DeepSpeedConfig:
    """Read and check a configuration.

    Args:
        source: path of a JSON file, a dict (not changed), JSON in base64, or a configuration already loaded.
        world_size: data-parallel ranks; if given, the batch sizes are solved for it too.
        peek: the configuration may not be filled in yet; what is "auto" is left open. See the note above.
        handed: "optimizer", "scheduler": sections in whose place there is an object, so that they are not looked into.

    Raises:
        ConfigError: lists every fault, one per line, with the key's full path, its value and the remedy.
    """
    if isinstance(source, DeepSpeedConfig):
        if world_size is not None:
            source.batch(world_size)
        return source
    unused = ("optimizer", "scheduler") if peek else handed
    origin, config, faults = examine(
        source, world_size, peek=peek, pass_over=plugins.find("configuration", "pass over"), handed=unused
    )
    if faults:
        raise_faults(origin, faults)
    if not peek:
        for hint in config.hints:
            log_once(f"configuration: {hint}")
        for line in config.passed_over:
            log_dist_once(f"configuration: {line}", level=logging.WARNING)
    return config


def examine(
    source: Any,
    world_size: int | None = None,
    *,
    peek: bool = False,
    pass_over: Callable[[dict[str, Any]], list[str]] | None = None,
    handed: Collection[str] = (),
) -> Examined:
    """Do all of `load_config`'s work, and return faults instead of raising. Unreadable sources still raise.

    `pass_over` takes out what is passed over, and gives a line about each; what is still "auto" then is so too.
    """
    origin, raw, faults = read_source(source)
    tree = typing.cast(dict[str, Any], copy_tree(raw))
    modernise = plugins.find("older spellings", "rewrite")
    found = Findings(modernise(tree, faults) if modernise is not None else {}, faults, peek)
    unknown = [] if pass_over is None else pass_over(tree)
    placeholders(tree, DeepSpeedConfig, (), found, peek or pass_over is not None)
    config: DeepSpeedConfig = validate(tree, found, DeepSpeedConfig)
    hints: dict[str, list[str]] = {}
    check_features(config, (), found, hints)
    look_at_optimizer = functools.partial(_optimizer_faults, sharded=config.zero_optimization.stage > 0)
    for name, look in (("optimizer", look_at_optimizer), ("scheduler", scheduler_faults)):
        if name not in handed and getattr(config, name) is not None:
            _check_recipe(name, getattr(config, name), look, found)
    if world_size is not None:
        _check_batch(config, world_size, found)
    for rule in RULES:
        paths = [tuple(name.split(".")) for name in rule.keys]
        if any(found.covers(path) or path in found.open for path in paths) or not rule.broken(config):
            continue
        if rule.remedy:
            found.add(paths[0], _value_at(tree, paths[0]), rule.problem, rule.remedy)
        else:
            hints[rule.problem] = [rule.keys[0]]
    config._raw = raw
    config._hints = tuple(f"{', '.join(keys)}: {note}" for note, keys in hints.items())
    config._left_open = tuple(dotted(found.as_written(path)[0]) for path in found.open)
    if config._left_open:
        unknown.append(f'{", ".join(config._left_open)}: still "auto", so the default counts')
    config._passed_over = tuple(unknown)
    return Examined(origin, config, faults)


def _optimizer_faults(type: str, params: Mapping[str, Any], sharded: bool) -> Faults:
    combination = refused_combination(type, params)
    return optimizer_faults(type, params, sharded) or (
        [(("params", combination[0]), combination[1])] if combination else []
    )


def _check_recipe(name: str, section: Any, look: Callable[[str, Mapping[str, Any]], Faults], found: Findings) -> None:
    """Look into a section that names an optimizer or a schedule and its parameters."""
    for path, problem in look(section.type, section.params):
        where = (name, *path)
        if not (found.peek and where in found.open):
            found.add(where, section.type if path == ("type",) else MISSING, problem)


class Findings:
    """The faults so far, by path: knows which keys are already at fault, and how the user spelled each."""

    def __init__(self, moved: dict[KeyPath, Origin], faults: list[Fault], peek: bool = False) -> None:
        self.moved = moved
        self.faults = faults
        self.peek = peek
        self.paths: set[KeyPath] = set()
        self.open: dict[KeyPath, None] = {}  # keys that are "auto" and may be, in the file's order

    def add(self, path: KeyPath, value: Any, problem: str, remedy: str = "") -> None:
        """Record a fault unless the key, or one that holds it, has one."""
        if self.covers(path):
            return
        self.paths.add(path)
        written, value = self.as_written(path, value)
        self.faults.append(Fault(written, value, problem, remedy))

    def covers(self, path: KeyPath) -> bool:
        """True if the key or an object that it is in is at fault."""
        return any(path[:length] in self.paths for length in range(1, len(path) + 1))

    def as_written(self, path: KeyPath, value: Any = MISSING) -> tuple[KeyPath, Any]:
        """A key's path and value as they stand in the source."""
        for length in range(len(path), 0, -1):
            origin = self.moved.get(path[:length])
            if origin is not None:
                return (origin.path + path[length:], value) if origin.value is MISSING else origin
        return path, value


def placeholders(node: Any, model: type[Section] | None, path: KeyPath, found: Findings, may_be: bool) -> None:
    """Take out "auto" where no key allows it, NaN in free-form objects, and null where a section may stand.

    `may_be`: "auto" is left open, and no fault; so is a list that holds one.
    """
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    for name, value in items:
        where = (*path, name)
        field = model.model_fields.get(str(name)) if model is not None and isinstance(node, dict) else None
        inner = inner_section(field.annotation) if field is not None else model if isinstance(node, list) else None
        allowed = field is not None and '"auto"' in kind_of(field)
        is_auto = isinstance(value, str) and value == AUTO
        if (
            may_be
            and isinstance(node, dict)
            and not allowed
            and (is_auto or (isinstance(value, list) and AUTO in value))
        ):
            found.open[where] = None
            del node[name]
        elif is_auto and not allowed:
            found.add(where, value, "is not a value", AUTO_REMEDY)
        elif field is None and model is None and isinstance(value, float) and math.isnan(value):
            found.add(where, value, "is not a number", "give a number")
        elif value is None and field is not None and isinstance(default_of(field), Section):
            del node[name]
        elif isinstance(value, dict | list):
            placeholders(value, inner, where, found, may_be)
    for bad in [place for place in found.paths if place[:-1] == path and len(place) == len(path) + 1]:
        if isinstance(node, dict):
            node.pop(bad[-1], None)


def validate(tree: dict[str, Any], found: Findings, root: type[Section]) -> Any:
    """Validate, as one of `root`; record each error and take its key out until what is left is valid."""
    while True:
        try:
            return root.model_validate(tree)
        except ValidationError as error:
            faulty = [_explain(item, tree, found, root) for item in error.errors(include_url=False)]
        for path in faulty:
            _remove(tree, path)


def _explain(item: Any, tree: dict[str, Any], found: Findings, root: type[Section]) -> KeyPath:
    """Record one of pydantic's errors in our words. Returns the path to take out before the next try."""
    path: list[Any] = []
    model: type[Section] | None = root
    owner: type[Section] = root
    field: FieldInfo | None = None
    node: Any = tree
    last = len(item["loc"]) - 1
    for position, part in enumerate(item["loc"]):
        if isinstance(node, dict) and (part in node or (item["type"] == "missing" and position == last)):
            owner = model or owner
            field = owner.model_fields.get(str(part))
            model = inner_section(field.annotation) if field is not None else None
        elif not (isinstance(node, list) and isinstance(part, int)):
            continue  # the name of a union's arm
        path.append(part)
        node = node.get(part) if isinstance(node, dict) else node[part]
    while path and isinstance(path[-1], int):
        path.pop()
    where = tuple(path)
    value = _value_at(tree, where)
    if item["type"] == "extra_forbidden":
        found.add(where, value, "unknown key", known_key(where, owner, root))
    elif item["type"] == "missing":
        if found.peek and where in found.open:
            return where[:-1]
        doc = field.description if field is not None else ""
        found.add(where, MISSING, "is not given", f"it names: {doc}")
        return where[:-1]
    elif field is not None:
        found.add(where, value, f"must be {kind_of(field)}", _type_advice(value, field))
    return where


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return tree


def _remove(tree: Any, path: KeyPath) -> None:
    while path and isinstance(path[-1], int):
        path = path[:-1]
    holder = _value_at(tree, path[:-1])
    if isinstance(holder, dict):
        holder.pop(path[-1], None)


@functools.cache
def _places(root: type[Section]) -> dict[str, list[str]]:
    """Each key's name to the sections that have it."""
    places: dict[str, list[str]] = {}

    def look(section: type[Section], parent: str) -> None:
        for name, field in section.model_fields.items():
            places.setdefault(name, []).append(parent)
            if (inner := inner_section(field.annotation)) is not None:
                look(inner, f"{parent}.{name}".lstrip(".") + "[]" * kind_of(field).startswith("a list"))

    look(root, "")
    return places


def known_key(path: KeyPath, owner: type[Section], root: type[Section] = DeepSpeedConfig) -> str:
    """What an unknown key was probably meant to be."""
    name = str(path[-1])
    parent = tuple(part for part in path[:-1] if isinstance(part, str))
    older_names = plugins.find("older spellings", "names")
    known = {*owner.model_fields, *(older_names(parent) if older_names is not None else ())}
    elsewhere = [place for place in _places(root).get(name, ()) if place != ".".join(parent)]
    match = nearest(name, known, _NEAR)
    if name in OTHER_NAMES and not parent:
        return OTHER_NAMES[name]
    outer, _, inner = name.rpartition(".")
    if outer and outer in _places(root).get(inner, ()):
        return f"{inner} goes into the object {outer}, and a dot does not lead there"
    if len(elsewhere) == 1:
        return f"it belongs in {elsewhere[0]}" if elsewhere[0] else "it belongs at the top level"
    if match is not None:
        return f"did you mean {dotted((*path[:-1], match))}?"
    if "params" in owner.model_fields:
        return f"parameters of the {dotted(path[:-1])} go into {dotted((*path[:-1], 'params'))}"
    if (far := nearest(name, _places(root), _NEAR)) is not None:
        place = _places(root)[far][0]
        return f"did you mean {place}.{far}?" if place else f"did you mean {far}?"
    return "remove it"


def _type_advice(value: Any, field: FieldInfo) -> str:
    """How a value of the wrong type may have come about."""
    if value is None:
        return "leave the key out for its default"
    if not isinstance(value, str):
        return ""
    match = nearest(value, _words(field.annotation), _NEAR)
    if match is not None:
        return f'did you mean "{match}"?'
    bare = value.strip()
    if bare.lower() in ("true", "false", "null"):
        return f"write {bare.lower()} without quotes"
    try:
        number = float(bare)
    except ValueError:
        return ""
    return f"write {bare} without quotes" if math.isfinite(number) else ""


def _words(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [word for word in typing.get_args(annotation) if isinstance(word, str)]
    return [word for argument in typing.get_args(annotation) for word in _words(argument)]


def _asks(value: Any, default: Any) -> bool:
    """True if a refused key's value asks for its feature. Free-form objects may carry `enabled` switches."""
    if value == default or (default is None and value is False):
        return False
    if isinstance(value, dict):
        switches = list(_switches(value))
        return any(switches) if switches else bool(value)
    return True


def _switches(node: Any) -> typing.Iterator[bool]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "enabled":
                yield bool(value)
            else:
                yield from _switches(value)


def check_features(section: Section, path: KeyPath, found: Findings, hints: dict[str, list[str]]) -> None:
    """Refuse what this release does not do, and note the given keys that change nothing."""
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        where, value = (*path, name), getattr(section, name)
        default = default_of(field)
        status, note = standing(field)
        if isinstance(value, Section):
            by_presence = default is None and status == "refused"
            _section_features(value, where, note if by_presence else "", found, hints)
        elif status == "refused" and _asks(value, default):
            found.add(where, value, note)
        elif status == "hint":
            hints.setdefault(note, []).append(dotted(found.as_written(where)[0]))
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    check_features(item, (*where, index), found, hints)


def _section_features(
    section: Section, path: KeyPath, refusal: str, found: Findings, hints: dict[str, list[str]]
) -> None:
    """`refusal` is the note of a section whose mere presence asks for a feature that is refused."""
    if section.switched_off():
        return
    if refusal:
        found.add(path, MISSING, refusal)
        return
    if section.SWITCH is not None:
        status, note = standing(type(section).model_fields[section.SWITCH])
        if status == "refused":
            found.add((*path, section.SWITCH), getattr(section, section.SWITCH), note)
            return
    check_features(section, path, found, hints)


def _check_batch(config: DeepSpeedConfig, world_size: int, found: Findings) -> None:
    paths: list[KeyPath] = [(name,) for name in NAMES]
    if any(found.covers(path) for path in paths) or (found.peek and any(path in found.open for path in paths)):
        return
    problem = batch_problem(
        config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps, world_size
    )
    if problem is not None:
        found.faults.append(Fault((), MISSING, problem))
        found.paths.update(paths)
