"""What an engine saves and loads through; the rest of the room is imported when it first does, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.train_state import LoadOptions, TrainState
from deepspeedlite.config.sections.storage import Checkpoint
from deepspeedlite.runtime.plugins import plugins

if TYPE_CHECKING:
    from deepspeedlite.checkpoint.save import Saver


OWN = "deepspeedlite"  # of `checkpoint.format`


class Checkpoints:
    """Saves and loads the states of one engine, one after the other."""

    def __init__(self, settings: Checkpoint, formats: Formats) -> None:
        self._settings, self._formats = settings, formats
        self._ranks = Ranks()  # one, whose meetings are counted, for saves and loads
        # Made by the first save, and kept for the memory that later ones write from. A plug-in may refuse at once.
        self._saver: Saver | None = None if settings.format == OWN else self._make_saver()

    def _make_saver(self) -> Saver:
        from deepspeedlite.checkpoint.save import Saver

        make = plugins.find("saver", self._settings.format) or Saver
        saver: Saver = make(self._settings, self._ranks, self._formats)
        return saver

    def check(self, state: TrainState) -> None:
        """Raise where the layout that is asked for cannot hold these states."""
        if self._saver is not None:
            self._saver.check(state)

    def save(self, state: TrainState, save_dir: str, tag: Any, save_latest: bool, exclude_frozen: bool) -> None:
        """See `save.Saver.save`."""
        self._saver = self._saver or self._make_saver()
        self._saver.save(state, save_dir, tag, save_latest, exclude_frozen)

    def load(self, state: TrainState, load_dir: str | Path, tag: Any, options: LoadOptions) -> str | None:
        """Load when no save goes on; see `load.load`."""
        from deepspeedlite.checkpoint.load import load

        self.wait()
        return load(state, load_dir, tag, options, self._ranks, self._formats)

    def wait(self) -> None:
        """Wait for a save in the background; raises `CheckpointError` where it failed."""
        if self._saver is not None:
            self._saver.wait()

    def close(self) -> None:
        """Wait likewise; the process does not look after saves at its end any more."""
        if self._saver is not None:
            self._saver.close()
