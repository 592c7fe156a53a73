"""TensorBoard: scalars into an event file under `output_path/job_name`.

A resumed run adds a further event file to the folder; TensorBoard shows them as one curve.
"""

from __future__ import annotations

from deepspeedlite.config.sections.monitors import TensorBoard
from deepspeedlite.metrics.monitor.writer import Point, make_folder, require

SECTION = "tensorboard"


class TensorBoardWriter:
    """Writes with torch's SummaryWriter, which needs the package `tensorboard`."""

    def __init__(self, config: TensorBoard) -> None:
        require(SECTION, "tensorboard", "tensorboard")
        module = require(SECTION, "torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=make_folder(SECTION, config))

    def write(self, points: list[Point]) -> None:
        """Add the points and hand the file to the operating system, which keeps it if this process is killed."""
        for tag, value, step in points:
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def flush(self) -> None:
        """Nothing is held back: `write` flushes."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file and end its thread."""
        self._writer.close()
