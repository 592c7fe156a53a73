"""Collecting the sections, showing them, and the command line."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from deepspeedlite.env_report import nodes
from deepspeedlite.env_report.machine import cpu_and_memory, disk, gpus, network
from deepspeedlite.env_report.packages import ops, software, torch_section, variables
from deepspeedlite.env_report.probe import Probe, compiled_libraries
from deepspeedlite.env_report.rows import BAD, INFO, OK, WARN, Row
from deepspeedlite.env_report.tools import accelerators, cache, compilers, mpi
from deepspeedlite.launcher.hostfile import read_hostfile
from deepspeedlite.runtime.errors import ConfigError, LaunchError
from deepspeedlite.runtime.text import did_you_mean

Section = Callable[[], list[Row]]
SECTIONS: Mapping[str, Callable[..., list[Row]]] = {
    "software": software,
    "torch": torch_section,
    "ops": ops,
    "accelerators": accelerators,
    "gpus": gpus,
    "machine": cpu_and_memory,
    "disk": disk,
    "network": network,
    "mpi": mpi,
    "compilers": compilers,
    "cache": cache,
    "variables": variables,
}
_ASK_TORCH = ("torch", "ops")


def collect(names: Sequence[str] = tuple(SECTIONS), paths: Sequence[str] = (".",)) -> list[Row]:
    """The rows of these sections, in the table's order. `paths` are folders whose disks are looked at."""
    wanted = {name: section for name, section in SECTIONS.items() if name in names}
    if not set(wanted) & set(_ASK_TORCH):
        return run({name: _bound(section, name, None, paths) for name, section in wanted.items()})
    probe = Probe(list(compiled_libraries().values()) if "ops" in wanted else [])
    others = run({name: _bound(s, name, None, paths) for name, s in wanted.items() if name not in _ASK_TORCH})
    probe.end()  # which took as long as the others, or longer
    asked = run({name: _bound(s, name, probe, paths) for name, s in wanted.items() if name in _ASK_TORCH})
    order = list(SECTIONS)
    return sorted([*others, *asked], key=lambda row: order.index(row.section) if row.section in order else 0)


def _bound(section: Callable[..., list[Row]], name: str, probe: Probe | None, paths: Sequence[str]) -> Section:
    if name in _ASK_TORCH:
        return lambda: section(probe)
    return (lambda: section(paths)) if name == "disk" else section


def run(sections: Mapping[str, Section]) -> list[Row]:
    """Run sections at once (most of their time is waiting for tools) and give their rows in order."""
    if not sections:
        return []
    with ThreadPoolExecutor(max_workers=len(sections)) as pool:
        futures = {name: pool.submit(section) for name, section in sections.items()}
        return [row for name, future in futures.items() for row in _rows_of(name, future)]


def _rows_of(name: str, future: Future[list[Row]]) -> list[Row]:
    try:
        return future.result()
    except Exception as error:  # a report about a strange machine must not end at the first strangeness
        return [Row(name, "this section", f"failed: {error!r}", WARN, "please report this with the line above")]


def render(rows: Sequence[Row], colour: bool) -> str:
    """The report as aligned text."""
    paint = {OK: "32", WARN: "33", BAD: "1;31"}
    width = max((len(row.name) for row in rows), default=0)
    lines: list[str] = []
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += [""] * bool(lines) + [section]
        mark = f"{'' if row.status == INFO else row.status:4}"
        if colour and row.status in paint:
            mark = f"\x1b[{paint[row.status]}m{mark}\x1b[0m"
        lines.append(f"  {mark}  {row.name:{width}}  {row.value}".rstrip())
        if row.remedy:
            lines.append(f"        {'':{width}}  -> {row.remedy}")
    return "\n".join([*lines, "", verdict(rows)])


def verdict(rows: Sequence[Row]) -> str:
    """The last line: how many rows need attention."""
    count = {status: sum(row.status == status for row in rows) for status in (WARN, BAD)}
    if count[BAD]:
        return f"{count[BAD]} broken, {count[WARN]} to look at: mend the lines marked bad first"
    return f"nothing broken, {count[WARN]} to look at" if count[WARN] else "all is well"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in SECTIONS:
            hint = did_you_mean(name, SECTIONS, form=" (did you mean {}?)")
            parser.error(f"--only {name}: there is no such section{hint}; they are {', '.join(SECTIONS)}")
    try:
        importlib.import_module("deepspeedlite.runtime.log")  # which refuses a DSL_LOG_LEVEL that is no level
        rows = _of_nodes(args) if args.hostfile else collect(args.only or tuple(SECTIONS), args.path or (".",))
    except (LaunchError, ConfigError) as error:
        parser.error(str(error))
    if isinstance(sys.stdout, io.TextIOWrapper):  # in the C locale not every folder's name can be shown
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "verdict": verdict(rows)}, indent=1))
    else:
        print(render(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return int(any(row.status == BAD for row in rows))


def _of_nodes(args: argparse.Namespace) -> list[Row]:
    only = [word for name in args.only or () for word in ("--only", name)]
    hosts = list(read_hostfile(args.hostfile, slots_needed=False))
    if sys.stderr.isatty():
        print(f"asking {len(hosts)} nodes, {nodes.NODE_TIMEOUT_S:.0f} s at most", file=sys.stderr)
    found = nodes.reports(hosts, args.ssh, [*only, *(word for path in args.path or () for word in ("--path", path))])
    return [*nodes.broken(found), *nodes.differences(found)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dslite_report",
        description="What this machine offers for training, and what is wrong.",
        epilog="Exit status: 0, 1 if something is broken, 2 for a wrong command line.",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--only", action="append", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; repeatable")
    told = "a folder whose disk is looked at, such as that of checkpoints or offload (.); repeatable"
    parser.add_argument("--path", action="append", metavar="DIR", help=told)
    parser.add_argument(
        "--hostfile", metavar="FILE", help="every node's report, by ssh, and what differs between the nodes"
    )
    parser.add_argument("--ssh", default="ssh", metavar="COMMAND", help="how nodes are reached, such as 'ssh -p 2222'")
    return parser
