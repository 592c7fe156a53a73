"""Where training's numbers go: TensorBoard, Weights & Biases and CSV files, behind one `Monitor`.

Each writer is one file with the interface of writer.py; none imports its package until the config enables it.
"""

from deepspeedlite.monitor.monitor import Monitor
from deepspeedlite.monitor.writer import Event

__all__ = ["Event", "Monitor"]
