"""The `deepspeedlite` command: parses the command line, starts the ranks, prints how it went.

Usage: deepspeedlite [options] script [the script's own arguments]. Options end at the script; whatever follows
belongs to it, untouched. Exit status: the first failing rank's, 130 after Ctrl-C, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from deepspeedlite._version import __version__
from deepspeedlite.errors import LaunchError

if TYPE_CHECKING:  # at run time these wait until there is something to start: --help answers sooner
    from deepspeedlite.launcher.agent import Outcome
    from deepspeedlite.launcher.command import Job, LaunchOptions

_LEVELS = ("debug", "info", "warning", "error", "critical")
_OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--num_gpus", "--num_accelerators"),
        {
            "type": int,
            "metavar": "N",
            "help": "ranks to start, one per GPU (default: all GPUs; CPU ranks where there is none)",
        },
    ),
    (("--num_nodes",), {"type": int, "metavar": "N", "help": "machines to use; this release knows 1"}),
    (
        ("--master_addr",),
        {"default": "", "metavar": "ADDR", "help": "address the ranks meet at (default: 127.0.0.1)"},
    ),
    (
        ("--master_port",),
        {
            "type": int,
            "metavar": "PORT",
            "help": "port the ranks meet at (default: 29500, or a free one if it is busy; 0: any)",
        },
    ),
    (("--module",), {"action": "store_true", "help": "the script is a module's name, run as with python -m"}),
    (("--no_python",), {"action": "store_true", "help": "the script is a program, run without Python in front"}),
    (("--no_local_rank",), {"action": "store_true", "help": "do not pass --local_rank=N to the script"}),
    (
        ("--enable_each_rank_log",),
        {"metavar": "DIR", "help": "also write each rank's output to DIR/<start time>_rank<N>.log"},
    ),
    (("--dry_run",), {"action": "store_true", "help": "print what would be started, and start nothing"}),
    (("--log_level",), {"choices": _LEVELS, "help": "how much the launcher itself says (default: info)"}),
    (("-q", "--quiet"), {"action": "store_true", "help": "only errors, as --log_level error"}),
    (("--version",), {"action": "version", "version": f"deepspeedlite {__version__}"}),
)
# DeepSpeed's options that are understood and not done yet -> (whether a value follows, what they are part of).
_CLUSTER, _BINDING = "starting ranks on other machines", "binding ranks to cores"
_LATER: dict[str, tuple[bool, str]] = {
    **dict.fromkeys(("-H", "--hostfile", "-i", "--include", "-e", "--exclude"), (True, _CLUSTER)),
    **dict.fromkeys(("--launcher", "--launcher_args", "--node_rank", "--ssh_port", "--venv_script"), (True, _CLUSTER)),
    **dict.fromkeys(("--no_ssh", "--no_ssh_check", "--force_multi", "--check", "--no_check"), (False, _CLUSTER)),
    **dict.fromkeys(("--max_restarts", "--min_nodes"), (True, "restarting after a failure")),
    **dict.fromkeys(("--elastic_training",), (False, "restarting after a failure")),
    **dict.fromkeys(("--min_elastic_nodes", "--max_elastic_nodes"), (True, "restarting after a failure")),
    "--bind_cores_to_rank": (False, _BINDING),
    "--bind_core_list": (True, _BINDING),
    "--save_pid": (False, "keeping process ids in a file"),
    "--autotuning": (True, "autotuning"),
}


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in this project's form."""

    def error(self, message: str) -> NoReturn:
        """Raise LaunchError instead of printing the usage and exiting."""
        raise LaunchError(f"{message.removeprefix('argument ')}; see deepspeedlite --help")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deepspeedlite",
        usage="%(prog)s [options] script [script's arguments ...]",
        description="Start one training script as several ranks on this machine, and keep them together.",
        epilog="example: deepspeedlite --num_gpus 2 train.py --deepspeed_config ds_config.json",
        allow_abbrev=False,
    )
    for flags, settings in _OPTIONS:
        parser.add_argument(*flags, **settings)
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the command line where the script begins.

    Raises:
        LaunchError: an option that is unknown, or that only a later release has.
    """
    takes_value = {flag: "action" not in settings for flags, settings in _OPTIONS for flag in flags}
    takes_value.update({"-h": False, "--help": False})
    index = 0
    while index < len(argv) and argv[index].startswith("-") and argv[index] not in ("-", "--"):
        name, has_value, _ = argv[index].partition("=")
        if name in _LATER:
            raise LaunchError(
                f"{name}: {_LATER[name][1]} comes with a later release; this one starts ranks on this machine only. "
                f"Leave {name} out to do that."
            )
        if name not in takes_value:
            raise LaunchError(_unknown(name, [*takes_value, *_LATER]))
        index += 1 + (takes_value[name] and not has_value)
    rest = list(argv[index:])
    return list(argv[:index]), rest[1:] if rest[:1] == ["--"] else rest


def _unknown(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "see deepspeedlite --help."
    return f"unknown option {name}; {hint} Options of the script itself go after its name."


def parse(argv: Sequence[str]) -> tuple[LaunchOptions, str | None]:
    """Turn a command line into options and the log level it asks for.

    Raises:
        LaunchError: naming the faulty option.
    """
    ours, theirs = _split(argv)
    args = _make_parser().parse_args(ours)
    from deepspeedlite.launcher.command import LaunchOptions

    if not theirs:
        raise LaunchError("no script to start; usage: deepspeedlite [options] script [script's arguments ...]")
    num_gpus = None if args.num_gpus == -1 else args.num_gpus  # -1 is how DeepSpeed's users write "all"
    if num_gpus is not None and num_gpus < 1:
        raise LaunchError(f"--num_gpus {num_gpus}: at least one rank is needed; leave it out to use all GPUs")
    if args.num_nodes not in (None, -1, 1):
        raise LaunchError(f"--num_nodes {args.num_nodes}: {_CLUSTER} comes with a later release; use 1 or leave it out")
    if args.master_port is not None and not 0 <= args.master_port <= 65535:
        raise LaunchError(f"--master_port {args.master_port}: ports go from 1 to 65535; 0 picks a free one")
    if args.module and args.no_python:
        raise LaunchError("--module and --no_python exclude each other: a module needs Python to run it")
    options = LaunchOptions(
        script=theirs[0],
        script_args=tuple(theirs[1:]),
        num_gpus=num_gpus,
        master_addr=args.master_addr or "127.0.0.1",
        master_port=args.master_port,
        module=args.module,
        no_python=args.no_python,
        no_local_rank=args.no_local_rank,
        log_dir=None if args.enable_each_rank_log == "None" else args.enable_each_rank_log,
        dry_run=args.dry_run,
    )
    return options, "error" if args.quiet else args.log_level


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        options, level = parse(sys.argv[1:] if argv is None else argv)
        from deepspeedlite.launcher.local import plan_local

        job = plan_local(options, os.environ)
        if options.dry_run:
            return _show(job)
        return _run(job, level)
    except LaunchError as error:
        print(f"deepspeedlite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _show(job: Job) -> int:
    from deepspeedlite.launcher.command import shell_line

    for note in job.notes:
        print(f"# {note}")
    for command in job.ranks:
        print(shell_line(command))
    return 0


def _run(job: Job, level: str | None) -> int:
    from deepspeedlite.launcher.agent import Agent
    from deepspeedlite.launcher.output import Screen, ScreenText
    from deepspeedlite.log import logger

    if level is not None:
        logger.setLevel(level.upper())
    every_rank = {"ranks": (-1,)}  # the launcher's lines are shown even if RANK is set around it
    for note in job.notes:
        logger.info(note, extra=every_rank)
    for detail in job.details:
        logger.debug(detail, extra=every_rank)
    screen = Screen()
    sys.stdout.flush()
    with contextlib.redirect_stderr(ScreenText(screen)):
        outcome = Agent(job, screen).run()
        screen.restore()
        if outcome.left_behind:
            logger.warning("%d processes that ranks left behind were ended", outcome.left_behind)
        if outcome.unkillable:
            pids = " ".join(map(str, outcome.unkillable))
            logger.error("these processes did not end even by SIGKILL: %s", pids)
        if outcome.first is None or outcome.interrupted_by is not None:
            logger.info(_summary(job, outcome), extra=every_rank)
        else:
            screen.say(_failure(job, outcome))
    return outcome.exit_status


def _summary(job: Job, outcome: Outcome) -> str:
    from signal import SIGPIPE, Signals

    from deepspeedlite.launcher.report import duration

    ranks = f"{len(job.ranks)} rank{'s' * (len(job.ranks) > 1)}"
    after = f"after {duration(outcome.ended_s - outcome.started_s)}"
    if outcome.interrupted_by is None:
        return f"{ranks} ended well {after}"
    if outcome.interrupted_by == SIGPIPE:
        return f"{ranks} ended {after}: the output can no longer be written"
    return f"{ranks} ended {after} by {Signals(outcome.interrupted_by).name}"


def _failure(job: Job, outcome: Outcome) -> str:
    from deepspeedlite.launcher.report import duration, failure_report

    first = outcome.first
    if first is None:
        return ""
    others = [failure.rank for failure in outcome.failures if failure is not first]
    whole = duration(outcome.ended_s - outcome.started_s)
    heading = f"deepspeedlite: FAILED after {whole}, exit status {outcome.exit_status}"
    return f"{heading}\n{failure_report(first, outcome.started_s, len(job.ranks), others)}\n"


if __name__ == "__main__":
    sys.exit(main())
