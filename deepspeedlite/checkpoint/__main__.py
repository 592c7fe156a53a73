"""`python -m deepspeedlite.checkpoint verify DIR`: whether the checkpoints in a directory are whole.
`python -m deepspeedlite.checkpoint inspect DIR`: what one holds and where it lies.
`python -m deepspeedlite.checkpoint diff A B`: what differs between two.
`python -m deepspeedlite.checkpoint to_fp32 DIR OUT`: their weights, whole, in Hugging Face's layout.
`python -m deepspeedlite.checkpoint import DIR OUT`, `export DIR OUT`: DeepSpeed's checkpoints as ours, and the reverse.

Exit status: 0, 1 if a checkpoint is damaged, something cannot be written, or two differ, 2 for a wrong command line or
for what cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from deepspeedlite.checkpoint.formats import FORMATS, open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed import convert
from deepspeedlite.checkpoint.formats.hugging_face.weights import export_weights, parse_bytes
from deepspeedlite.checkpoint.reader import open_tag
from deepspeedlite.checkpoint.tag import is_checkpoint, read_latest, tags_in
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.tools import checkpoint_inspect

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m deepspeedlite.checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare every file with its checksum")
    verify.add_argument("dir", type=Path, help="a tag's directory, or one of tags")
    verify.set_defaults(run=partial(_verify, parser=verify))
    to_fp32 = commands.add_parser("to_fp32", help="write whole weights as safetensors shards with an index")
    to_fp32.add_argument("dir", type=Path, help="a tag's directory, or one of tags")
    to_fp32.add_argument("out", type=Path, help="a new directory")
    to_fp32.add_argument("-t", "--tag", help="the one that `latest` names, if not given")
    to_fp32.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32")
    to_fp32.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="bytes of a file (5GB)")
    to_fp32.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    to_fp32.set_defaults(run=_to_fp32)
    checkpoint_inspect.add_commands(commands)
    convert.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except OSError as error:  # a folder that may not be read, a full disk
        print(error, file=sys.stderr)
        return 2 if args.command == "diff" else 1


def _verify(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        newest = read_latest(args.dir)
    except CheckpointError as error:
        print(error)
        return 1
    names = sorted({*tags_in(args.dir, FORMATS), *filter(None, [newest])})  # what `latest` names must be whole
    tags = [args.dir] if is_checkpoint(args.dir, FORMATS) else [args.dir / name for name in names]
    if not tags:
        parser.error(f"there is no checkpoint in {args.dir}")
    whole = [_is_whole(tag) for tag in tags]
    return int(not all(whole))


def _is_whole(tag: Path) -> bool:
    try:
        with open_tag(tag, FORMATS) as reader:
            files = sorted(reader.manifest.files)
            for name in track(files, str(tag), disable=not sys.stderr.isatty(), transient=True):
                reader.verify([name])
            nbytes = sum(record.nbytes for record in reader.manifest.files.values())
            print(f"{tag} is whole: {len(reader.manifest.parameters)} parameters and buffers, {nbytes:,} bytes")
    except CheckpointError as error:
        print(error)
        return False
    return True


def _to_fp32(args: argparse.Namespace) -> int:
    try:
        with open_checkpoint(args.dir, args.tag) as reader:
            names = export_weights(
                reader,
                args.out,
                dtype=_DTYPES[args.dtype],
                max_shard_bytes=parse_bytes(args.max_shard_size),
                trained_only=args.exclude_frozen_parameters,
                track=lambda shards, title: track(shards, title, disable=not sys.stderr.isatty(), transient=True),
            )
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
