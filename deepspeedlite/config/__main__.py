"""`python -m deepspeedlite.config`: check a configuration file, print the JSON Schema, write the reference."""

from __future__ import annotations

import argparse
import json
import os
import sys

from deepspeedlite.config.batch import NAMES, batch_problem, solve_batch
from deepspeedlite.config.faults import MISSING, Fault, raise_faults
from deepspeedlite.config.load import examine
from deepspeedlite.config.root import DeepSpeedConfig
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.tools.config_docs import render, schema

DOCS = os.path.join("docs", "config.md")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeedlite.config", description="Check and describe DeepSpeed configuration files."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{check,schema,docs}")
    check = commands.add_parser(
        "check",
        help="check a file: print OK and what it comes to, or every fault (exit status 1)",
        description="Check a configuration file. Prints OK, the batch sizes, the keys that are left for a client to "
        'fill in ("auto") and those that change nothing; or every fault, one per line, with exit status 1.',
    )
    check.add_argument("file", help="path of the JSON file, or JSON in base64")
    check.add_argument(
        "--world_size",
        type=int,
        help="data-parallel ranks to solve the batch sizes for (default: the number that the file implies, or 1)",
    )
    commands.add_parser("schema", help="print the JSON Schema, for editors and other tools")
    docs = commands.add_parser("docs", help=f"write the reference, {DOCS}")
    docs.add_argument("--output", default=DOCS, help="file to write, - for standard output (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "check":
        return check(arguments.file, arguments.world_size)
    if arguments.command == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    if arguments.output == "-":
        sys.stdout.write(render())
        return 0
    try:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(render())
    except OSError as error:
        print(f"{arguments.output}: cannot be written ({error.strerror}); run from the repository, or give --output")
        return 1
    print(f"wrote {arguments.output}")
    return 0


def check(source: str, world_size: int | None) -> int:
    """Print what a file comes to, or its faults."""
    try:
        origin, config, faults = examine(source, world_size, peek=True)
        ranks = world_size or implied_world_size(config)
        sizes = (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps)
        filled_later = set(config.left_open) & set(NAMES)
        if not faults and not filled_later and (problem := batch_problem(*sizes, ranks)) is not None:
            faults.append(Fault((), MISSING, problem))
        if faults:
            raise_faults(origin, faults)
    except ConfigError as error:
        print(error)
        return 1
    print(f"OK {origin}")
    if not filled_later:
        batch = solve_batch(*sizes, ranks)
        numbers = ", ".join(f"{name} {number}" for name, number in zip(NAMES, batch))
        print(f"batch on {ranks} rank{'s' if ranks > 1 else ''}: {numbers}")
    if config.left_open:
        print(f'left for the client to fill in ("auto"): {", ".join(config.left_open)}')
    for hint in config.hints:
        print(f"hint: {hint}")
    return 0


def implied_world_size(config: DeepSpeedConfig) -> int:
    """The world size that fits when all three batch sizes are given; 1 otherwise."""
    train, micro, accumulation = (
        config.train_batch_size,
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    )
    return max(1, train // (micro * accumulation)) if train and micro and accumulation else 1


if __name__ == "__main__":
    sys.exit(main())
