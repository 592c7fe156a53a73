"""What public code imports from DeepSpeed, or reaches from it: which names work, and which say why they do not.

client_names.txt lists them, each with what it is here:

    works       it is there, and does what DeepSpeed's does, or what docs/compatibility.md says
    later       of a capability that is not here; it can be imported, and says why when it is used
    internal    of DeepSpeed's own making; likewise
"""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import deepspeedlite
from deepspeedlite.compat.drop_in import table
from deepspeedlite.compat.drop_in.absent import Absent
from deepspeedlite.compat.drop_in.modules import INTERNAL

LINES = Path(__file__).with_name("client_names.txt").read_text().splitlines()
NAMES = dict(line.split() for line in LINES if line and not line.startswith("#"))


def kind(name: str) -> str:
    """What a name is here. It may be a module, which nobody has imported yet, or an attribute of an attribute."""
    found: object = deepspeedlite
    for part in name.split("."):
        found = getattr(found, part)
        if isinstance(found, Absent):
            return "internal" if found.why.endswith(INTERNAL) else "later"
    path = table.canonical(name)
    if isinstance(found, ModuleType) and path not in table.modules() and found.__name__ == f"deepspeedlite.{path}":
        return "internal" if table.why_absent(*path.rpartition(".")[::2]) == INTERNAL else "later"
    return "works"


def test_names_are_what_the_list_says() -> None:
    """Whoever makes one work says so in the list."""
    assert {name: kind(name) for name in NAMES} == NAMES


def test_names_are_counted() -> None:
    """Those that work, those of capabilities that are not here, and those of DeepSpeed's own making."""
    assert Counter(NAMES.values()) == {"works": 183, "later": 56, "internal": 5}


def test_scripts_import_them_all() -> None:
    """As `from module import name` for names of modules, and as `import module`."""
    for name in NAMES:
        parent, _, last = name.rpartition(".")
        try:
            module = importlib.import_module(f"deepspeedlite.{parent}".rstrip("."))
        except ModuleNotFoundError:
            continue  # an attribute of a class or function
        exec(f"from {module.__name__} import {last}", {})
