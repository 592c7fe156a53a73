"""Text that is always there: the Python standard library's own sources, as bytes.

Files are taken in the order of their paths until there is enough text, so every rank and every run with the same
Python reads the same bytes. One file in twenty is kept apart to validate with. A sample is a window of the text
and the same window one byte on; windows are views of one uint8 buffer.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "encodings",
}
VALIDATION_EVERY, VALIDATION_FIRST = 20, 4  # early enough that a small share of the text has some, too


class Windows(Dataset):
    """Consecutive windows of a text: item i is (tokens, targets), both int64 (context,), targets one byte ahead."""

    def __init__(self, text: bytes | bytearray, context: int) -> None:
        """Raises ValueError when the text is too short for one window."""
        if len(text) <= context:
            raise ValueError(f"a text of {len(text)} bytes has no window of {context} + 1 bytes")
        self.context = context
        self.bytes_n = torch.frombuffer(bytearray(text) if isinstance(text, bytes) else text, dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.bytes_n) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context
        window = self.bytes_n[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def library_text(limit_bytes: int, folder: Path | None = None) -> tuple[bytearray, bytearray]:
    """Text to train on and text to validate with, `limit_bytes` together (less where the library has less).

    Raises:
        FileNotFoundError: this Python came without its sources.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    train, validation = bytearray(), bytearray()
    for number, path in enumerate(_sources(folder)):
        left_bytes = limit_bytes - len(train) - len(validation)
        if left_bytes <= 0:
            break
        part = validation if number % VALIDATION_EVERY == VALIDATION_FIRST else train
        part += path.read_bytes()[:left_bytes]
    if not train or not validation:
        raise FileNotFoundError(f"{folder} has too few .py files to train on; give another folder of sources")
    return train, validation


def _sources(folder: Path) -> Iterator[Path]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # os.walk goes on into these, in this order
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))
