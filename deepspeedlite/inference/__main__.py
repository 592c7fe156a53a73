"""`python -m deepspeedlite.inference bench MODEL_DIR`: how quick a model is here, beside transformers' own generate."""

from __future__ import annotations

import argparse
import os
import sys

from deepspeedlite.inference.bench import Asked, bench
from deepspeedlite.runtime.errors import DeepSpeedLiteError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeedlite.inference",
        description="Measure inference. Over several ranks: deepspeedlite --num_gpus 2 --module "
        "deepspeedlite.inference bench MODEL_DIR",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{bench}")
    one = commands.add_parser(
        "bench",
        help="load time, prompt and decode rates, memory, and the share of the read bandwidth that decoding reaches",
        description="Generate with a model of transformers as it is and by init_inference, and print a table of both. "
        "A folder without weights gets random ones: rates do not depend on values.",
    )
    one.add_argument("model", metavar="MODEL_DIR", help="a folder with config.json and, usually, weights")
    one.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16"], help="default: bf16")
    one.add_argument("--bits", type=int, choices=[8, 4], help="quantize weights")
    one.add_argument("--unfused", action="store_true", help="do not replace blocks by fused ones")
    one.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    one.add_argument("--new", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    one.add_argument("--batch", type=int, default=1, metavar="N", help="prompts at a time (default: 1)")
    one.add_argument("--rounds", type=int, default=3, metavar="N", help="the best of N counts (default: 3)")
    one.add_argument("--alone", action="store_true", help="leave transformers' own generate out")
    one.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    one.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = build_parser().parse_args(argv)
    if not os.path.isfile(os.path.join(given.model, "config.json")):
        print(f"{given.model} has no config.json: name the folder of a model of transformers", file=sys.stderr)
        return 2
    asked = Asked(
        folder=given.model,
        dtype=given.dtype,
        bits=given.bits,
        fused=not given.unfused,
        prompt=given.prompt,
        new=given.new,
        batch=given.batch,
        rounds=given.rounds,
        beside=not given.alone,
    )
    try:
        bench(asked, as_json=given.json)
    except (DeepSpeedLiteError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
