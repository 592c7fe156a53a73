"""Which modules and names the release of DeepSpeed has, from deepspeed_names.json: read when the table lacks something.

`tools/deepspeed_names.py` writes the file, and explains what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple


class Module(NamedTuple):
    """What one module of DeepSpeed has."""

    names: frozenset[str]
    """Those that it defines."""
    values: Mapping[str, Any]
    """Constants."""
    origins: Mapping[str, tuple[str, str]]
    """name -> the module that it is imported from, and its name there."""
    all_of: tuple[str, ...]
    """Modules whose public names it has, by `import *`."""

    def origins_of(self, name: str) -> list[tuple[str, str]]:
        """The modules that it has `name` from, and its name there."""
        named = [self.origins[name]] if name in self.origins else []
        return [*named, *((other, name) for other in self.all_of if name in names_of(other))]


@cache
def _lines() -> Mapping[str, Mapping[str, Any]]:
    import json  # neither is needed by who imports the package alone
    from pathlib import Path

    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("deepspeed_names.json").read_text())
    return found


def paths() -> list[str]:
    """All modules."""
    return list(_lines())


@cache
def module(path: str) -> Module | None:
    """A module; None where DeepSpeed has none of this path."""
    line = _lines().get(path)
    if line is None:
        return None
    origins = {}
    for source, names in line.get("from", {}).items():
        for given in names.split():
            there, _, here = given.partition("=")
            origins[here or there] = (source, there)
    values = {**line.get("values", {}), **{name: tuple(value) for name, value in line.get("tuples", {}).items()}}
    names = frozenset(line.get("names", "").split())
    return Module(names, values, origins, tuple(line.get("all_of", "").split()))


def names_of(path: str) -> set[str]:
    """The public names that `import *` gives, but for what a module has from elsewhere than DeepSpeed."""
    found = module(path)
    if found is None:
        return set()
    names = {*found.names, *found.values, *found.origins}
    for other in found.all_of:
        names |= names_of(other)
    return {name for name in names if not name.startswith("_")}
