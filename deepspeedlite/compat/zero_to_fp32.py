"""Whole fp32 weights from a checkpoint, under DeepSpeed's names and with its arguments."""

from __future__ import annotations

from typing import Any

import torch

from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.hugging_face.weights import export_weights, parse_bytes, state_dict_of


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: Any = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, torch.Tensor]:
    """All weights as fp32 CPU tensors, tied ones under each name. (`lazy_mode` changes nothing: they are read at once.)

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    with open_checkpoint(checkpoint_dir, tag) as reader:
        return state_dict_of(reader, trained_only=exclude_frozen_parameters)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    max_shard_size: str | int = "5GB",
    safe_serialization: bool = False,
    tag: Any = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write fp32 weights into the new folder `output_dir`, in Hugging Face's layout; one shard is in memory at a time.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or `output_dir` exists.
    """
    with open_checkpoint(checkpoint_dir, tag) as reader:
        export_weights(
            reader,
            output_dir,
            max_shard_bytes=parse_bytes(max_shard_size),
            trained_only=exclude_frozen_parameters,
            as_torch=not safe_serialization,
        )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str, tag: Any = None
) -> torch.nn.Module:
    """Load fp32 weights into a model that no engine holds, and return it. It must be the one that was saved."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model.cpu().load_state_dict(state)
    return model
