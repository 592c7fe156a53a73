"""The files of a checkpoint in DeepSpeed's own layout: how they are named, and what scripts read out of them.

`python -m deepspeedlite.checkpoint export` writes that layout; the files of our own have a manifest instead. Nothing in
the files is executed when they are read.

Of a checkpoint of ours there are, for as long as the process runs, two small files that say what it is: the stage, the
number of ranks, counters, schedule and the user's state. Lightning's conversion to fp32 looks these up in them; weights
it takes from `get_fp32_state_dict_from_zero_checkpoint`, as everything should.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed.layout import MODEL_STATES, model_file, optimizer_file
from deepspeedlite.checkpoint.formats.deepspeed.pickles import load_inert, save_for_deepspeed
from deepspeedlite.checkpoint.formats.deepspeed.writer import VERSION
from deepspeedlite.checkpoint.tag import is_checkpoint
from deepspeedlite.runtime.errors import CheckpointError

_MODEL, _OPTIM = "_model_states.pt", "_optim_states.pt"

_FP32_KEYS = {"single_partition_of_fp32_groups", "fp32_flat_groups"}


class MissingFilesError(CheckpointError, FileNotFoundError):
    """A folder has none of the files that a checkpoint in DeepSpeed's layout has."""


class FilesError(CheckpointError, ValueError):
    """Files are not those that were asked for, or not all of them."""


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """The file of a pipeline's layer, of which `layer_id` is the name's beginning, such as `layer_03`."""
    return os.path.join(base_folder, f"{layer_id}-model_{tp_rank:02d}{_MODEL}")


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """The file of a model-parallel rank's weights, buffers and counters; the rank is written as `00`."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}{_MODEL}")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """The file of a rank's part of the optimizer."""
    return os.path.join(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}{_OPTIM}")


def is_ours(checkpoint_dir: str) -> bool:
    """Whether a tag's folder is of a checkpoint of ours, whose files have a manifest."""
    return is_checkpoint(Path(checkpoint_dir), Formats())


def _described(checkpoint_dir: str) -> Path:
    """A folder with the two files that say what a checkpoint of ours is; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="deepspeedlite-checkpoint-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with open_checkpoint(checkpoint_dir) as reader:
        manifest, config = reader.manifest, reader.state("config") or {}
        both = {"ds_config": config, "ds_version": VERSION}
        optimizer = {"zero_stage": manifest.stage, "partition_count": manifest.world_size}
        model = {
            "lr_scheduler": reader.state("lr_scheduler"),
            **{name: int(count) for name, count in (reader.state("engine") or {}).items()},
            "dp_world_size": manifest.world_size // manifest.model_parallel,
            "mp_world_size": manifest.model_parallel,
            **both,
            **(reader.state("client_state") or {}),
        }
    save_for_deepspeed({"optimizer_state_dict": optimizer, **both}, folder / optimizer_file(0, bf16=False))
    save_for_deepspeed(model, folder / MODEL_STATES)
    return folder


def get_checkpoint_files(checkpoint_dir: str, glob_pattern: str) -> list[str]:
    """The files of a tag's folder that match, ranks in the order of their numbers.

    Raises:
        MissingFilesError: there are none.
    """
    found = [str(path) for path in Path(checkpoint_dir).glob(glob_pattern)]
    if not found:
        raise MissingFilesError(
            f"{checkpoint_dir} has no {glob_pattern}: it is no folder of a checkpoint in DeepSpeed's layout; "
            "`python -m deepspeedlite.checkpoint export` writes one"
        )
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def get_optim_files(checkpoint_dir: str) -> list[str]:
    """The files of all ranks' parts of the optimizer; see above. Raises `MissingFilesError`."""
    if is_ours(checkpoint_dir):
        return [str(_described(checkpoint_dir) / optimizer_file(0, bf16=False))]
    return get_checkpoint_files(checkpoint_dir, f"*{_OPTIM}")


def get_model_state_files(checkpoint_dir: str) -> list[str]:
    """The files of weights, buffers and counters; see above. Raises `MissingFilesError`."""
    if is_ours(checkpoint_dir):
        return [str(_described(checkpoint_dir) / MODEL_STATES)]
    return get_checkpoint_files(checkpoint_dir, f"*{_MODEL}")


def get_model_state_file(checkpoint_dir: str, zero_stage: int) -> str:
    """The first rank's file of weights, buffers and counters, as it is named at a ZeRO stage.

    Raises:
        MissingFilesError: it is not there.
    """
    if is_ours(checkpoint_dir):
        return get_model_state_files(checkpoint_dir)[0]
    path = os.path.join(checkpoint_dir, model_file(0, zero_stage))
    if not os.path.exists(path):
        raise MissingFilesError(f"there is no {path}")
    return path


def parse_optim_states(files: Iterable[str], ds_checkpoint_dir: str) -> tuple[int, int, list[Any], Any]:
    """What all ranks' files hold of the fp32 weights; the files are mapped, and their tensors read when they are used.

    Returns:
        The ZeRO stage, the number of ranks, of each rank a list with a flat tensor for each parameter group (of each
        group of sub-groups, at stage 3), and where the files are padded for alignment by how much, else None.

    Raises:
        FilesError: a file is of no sharded optimizer, or the files are not those of all ranks.
        CheckpointError: a file is damaged.
    """
    states = []
    for name in files:
        held = load_inert(Path(name)).get("optimizer_state_dict")
        if not isinstance(held, dict) or "zero_stage" not in held:
            raise FilesError(f"{name} is not of a sharded optimizer")
        states.append(held)
    if not _FP32_KEYS & states[0].keys():
        raise FilesError(
            f"{ds_checkpoint_dir} is no checkpoint in DeepSpeed's layout, whose files hold what is asked for here; "
            "`python -m deepspeedlite.checkpoint export` writes one; weights of this one are read by "
            "get_fp32_state_dict_from_zero_checkpoint"
        )
    stage, world_size = states[0]["zero_stage"], states[0]["partition_count"]
    # A count for each parameter group: all alike where there are no experts.
    world_size = max(world_size) if isinstance(world_size, list) else world_size
    if world_size != len(states):
        raise FilesError(
            f"{ds_checkpoint_dir} has {len(states)} *{_OPTIM} of the {world_size} that its ranks wrote; it is not whole"
        )
    key = "single_partition_of_fp32_groups" if stage <= 2 else "fp32_flat_groups"
    return stage, world_size, [held[key] for held in states], states[0].get("param_alignment_paddings")


def parse_model_states(files: Iterable[str]) -> list[SimpleNamespace]:
    """Of each file: `buffers`, `param_shapes`, `shared_params`, `ds_version`, and frozen parameters' shapes and values.

    Raises:
        FilesError: a file is none of weights.
        CheckpointError: a file is damaged.
    """
    found = []
    for name in files:
        state = load_inert(Path(name))
        if "buffer_names" not in state:
            raise FilesError(f"{name} is no file of weights")
        module = state["module"]
        found.append(
            SimpleNamespace(
                buffers={key: module[key].float() for key in state["buffer_names"]},
                param_shapes=state["param_shapes"],
                shared_params=list(state["shared_params"].items()),
                ds_version=state.get("ds_version"),
                frozen_param_shapes=state.get("frozen_param_shapes"),
                frozen_param_fragments=state.get("frozen_param_fragments"),
            )
        )
    return found
