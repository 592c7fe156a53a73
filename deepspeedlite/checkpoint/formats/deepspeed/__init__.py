"""DeepSpeed's checkpoints: read in place, and written so that it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepspeedlite.checkpoint.foreign import Groups
from deepspeedlite.checkpoint.formats.deepspeed.layout import is_deepspeed

if TYPE_CHECKING:
    from deepspeedlite.checkpoint.reader import Reader


class DeepSpeedFormat:
    """What the core is told of them; see `ForeignFormat`."""

    program = "DeepSpeed"

    def recognises(self, tag_dir: Path) -> bool:
        """Whether DeepSpeed wrote a tag."""
        return is_deepspeed(tag_dir)

    def open(self, tag_dir: Path, groups: Groups | None) -> Reader:
        """See `reader.DeepSpeedReader`."""
        from deepspeedlite.checkpoint.formats.deepspeed.reader import DeepSpeedReader  # a training need not wait for it

        return DeepSpeedReader(tag_dir, groups)
