"""Writes down which modules and names a release of DeepSpeed has: `deepspeedlite/compat/drop_in/deepspeed_names.json`.

    python tools/deepspeed_names.py ENV/lib/python3.11/site-packages/deepspeed

Its sources are parsed and not imported, and nothing but facts is kept: the names that each module defines, those that
it has from other modules, and the values of constants (written in capitals, assigned once). Prose is left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deepspeedlite" / "compat" / "drop_in" / "deepspeed_names.json"
LONGEST_TEXT = 80  # a key or a file's name is shorter; help texts are not facts about names


class Source:
    """One module: what it defines, the values of its constants, and what it has from where."""

    def __init__(self, package: Path, file: Path) -> None:
        parts = file.relative_to(package).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.path = ".".join(parts[:-1] if self.is_package else parts)
        self.names: set[str] = set()
        self.assigned: dict[str, list[ast.expr | None]] = {}
        self.origins: dict[str, tuple[str, str]] = {}  # name here -> (module, name there)
        self.foreign: set[str] = set()  # names that are imported from other packages
        self.all_of: list[str] = []
        self.values: dict[str, Any] = {}
        for statement in _statements(ast.parse(file.read_text()).body):
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self.names.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                if isinstance(target, ast.Name):
                    self.assigned.setdefault(target.id, []).append(statement.value)
                if isinstance(target, ast.Name) and target.id == "__all__" and isinstance(statement.value, ast.List):
                    # Some are made when they are first asked for, and stand nowhere else.
                    self.names.update(ast.literal_eval(statement.value))
        elif isinstance(statement, ast.ImportFrom):
            source = self._source(statement)
            for alias in statement.names:
                if source is None:
                    self.foreign.add(alias.asname or alias.name)
                elif alias.name == "*":
                    self.all_of.append(source)
                else:
                    self.origins[alias.asname or alias.name] = (source, alias.name)

    def _source(self, statement: ast.ImportFrom) -> str | None:
        named = statement.module.split(".") if statement.module else []
        if not statement.level:
            return ".".join(named[1:]) if named[0] == "deepspeed" else None
        package = self.path.split(".") if self.path else []
        up = statement.level - self.is_package
        return ".".join(package[: len(package) - up] + named)

    def as_json(self) -> dict[str, Any]:
        """What is kept, in as few words as possible: lists of names are texts, `there=here` where the two differ."""
        values = {name: value for name, value in sorted(self.values.items()) if not name.startswith("__")}
        names = (self.names | self.assigned.keys()) - self.values.keys() - self.origins.keys()
        tuples = {name: values.pop(name) for name, value in self.values.items() if isinstance(value, tuple)}
        origins: dict[str, list[str]] = {}
        for name, (module, there) in sorted(self.origins.items()):
            if not name.startswith("_"):
                origins.setdefault(module, []).append(name if name == there else f"{there}={name}")
        found = {
            "names": " ".join(sorted(name for name in names if not name.startswith("__"))),
            "values": values,
            "tuples": tuples,
            "from": {module: " ".join(given) for module, given in sorted(origins.items())},
            "all_of": " ".join(self.all_of),
        }
        return {key: value for key, value in found.items() if value}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, and of the branches that it may take when it is imported."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _is_fact(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_TEXT and "\n" not in value
    if isinstance(value, (list, tuple, dict)) and not value:
        return False  # to be filled
    if isinstance(value, (list, tuple)):
        return all(map(_is_fact, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_fact(kept) for key, kept in value.items())
    return value is None or isinstance(value, (bool, int, float))


def find_values(sources: dict[str, Source]) -> None:
    """Fill `values`: constants may be made of others, of other modules too."""

    def value_of(module: str, name: str) -> Any:
        source = sources[module]
        if name not in source.values:
            if name in source.origins:
                return value_of(*source.origins[name])
            if name not in source.assigned:
                other = next((one for one in source.all_of if known(one, name)), None)
                if other is None:
                    raise LookupError(name)
                return value_of(other, name)
            [expression] = source.assigned[name]
            if expression is None or not name.isupper():
                raise LookupError(name)
            inside = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
            code = compile(ast.Expression(expression), module, "eval")
            value = eval(code, {"__builtins__": {}, **{one: value_of(module, one) for one in inside}})
            if not _is_fact(value):
                raise LookupError(name)
            source.values[name] = value
        return source.values[name]

    def known(module: str, name: str) -> bool:
        source = sources[module]
        return name in source.assigned or name in source.origins or any(known(one, name) for one in source.all_of)

    for module, source in sources.items():
        for name in source.assigned:
            try:
                value_of(module, name)
            except (LookupError, ValueError, NameError, TypeError, AttributeError):
                continue  # made when it is imported: a name without a value


def render(package: Path) -> str:
    """The file's text: a line for each module."""
    sources = {source.path: source for source in (Source(package, file) for file in sorted(package.rglob("*.py")))}
    find_values(sources)
    for source in sources.values():
        for name, (module, there) in tuple(source.origins.items()):
            if there in sources[module].foreign:
                del source.origins[name]
    lines = [f"{json.dumps(path)}: {json.dumps(source.as_json())}" for path, source in sorted(sources.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the folder of an installed DeepSpeed")
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()
    args.output.write_text(render(args.package))
    return 0


if __name__ == "__main__":
    sys.exit(main())
