"""Weights out of a checkpoint, whole, in Hugging Face's layout: shards of at most so many bytes, and an index.

One shard is in memory at a time. The folder is written beside under another name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.manifest import DTYPES, MASTER, WEIGHT, Parameter
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tensors import write_tensors
from deepspeedlite.runtime.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def parse_bytes(text: str | int) -> int:
    """`5GB`, `500 MiB`, 1000.

    Raises:
        CheckpointError: it is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(text).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"{text!r} is no size; write it as 5GB, 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def weight_of(reader: Reader, parameter: Parameter, dtype: torch.dtype | None) -> torch.Tensor:
    """A parameter's best values, in its shape; floating-point ones as `dtype` (as they are stored, if None)."""
    weight = reader.read(parameter, MASTER if MASTER in parameter.pieces else WEIGHT).view(parameter.shape)
    return weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight


def state_dict_of(
    reader: Reader, dtype: torch.dtype | None = torch.float32, trained_only: bool = False
) -> dict[str, torch.Tensor]:
    """All weights and buffers by name, tied ones under each of their names."""
    found: dict[str, torch.Tensor] = {}
    for parameter in _wanted(reader, trained_only):
        weight = weight_of(reader, parameter, dtype)
        found.update(dict.fromkeys((parameter.name, *parameter.tied), weight))
    return found


def export_weights(
    reader: Reader,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    trained_only: bool = False,
    as_torch: bool = False,
    track: Track = lambda shards, title: shards,
) -> list[str]:
    """Write the weights into the new folder `out`; the names of the files, the index last where there is one.

    Args:
        reader: the checkpoint.
        out: must not exist.
        dtype: of what is floating point.
        max_shard_bytes: of a file; a larger tensor has one of its own.
        trained_only: leave out what was not trained.
        as_torch: files for `torch.load` (`pytorch_model.bin`) instead of safetensors.
        track: wraps the shards as they are written, to show progress.

    Raises:
        CheckpointError: `out` exists, or the checkpoint is damaged.
        OSError: it cannot be written; nothing is left.
    """
    out = check_folder(out, "writing weights")
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; name a new folder")
    stem, ending = ("pytorch_model", "bin") if as_torch else ("model", "safetensors")
    shards = list(_shards(_wanted(reader, trained_only), dtype, max_shard_bytes))
    names = [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.{ending}" for n in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.{ending}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp.{out.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        places: dict[str, str] = {}
        total_bytes = 0
        for name, shard in track(list(zip(names, shards)), f"writing {out}"):
            tensors = {parameter.name: weight_of(reader, parameter, dtype) for parameter in shard}
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            places.update(dict.fromkeys(tensors, name))
            _write_shard(temporary / name, tensors, as_torch)
            del tensors  # before the next shard's are read
        if len(shards) > 1:
            names.append(f"{stem}.{ending}.index.json")
            index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
            (temporary / names[-1]).write_text(json.dumps(index, indent=1) + "\n")
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return names


def _wanted(reader: Reader, trained_only: bool) -> list[Parameter]:
    return [p for p in reader.manifest.parameters if p.trainable or p.buffer or not trained_only]


def _shards(parameters: list[Parameter], dtype: torch.dtype, most_bytes: int) -> Iterator[list[Parameter]]:
    shard: list[Parameter] = []
    room = most_bytes
    for parameter in parameters:
        own = DTYPES[parameter.dtype]
        nbytes = parameter.numel * (dtype if own.is_floating_point else own).itemsize
        if shard and nbytes > room:
            yield shard
            shard, room = [], most_bytes
        shard.append(parameter)
        room -= nbytes
    if shard:
        yield shard


def _write_shard(path: Path, tensors: dict[str, torch.Tensor], as_torch: bool) -> None:
    if as_torch:
        torch.save(tensors, path)
    else:
        write_tensors(path, tensors)
