"""`python -m deepspeedlite.checkpoint import DIR OUT`: a checkpoint of DeepSpeed's as one of ours.
`python -m deepspeedlite.checkpoint export DIR OUT`: a checkpoint as one that DeepSpeed loads.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from deepspeedlite.checkpoint.formats import FORMATS, open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed.reader import DeepSpeedReader
from deepspeedlite.checkpoint.formats.deepspeed.writer import Track, export_to_deepspeed
from deepspeedlite.checkpoint.manifest import Manifest, Parameter, encode
from deepspeedlite.checkpoint.writer import TagWriter
from deepspeedlite.runtime.errors import CheckpointError


def import_from_deepspeed(reader: DeepSpeedReader, out: str | Path, track: Track = lambda files, title: files) -> Path:
    """Write a checkpoint of DeepSpeed's into the folder `out`, under the same tag and as `latest`; the tag's folder.

    Each of its files becomes one of ours with the same tensors; what of them is on the way is in memory at a time.

    Raises:
        CheckpointError: there is such a tag already, or which parameter an optimizer state belongs to cannot be told.
        OSError: it cannot be written; nothing is left.
    """
    if reader.left_out is not None:
        raise CheckpointError(f"{reader.path} cannot be imported: {reader.left_out}")
    writer = TagWriter(out, reader.manifest.tag, formats=FORMATS)
    if os.path.lexists(writer.path):
        raise CheckpointError(f"{writer.path} exists already; name another folder")
    manifest, tensors = _as_ours(reader)
    try:
        writer.prepare(list(tensors))
        for name in track(list(tensors), f"writing {writer.path}"):
            manifest.files[name] = writer.write(name, tensors[name])
        writer.commit(manifest)
    except BaseException:
        writer.discard()
        raise
    return writer.path


def _as_ours(reader: DeepSpeedReader) -> tuple[Manifest, dict[str, dict[str, torch.Tensor]]]:
    """The manifest and the files' tensors under the names that our files will have."""
    manifest = reader.manifest
    names = {file: f"{Path(file).stem}.safetensors" for file in reader.tensors}
    pieces = [piece for p in manifest.parameters for found in p.pieces.values() for piece in found]
    used = {(piece.file, piece.tensor) for piece in pieces}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for file, held in reader.tensors.items():
        kept = {name: tensor for name, tensor in held.items() if (file, name) in used}
        if kept:
            tensors[names[file]] = kept
    values: dict[str, torch.Tensor] = {}

    def add_value(tensor: torch.Tensor) -> list[str]:
        values[f"value.{len(values)}"] = tensor
        return ["values.safetensors", f"value.{len(values) - 1}"]

    def renamed(parameter: Parameter) -> Parameter:
        moved = {
            kind: [piece._replace(file=names[piece.file]) for piece in found]
            for kind, found in parameter.pieces.items()
        }
        return replace(
            parameter, pieces=moved, scalars=encode(reader.value(parameter.scalars), parameter.name, add_value)
        )

    ours = replace(
        manifest,
        parameters=[renamed(parameter) for parameter in manifest.parameters],
        files={},
        param_groups=encode(reader.value(manifest.param_groups), "param_groups", add_value),
        state={name: encode(reader.state(name), name, add_value) for name in manifest.state},
    )
    return ours, {**tensors, **({"values.safetensors": values} if values else {})}


def add_commands(commands: Any) -> None:
    """Add `import` and `export` to an argument parser's commands; `run` of what they parse gives the exit status."""
    into = commands.add_parser("import", help="write a checkpoint of DeepSpeed's as one of ours")
    into.add_argument("dir", type=Path, help="a tag's directory, or one of tags, that DeepSpeed wrote")
    into.add_argument("out", type=Path, help="a directory of tags, such as load_checkpoint takes")
    into.add_argument("-t", "--tag", help="the one that `latest` names, if not given")
    into.set_defaults(run=_import)
    back = commands.add_parser("export", help="write a checkpoint that DeepSpeed loads")
    back.add_argument("dir", type=Path, help="a tag's directory, or one of tags")
    back.add_argument("out", type=Path, help="a new directory")
    back.add_argument("-t", "--tag", help="the one that `latest` names, if not given")
    back.add_argument("--stage", type=int, choices=range(4), help="the ZeRO stage that goes on (as it was saved)")
    back.add_argument("--world", type=int, help="how many ranks go on (as many as saved it)")
    back.set_defaults(run=_export)


def _bar(files: Any, title: str) -> Any:
    return track(files, title, disable=not sys.stderr.isatty(), transient=True)


def _import(args: argparse.Namespace) -> int:
    try:
        with open_checkpoint(args.dir, args.tag) as reader:
            if not isinstance(reader, DeepSpeedReader):
                raise CheckpointError(f"{reader.path} is a checkpoint of ours already")
            path = import_from_deepspeed(reader, args.out, track=_bar)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


def _export(args: argparse.Namespace) -> int:
    try:
        with open_checkpoint(args.dir, args.tag) as reader:
            path = export_to_deepspeed(reader, args.out, args.stage, args.world, track=_bar)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0
