"""The command line: `python -m env check|list|show|build|matrix|cluster`.

Exit status: 0, 1 if something failed or is wrong, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deepspeedlite.host.text import columns
from env import cluster, show
from env.environment import CONSTRAINTS, FOLDER, check_constraints, load, names, read
from env.errors import ImageError
from env.images import Choice, arguments, make, make_all


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.work(args))
    except ImageError as error:
        print(f"env {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m env", description="Build, test and start images of deepspeedlite. Guide: docs/images.md."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, work: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(work=work)
        return added

    check = command("check", _check, "check environments and constraints; every fault with file, line and key")
    check.add_argument("names", nargs="*", metavar="NAME|FILE", help="which (all)")
    command("list", _list, "list the environments")
    shown = command("show", _show, "print an environment's build arguments")
    shown.add_argument("name", metavar="NAME")
    built = command("build", _build, "build an image, verify it in containers, and tag it if it works")
    built.add_argument("name", metavar="NAME")
    for each in (shown, built):
        each.add_argument("--base", default="", metavar="IMAGE", help="build on this image (the environment's)")
        each.add_argument("--run-base", default="", metavar="IMAGE", help="run on this image (that of --base)")
        each.add_argument("--archs", metavar="LIST", help='such as "8.0;9.0+PTX" or "gfx90a;gfx942"')
    many = command("matrix", _matrix, "build every environment whose base images can be had here, side by side")
    many.add_argument("names", nargs="*", metavar="NAME", help="which (all)")
    many.add_argument("--base", action="append", default=[], metavar="NAME=IMAGE", help="base for one; repeatable")
    many.add_argument("--run-base", action="append", default=[], metavar="NAME=IMAGE", help="repeatable")
    many.add_argument("--archs", action="append", default=[], metavar="NAME=LIST", help="GPUs for one; repeatable")
    many.add_argument("--at-once", type=int, default=2, metavar="N", help="builds at once (2)")
    for each in (shown, built, many):
        _build_options(each)
    cluster.add_commands(command)
    return parser


def _build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", default="", metavar="3.N", help="the distribution's python3.N (the environment's)")
    parser.add_argument("--torch-spec", default="", metavar="SPEC", help="such as torch==2.13.0+cpu")
    parser.add_argument("--torch-index", metavar="URL", help='an index for torch beside PyPI; "": none')
    parser.add_argument("--ops", default="", metavar="NAMES", help="compile only these, by spaces or commas")
    parser.add_argument("--max-jobs", default="", metavar="N", help="compilers at once (one per processor)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to find before any index (env/wheels)")
    parser.add_argument("--with-jit", action="store_true", help="with a compiler, so that ops can be compiled in it")
    parser.add_argument("--no-cache", action="store_true", help="take no step from the engine's cache")
    parser.add_argument("--repository", default="deepspeedlite", metavar="[HOST/]NAME", help="what tags begin with")
    parser.add_argument("--push", action="store_true", help="push the tags")
    parser.add_argument("--verbose", action="store_true", help="show all that the steps print")


def _choice(args: argparse.Namespace) -> Choice:
    return Choice(**{name: getattr(args, name) for name in Choice.__dataclass_fields__})


def say(line: str) -> None:
    """A line of progress, at once and whole."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _check(args: argparse.Namespace) -> int:
    faults = []
    chosen = args.names or names()
    for name in chosen:
        try:
            load(name) if not name.endswith((".yaml", ".yml")) else read(Path(name))
        except ImageError as error:
            faults += str(error).splitlines()
    faults += check_constraints()
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{', '.join(chosen)} and {CONSTRAINTS.relative_to(FOLDER)} are well formed")
    return int(bool(faults))


def _list(args: argparse.Namespace) -> int:
    rows = []
    for name in names():
        found = load(name)
        gpu = f"{found.accelerator} {found.version}".strip()
        rows.append([name, gpu, found.python, found.torch.spec, " ".join(found.archs) or "-", found.about])
    print("\n".join(columns([["name", "for", "Python", "torch", "archs", "about"], *rows])))
    return 0


def _show(args: argparse.Namespace) -> int:
    environment = load(args.name)
    print(json.dumps({"dockerfile": environment.dockerfile, **arguments(environment, _choice(args))}, indent=2))
    return 0


def _build(args: argparse.Namespace) -> int:
    made = make(args.name, _choice(args), say)
    print("\n" + show.image(made))
    return int(bool(made.problem))


def _matrix(args: argparse.Namespace) -> int:
    bases, run_bases, archs = (_by_name(given) for given in (args.base, args.run_base, args.archs))
    args.base, args.run_base, args.archs = "", "", None
    choice = _choice(args)

    def choice_of(name: str) -> Choice:
        return replace(choice, base=bases.get(name, ""), run_base=run_bases.get(name, ""), archs=archs.get(name))

    all_made = make_all(args.names or names(), choice_of, max(1, min(args.at_once, os.cpu_count() or 1)), say)
    print("\n" + show.matrix(all_made))
    return int(any(made.built and not made.tags for made in all_made) or not any(made.tags for made in all_made))


def _by_name(given: Sequence[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for name, equals, value in pairs:
        if not (equals and value) or name not in names():
            raise ImageError(f"{name}{equals}{value}: write it as NAME=VALUE; the names are {', '.join(names())}")
    return {name: value for name, _, value in pairs}
