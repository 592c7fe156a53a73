"""What every monitor writer is: `write` a batch of numbers, `flush`, `close`.

Also the pieces writers share: their folder, and the one error for a package that is not installed or a folder that
cannot be made.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Protocol, TypeAlias

import torch

from deepspeedlite.config.sections.monitors import TensorBoard
from deepspeedlite.runtime.errors import ConfigError

Event: TypeAlias = "tuple[str, float | int | torch.Tensor, int]"
"""(tag, value, step). The value is a number or a tensor of one element; the engine's step is global samples."""

Point: TypeAlias = "tuple[str, float, int]"
"""An event whose value has reached the host."""


class Writer(Protocol):
    """One destination."""

    def write(self, points: list[Point]) -> None:
        """Hand over points so that a process killed afterwards has not lost them, where the destination allows."""

    def flush(self) -> None:
        """Push out whatever is still held."""

    def close(self) -> None:
        """Flush and let go of files and threads; called once."""


def require(section: str, module: str, package: str) -> ModuleType:
    """Import `module` for a config section that is enabled.

    Raises:
        ConfigError: the import fails; names the config key, the package and the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{section}.enabled is true, but the package {package!r} cannot be imported ({error}); "
            f"run `pip install {package}`, or set {section}.enabled to false"
        ) from error


def make_folder(section: str, config: TensorBoard) -> str:
    """Create `output_path/job_name` and return it; an empty output_path is the current directory.

    Raises:
        ConfigError: it cannot be created.
    """
    folder = os.path.join(config.output_path or "", config.job_name)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{section}: cannot create {os.path.abspath(folder)!r} ({error.strerror}); "
            f"change {section}.output_path or {section}.job_name"
        ) from error
    return folder
