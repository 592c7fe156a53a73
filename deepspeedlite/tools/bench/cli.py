"""The command line of `dslite_bench`, which is also what each of its ranks is started with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeedlite.runtime.env import discover_world
from deepspeedlite.runtime.errors import DeepSpeedLiteError
from deepspeedlite.tools.bench.points import COLLECTIVES, DTYPES, Plan, parse_sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, if this is one of several ranks; else start the ranks. Returns the exit status."""
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    try:
        plan = _plan(args)
        among_ranks = "RANK" in os.environ or discover_world(os.environ).world_size > 1
        if not among_ranks:
            from deepspeedlite.launcher.cli import main as launch

            ours = [f"--{name}={value}" for name, value in vars(args).items() if value is not None]
            return launch([*others, "--no_local_rank", "--module", "deepspeedlite.tools.bench", *ours])
        if others:
            parser.error(f"{others[0]} is not an option of dslite_bench, and its ranks have been started already")
        from deepspeedlite.tools.bench.measure import run

        run(plan)
    except ValueError as error:
        parser.error(str(error))
    except (DeepSpeedLiteError, OSError) as error:
        print(f"dslite_bench: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    for name, known in (("collectives", COLLECTIVES), ("dtypes", DTYPES)):
        for word in getattr(args, name).split(","):
            if word not in known:
                raise ValueError(f"--{name} {word}: there is none of that name; they are {', '.join(known)}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds:g}: write a time above 0, such as 0.25")
    return Plan(
        collectives=tuple(args.collectives.split(",")),
        dtypes=tuple(args.dtypes.split(",")),
        sizes_bytes=parse_sizes(args.sizes),
        seconds=args.seconds,
        json=args.json and Path(args.json),
        plot=args.plot and Path(args.plot),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dslite_bench",
        usage="%(prog)s [options] [options of deepspeedlite]",
        description="Latency and bandwidth of collectives between ranks, which are started through the launcher "
        "(--num_gpus 2, --hostfile FILE and its other options go to it), or by torchrun, mpirun or srun.",
        epilog="example: dslite_bench --num_gpus 2 --sizes 1K:64M --plot bench.svg",
        allow_abbrev=False,
    )
    parser.add_argument("--collectives", default=",".join(COLLECTIVES), metavar="NAME,...", help="(%(default)s)")
    parser.add_argument("--dtypes", default="float32", metavar="NAME,...", help=f"of {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument(
        "--sizes", default="1K:64M", help="bytes: FROM:TO[:FACTOR], or a list such as 4K,1M (%(default)s, by 4)"
    )
    parser.add_argument("--seconds", type=float, default=0.25, metavar="S", help="for each point (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the points, by rank 0 on its host")
    parser.add_argument("--plot", metavar="FILE", help="write a plot as SVG, likewise")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers that pass it
    return parser
