"""`python -m deepspeedlite.checkpoint verify DIR`: whether the checkpoints in a directory are whole.

Exit status: 0, 1 if one is damaged, 2 for a wrong command line or a directory without checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from deepspeedlite.checkpoint.manifest import FILE_NAME
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m deepspeedlite.checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare every file with its checksum")
    verify.add_argument("dir", type=Path, help="a tag's directory, or one of tags")
    args = parser.parse_args(argv)
    tags = sorted(path.parent for path in args.dir.glob(f"*/{FILE_NAME}") if path.parent.name[0] != ".")
    tags = [args.dir] if (args.dir / FILE_NAME).exists() else tags
    if not tags:
        parser.error(f"there is no checkpoint in {args.dir}")
    whole = [_is_whole(tag) for tag in tags]
    return int(not all(whole))


def _is_whole(tag: Path) -> bool:
    try:
        with Reader(tag) as reader:
            files = sorted(reader.manifest.files)
            for name in track(files, str(tag), disable=not sys.stderr.isatty(), transient=True):
                reader.verify([name])
            nbytes = sum(record.nbytes for record in reader.manifest.files.values())
            print(f"{tag} is whole: {len(reader.manifest.parameters)} parameters and buffers, {nbytes:,} bytes")
    except CheckpointError as error:
        print(error)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
