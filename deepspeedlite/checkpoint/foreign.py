"""What the core is told of other programs' checkpoints, knowing none itself; `formats` has those there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from deepspeedlite.checkpoint.reader import Reader

Groups = Sequence[Sequence[str]]


class ForeignFormat(Protocol):
    """Checkpoints of another program: they load where they lie, and no save touches them."""

    @property
    def program(self) -> str:
        """Whose they are, in messages."""

    def recognises(self, tag_dir: Path) -> bool:
        """Whether a folder is one of them; it need not be whole."""

    def open(self, tag_dir: Path, groups: Groups | None) -> Reader:
        """A reader of it. `groups`: the names of each param group's parameters, where they are known."""


@dataclass(frozen=True)
class Formats:
    """The formats besides our own; none by default.

    `companion` is a program that a save leaves a copy of beside its tag, for users that look for it there.
    """

    readers: tuple[ForeignFormat, ...] = ()
    companion: Path | None = None

    def of(self, tag_dir: Path) -> ForeignFormat | None:
        """The one that recognises a folder."""
        return next((found for found in self.readers if found.recognises(tag_dir)), None)

    @property
    def reserved(self) -> tuple[str, ...]:
        """Names that no tag can have."""
        return (self.companion.name,) if self.companion else ()
