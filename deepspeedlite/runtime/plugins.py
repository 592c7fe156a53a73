"""What rooms outside the core add to it, by kind and name: the core asks for them and knows none.

The package's root adds them, the one place that knows every room, before anything else of the package runs. So all
ranks have the same. Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any


class Plugins:
    """Where each plug-in is, as `package.module:attribute`."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], str] = {}

    def add(self, kind: str, name: str, place: str) -> None:
        """Have `find` give what is at `place`."""
        self._places[kind, name] = place

    def find(self, kind: str, name: str) -> Any:
        """The plug-in of this name; None where there is none."""
        module, _, attribute = self._places.get((kind, name), "").partition(":")
        return getattr(importlib.import_module(module), attribute) if module else None


plugins = Plugins()
