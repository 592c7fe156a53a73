"""`python -m deepspeedlite.drop_in path | install | uninstall | docs`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeedlite.compat.drop_in.docs import render
from deepspeedlite.compat.drop_in.install import install, uninstall
from deepspeedlite.launcher.stand_in import folder
from deepspeedlite.runtime.errors import LaunchError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m deepspeedlite.drop_in", description="The name `deepspeed`.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("path", help="print the folder to put on PYTHONPATH")
    command = commands.add_parser("install", help="give this environment the name deepspeed, until uninstall")
    command.add_argument("--force", action="store_true", help="also where a real DeepSpeed is installed; it is hidden")
    commands.add_parser("uninstall", help="take it away again")
    command = commands.add_parser("docs", help="write docs/compatibility.md")
    command.add_argument("--output", type=Path, default=Path("docs/compatibility.md"))
    args = parser.parse_args(argv)
    try:
        if args.command == "path":
            print(folder())
        elif args.command == "docs":
            args.output.write_text(render())
        else:
            changed = install(force=args.force) if args.command == "install" else uninstall()
            print("\n".join(f"{'wrote' if args.command == 'install' else 'removed'} {path}" for path in changed))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
