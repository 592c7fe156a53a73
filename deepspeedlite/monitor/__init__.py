"""Where training's numbers go: TensorBoard, Weights & Biases and CSV files, behind one `Monitor`.

Each writer is one file with the interface of writer.py; none imports its package until the config enables it.
"""

from __future__ import annotations

from typing import Any

from deepspeedlite.drop_in.finder import name_of
from deepspeedlite.monitor.monitor import Monitor
from deepspeedlite.monitor.writer import Event

__all__ = ["Event", "Monitor"]


def __getattr__(name: str) -> Any:
    return name_of(__name__, name)
