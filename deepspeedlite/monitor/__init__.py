"""Where training's numbers go: TensorBoard, Weights & Biases and CSV files, behind one `Monitor`.

Each writer is one file with the interface of writer.py; none imports its package until the config enables it.
"""

from __future__ import annotations

from deepspeedlite.metrics.monitor.registry import Monitor
from deepspeedlite.metrics.monitor.writer import Event

__all__ = ["Event", "Monitor"]
