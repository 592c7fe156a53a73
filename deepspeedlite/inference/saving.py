"""`save_mp_checkpoint_path`: a model's weights in one file, with a description that `checkpoint` takes.

The file is whole, as each rank reads of a checkpoint only what it keeps: any number of ranks may load it, in any dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from deepspeedlite.comm import Group
from deepspeedlite.runtime.log import log_dist

DESCRIPTION = "ds_inference_config.json"
"""DeepSpeed's name for what describes a checkpoint."""
_WEIGHTS = "pytorch_model.bin"


def save_weights(model: torch.nn.Module, folder: str, *, is_to_be_loaded: bool) -> None:
    """Write a model's weights on rank 0, as they are; each file appears when it is complete.

    Args:
        model: not split, fused or quantized yet. All ranks call it, since reading a sharded one's weights needs them.
        folder: is made where there is none.
        is_to_be_loaded: a checkpoint has the weights, not the model: nothing is written.
    """
    if is_to_be_loaded:
        log_dist(f"save_mp_checkpoint_path: nothing is written to {folder}: the weights are in `checkpoint`")
        return
    values = model.state_dict()
    if Group().rank:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _put(path / _WEIGHTS, lambda at: torch.save({name: value.detach() for name, value in values.items()}, at))
    described = {"type": "ds_model", "checkpoints": [_WEIGHTS], "version": 1.0}
    _put(path / DESCRIPTION, lambda at: at.write_text(json.dumps(described), "utf-8"))
    log_dist(f"save_mp_checkpoint_path: the weights are in {path}; load them by checkpoint={path / DESCRIPTION}")


def _put(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
