"""The `deepspeedlite` command: parses the command line and reports what keeps a training from starting.

Usage: deepspeedlite [options] script [the script's own arguments]. Options end at the script; whatever follows
belongs to it, untouched. Exit status: the first failing rank's, 130 after Ctrl-C, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from deepspeedlite._version import __version__
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.text import did_you_mean

if TYPE_CHECKING:  # at run time these wait until there is something to start: --help answers sooner
    from deepspeedlite.launcher.options import LaunchOptions

_LEVELS = ("debug", "info", "warning", "error", "critical")
# Of each group: flags, the value's name ("" for a switch, "N" for a number), what it is for.
_OPTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "where": (
        (
            "-H --hostfile",
            "FILE",
            "machines and their slots, a line each: `worker-1 slots=4` (/job/hostfile)",
        ),
        ("-i --include", "SLOTS", "use only these: worker-1@worker-2:0,2-3"),
        ("-e --exclude", "SLOTS", "use all but these"),
        ("--num_nodes", "N", "use the first N machines; those left over are to spare (all)"),
        (
            "--num_gpus --num_accelerators",
            "N",
            "ranks per machine (every slot or GPU; one CPU rank where there is none)",
        ),
        ("--force_multi", "", "go through the network even for one machine"),
        ("--launcher", "NAME", "pdsh, ssh, openmpi, mpich, slurm, impi or mvapich (pdsh where installed, else ssh)"),
        ("--launcher_args", "ARGS", "more arguments for it"),
        ("--ssh_port", "N", "port of sshd on the machines"),
        ("--no_ssh", "", "this command is run on every machine: with --node_rank and --master_addr"),
        ("--node_rank", "N", "with --no_ssh: which machine this is"),
        ("--master_addr", "ADDR", "address the ranks meet at (the first machine's)"),
        ("--master_port", "N", "port the ranks meet at (29500, or a free one if it is busy; 0: any)"),
    ),
    "what": (
        ("--module", "", "the script is a module's name, run as with python -m"),
        ("--no_python", "", "the script is a program, run without Python in front"),
        ("--no_local_rank", "", "do not pass --local_rank=N to the script"),
        ("--as_deepspeed", "", "`import deepspeed` in the script is deepspeedlite (see docs/compatibility.md)"),
        ("--export_env", "NAME[=VALUE]", "hand this variable to every rank; may be repeated (see also .deepspeed_env)"),
        ("--venv_script", "FILE", "sourced on every machine first; its `python` runs the ranks"),
        ("--bind_cores_to_rank", "", "give each rank cores of its own"),
        ("--bind_core_list", "CORES", "the cores to share out, such as 0-3,8"),
    ),
    "how": (
        ("--check", "", "look at all machines, print a table, and start nothing"),
        ("--no_check --no_ssh_check", "", "start even if machines differ"),
        ("--dry_run", "", "print what would run where, and start nothing"),
        ("--start_timeout", "N", "seconds that a machine may take to answer (60)"),
        ("--max_restarts", "N", "after a failure start again, at most so often (0)"),
        ("--min_nodes", "N", "restart with as few machines, when no spare one is left (all)"),
        (
            "--enable_each_rank_log",
            "DIR",
            "also write each rank's output to DIR/<start time>_rank<N>.log, where it runs",
        ),
        ("--save_pid", "", "keep the launcher's process id in /tmp/<it>.ds while it runs"),
        ("--log_level", "LEVEL", "how much the launcher itself says (info)"),
        ("-q --quiet", "", "only errors, as --log_level error"),
    ),
}
_TAKES_VALUE = {flag: bool(value) for group in _OPTIONS.values() for flags, value, _ in group for flag in flags.split()}
_TAKES_VALUE.update({"--version": False, "-h": False, "--help": False})
# DeepSpeed's options that are understood and not done -> what they are part of.
_ABSENT = {
    **dict.fromkeys(
        ("--elastic_training", "--min_elastic_nodes", "--max_elastic_nodes"), "--max_restarts and --min_nodes"
    ),
    "--autotuning": "",
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
        description="Start one training script as many ranks, on this machine or on many, and keep them together.",
        epilog="example: deepspeedlite --num_gpus 2 train.py --deepspeed_config ds_config.json",
        allow_abbrev=False,
    )
    for title, group in _OPTIONS.items():
        part = parser.add_argument_group(title)
        for flags, value, text in group:
            settings: dict[str, Any] = {"metavar": value, "type": int if value == "N" else str} if value else {}
            settings = settings or {"action": "store_true"}
            if value.startswith("NAME["):
                settings |= {"action": "append", "default": []}
            if value == "LEVEL":
                settings["choices"] = _LEVELS
            part.add_argument(*flags.split(), help=text, **settings)
    parser.add_argument("--version", action="version", version=f"deepspeedlite {__version__}")
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the command line where the script begins.

    Raises:
        LaunchError: an option that is unknown, or that this release does not have.
    """
    index = 0
    while index < len(argv) and argv[index].startswith("-") and argv[index] not in ("-", "--"):
        name, has_value, _ = argv[index].partition("=")
        if name in _ABSENT:
            instead = f"; see {_ABSENT[name]}" if _ABSENT[name] else ""
            raise LaunchError(f"{name} is not in this release{instead}")
        if name not in _TAKES_VALUE:
            hint = did_you_mean(name, _TAKES_VALUE, otherwise="see deepspeedlite --help.")
            raise LaunchError(f"unknown option {name}; {hint} Options of the script itself go after its name.")
        index += 1 + (_TAKES_VALUE[name] and not has_value)
    rest = list(argv[index:])
    return list(argv[:index]), rest[1:] if rest[:1] == ["--"] else rest


def parse(argv: Sequence[str]) -> tuple[LaunchOptions, str | None]:
    """Turn a command line into options and the log level it asks for.

    Raises:
        LaunchError: naming the faulty option.
    """
    ours, theirs = _split(argv)
    args = _make_parser().parse_args(ours)
    from deepspeedlite.launcher.job import Workload, parse_cores
    from deepspeedlite.launcher.options import LaunchOptions

    if not theirs and not args.check:
        raise LaunchError("no script to start; usage: deepspeedlite [options] script [script's arguments ...]")
    for name in ("num_gpus", "num_nodes", "min_nodes"):
        count = getattr(args, name)
        setattr(args, name, None if count == -1 else count)  # -1 is how DeepSpeed's users write "all"
        if count is not None and count < 1 and count != -1:
            raise LaunchError(f"--{name} {count}: at least one is needed; leave it out to use all")
    if args.master_port is not None and not 0 <= args.master_port <= 65535:
        raise LaunchError(f"--master_port {args.master_port}: ports go from 1 to 65535; 0 picks a free one")
    if args.module and args.no_python:
        raise LaunchError("--module and --no_python exclude each other: a module needs Python to run it")
    if args.no_ssh and (args.node_rank is None or args.master_port == 0):
        raise LaunchError("--no_ssh needs --node_rank, and a --master_port that all machines know")
    if args.bind_core_list is not None:
        parse_cores(args.bind_core_list)
    workload = Workload(
        script=theirs[0] if theirs else "",
        script_args=tuple(theirs[1:]),
        log_dir=None if args.enable_each_rank_log == "None" else args.enable_each_rank_log,
        bind_cores=args.bind_cores_to_rank or args.bind_core_list is not None,
        core_list=args.bind_core_list,
        **{name: getattr(args, name) for name in _SAME_NAME_IN_WORKLOAD},
    )
    import shlex

    options = LaunchOptions(
        workload=workload,
        launcher_args=tuple(shlex.split(args.launcher_args or "")),
        export=tuple(args.export_env),
        start_timeout_s=60.0 if args.start_timeout is None else float(args.start_timeout),
        max_restarts=args.max_restarts or 0,
        master_addr=args.master_addr or "",
        launcher=(args.launcher or "").lower() or None,
        **{name: getattr(args, name) for name in _SAME_NAME},
    )
    return options, "error" if args.quiet else args.log_level


_SAME_NAME_IN_WORKLOAD = ("module", "no_python", "no_local_rank", "venv_script", "as_deepspeed")
_SAME_NAME = (
    *("hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "ssh_port", "force_multi", "no_ssh"),
    *("node_rank", "check", "no_check", "dry_run", "min_nodes", "save_pid"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        options, level = parse(sys.argv[1:] if argv is None else argv)
        from deepspeedlite.launcher.start import start
        from deepspeedlite.runtime.log import logger

        if level is not None:
            logger.setLevel(level.upper())
        sys.stdout.flush()
        status = start(options)
        if status > 128:  # an impatient second signal must not change the exit status while this process ends
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        return status
    except LaunchError as error:
        print(f"deepspeedlite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
