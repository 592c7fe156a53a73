"""The `deepspeedlite` command: parses the command line and reports what keeps a training from starting.

Usage: deepspeedlite [options] script [the script's own arguments]. Options end at the script; whatever follows
belongs to it, untouched. Exit status: the first failing rank's, 130 after Ctrl-C, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import Field
from typing import Any, NoReturn

from deepspeedlite._version import __version__
from deepspeedlite.launcher.options import GROUPS, LaunchOptions
from deepspeedlite.runtime.errors import ConfigError, LaunchError
from deepspeedlite.runtime.text import did_you_mean

_LEVELS = ("debug", "info", "warning", "error", "critical")
# DeepSpeed's options that are understood and not done -> what to see instead.
_ABSENT = {
    **dict.fromkeys(
        ("--elastic_training", "--min_elastic_nodes", "--max_elastic_nodes"), "; see --max_restarts and --min_nodes"
    ),
    "--autotuning": "",
}
# Other launchers' options -> ours.
_THEIRS = {
    **dict.fromkeys(("--num_processes", "--nproc_per_node", "--nproc-per-node"), "--num_gpus (ranks per machine)"),
    **dict.fromkeys(("--num_machines", "--nnodes"), "--num_nodes"),
    **dict.fromkeys(("--machine_rank", "--node-rank"), "--node_rank"),
    **dict.fromkeys(("--main_process_ip", "--master-addr"), "--master_addr"),
    **dict.fromkeys(("--main_process_port", "--master-port"), "--master_port"),
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
    group = parser.add_argument_group()
    for name, option in LaunchOptions.on_command_line().items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        value = option.metadata["value"]
        settings: dict[str, Any] = {"metavar": value, "type": int if value == "N" else str}
        if not value:
            settings = {"action": "store_true"}
        elif name == "export_env":
            settings["action"] = "append"
        elif name == "log_level":
            settings["choices"] = _LEVELS
        group.add_argument(*_flags(option), dest=name, help=option.metadata["help"], **settings)
    parser.add_argument("--version", action="version", version=f"deepspeedlite {__version__}")
    return parser


def _flags(option: Field[Any]) -> list[str]:
    flags = [f"--{option.name}", *option.metadata["also"]]
    return sorted(flags, key=lambda flag: flag.startswith("--"))  # -H, --hostfile


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the command line where the script begins.

    Raises:
        LaunchError: an option that is unknown, or that this release does not have.
    """
    takes_value = {"--version": False, "-h": False, "--help": False}
    for option in LaunchOptions.on_command_line().values():
        takes_value.update(dict.fromkeys(_flags(option), bool(option.metadata["value"])))
    index, ours = 0, []
    while index < len(argv) and argv[index].startswith("-") and argv[index] not in ("-", "--"):
        name, has_value, _ = argv[index].partition("=")
        if name in _ABSENT:
            raise LaunchError(f"{name} is not in this release{_ABSENT[name]}")
        if name not in takes_value:
            hint = did_you_mean(name, takes_value, otherwise="see deepspeedlite --help.")
            hint = f"here it is {_THEIRS[name]}." if name in _THEIRS else hint
            raise LaunchError(f"unknown option {name}; {hint} Options of the script itself go after its name.")
        words = argv[index : index + 1 + (takes_value[name] and not has_value)]
        ours.append("=".join(words))  # a value may begin with a dash
        index += len(words)
    rest = list(argv[index:])
    return ours, rest[1:] if rest[:1] == ["--"] else rest


def parse(argv: Sequence[str]) -> LaunchOptions:
    """Turn a command line into options.

    Raises:
        LaunchError: naming the faulty option.
    """
    ours, theirs = _split(argv)
    given = {name: value for name, value in vars(_make_parser().parse_args(ours)).items() if value is not None}
    for name in ("num_gpus", "num_nodes", "min_nodes"):
        if given.get(name) == -1:  # is how DeepSpeed's users write "all"
            del given[name]
        elif given.get(name, 1) < 1:
            raise LaunchError(f"--{name} {given[name]}: at least one is needed; leave it out to use all")
    if "launcher" in given:
        given["launcher"] = given["launcher"].lower()
    if given.get("enable_each_rank_log") == "None":
        del given["enable_each_rank_log"]
    if given["quiet"]:
        given["log_level"] = "error"
    options = LaunchOptions("".join(theirs[:1]), tuple(theirs[1:]), **given)
    if not theirs and not options.check:
        raise LaunchError("no script to start; usage: deepspeedlite [options] script [script's arguments ...]")
    if options.master_port is not None and not 0 <= options.master_port <= 65535:
        raise LaunchError(f"--master_port {options.master_port}: ports go from 1 to 65535; 0 picks a free one")
    if options.module and options.no_python:
        raise LaunchError("--module and --no_python exclude each other: a module needs Python to run it")
    if options.no_ssh and (options.node_rank is None or options.master_port == 0):
        raise LaunchError("--no_ssh needs --node_rank, and a --master_port that all machines know")
    if options.bind_core_list is not None:
        from deepspeedlite.launcher.hostfile import numbers_in

        numbers_in(options.bind_core_list, f"--bind_core_list {options.bind_core_list}", "core")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        from deepspeedlite.launcher.start import start  # late: --help answers sooner
        from deepspeedlite.runtime.log import logger

        if options.log_level is not None:
            logger.setLevel(options.log_level.upper())
        sys.stdout.flush()
        status = start(options)
        if status > 128:  # an impatient second signal must not change the exit status while this process ends
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        return status
    except (LaunchError, ConfigError) as error:  # of DSL_LOG_LEVEL
        print(f"deepspeedlite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
