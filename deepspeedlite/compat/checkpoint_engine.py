"""DeepSpeed's checkpoint engines, of which one does something here: `TorchCheckpointEngine` saves and loads a file.

The engine that `initialize` returns writes its checkpoints itself, see docs/checkpoints.md, and asks none of these.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.compat.consolidate import write_weights


@dataclass
class CheckpointCommitInfo:
    """Which checkpoint is to be written: its tag, its folder, and whether `latest` is to name it."""

    tag: str
    save_dir: str
    save_latest: bool


class CheckpointEngine(ABC):
    """How files of a checkpoint are written and read: for scripts that bring their own."""

    name = ""

    def __init__(self, config_params: Any = None) -> None:
        self.name = type(self).__name__
        self._commit_info: CheckpointCommitInfo | None = None

    @abstractmethod
    def create(self, info: CheckpointCommitInfo) -> None:
        """A checkpoint is begun."""

    @abstractmethod
    def save(self, state_dict: Any, path: str) -> Any:
        """Write one file."""

    @abstractmethod
    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""

    @abstractmethod
    def commit(self, info: CheckpointCommitInfo | None) -> bool:
        """All files of a checkpoint are written; whether it may be used."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this data-parallel rank writes what all of them hold alike."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether files are written by another process."""
        return False

    def set_commit_info(self, info: CheckpointCommitInfo | None) -> None:
        """Remember what is being written."""
        self._commit_info = info

    def get_commit_info(self) -> CheckpointCommitInfo | None:
        """What is being written."""
        return self._commit_info

    def cleanup(self) -> None:
        """Forget what was being written; there is nothing to close."""
        self._commit_info = None

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share memory share it again when they are loaded."""
        return False


class TorchCheckpointEngine(CheckpointEngine):
    """Files of `torch.save`."""

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing is to be prepared."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, whole or not at all. Raises OSError."""
        write_weights(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of tensors and plain data; nothing in it is executed, and other objects are refused."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo | None) -> bool:
        """True: `save` has written the files already."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """True, as torch.save does it."""
        return True
