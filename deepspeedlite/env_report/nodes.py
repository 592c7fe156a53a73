"""Several machines: every node's report over ssh, at once, and what differs between them.

A node that does not answer in time is a row of its own; nobody waits for it longer than that.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence

from deepspeedlite.env_report.rows import BAD, INFO, Row
from deepspeedlite.launcher.ssh import TIMED_OUT, HostResult, run_on_hosts

NODE_TIMEOUT_S = 60.0
# What differs between healthy nodes: rows by their section, or by section and name.
_OWN = {"network", "cache", "disk", ("machine", "memory"), ("machine", "/dev/shm"), ("nodes", "report")}
_OWN_VARIABLES = {"RANK", "LOCAL_RANK", "TMPDIR", "world"}


def reports(hosts: Sequence[str], ssh: str, arguments: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Every host's rows; `ssh` is the command that reaches them, `arguments` are the report's."""
    remote = shlex.join([sys.executable, "-m", "deepspeedlite.env_report", "--json", *arguments])
    said: dict[str, list[bytes]] = {host: [b"", b"", b""] for host in hosts}

    def keep(host: str, stream: int, lines: bytes) -> None:
        said[host][stream] += lines

    results = run_on_hosts(hosts, [remote], keep, ssh, NODE_TIMEOUT_S)
    return {host: _rows_of(host, remote, results[host], *said[host][1:]) for host in hosts}


def _rows_of(host: str, remote: str, result: HostResult, out: bytes, err: bytes) -> list[Row]:
    if result.status == TIMED_OUT:
        return [_silent(f"did not answer in {NODE_TIMEOUT_S:.0f} s", f"look at {host}: ssh {host} uptime")]
    if "cannot be run" in result.reason:
        value, _, remedy = result.reason.partition("; ")
        return [_silent(value, remedy)]
    try:
        return [Row(**row) for row in json.loads(out)["rows"]]
    except (ValueError, KeyError, TypeError):
        said = [err.decode(errors="replace").strip(), out.decode(errors="replace").strip(), result.reason]
        words = next(filter(None, said)).splitlines()
        remedy = f"see that `ssh {host} {remote}` works without a password"
        return [_silent(f"no report: {words[-1]}", remedy)]


def _silent(value: str, remedy: str) -> Row:
    return Row("nodes", "report", value, BAD, remedy)


def broken(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A row per node: how it is, with its worst finding."""
    rows = []
    for host, its in found.items():
        bad = [row for row in its if row.status == BAD]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            rows.append(Row("nodes", host, f"{bad[0].name}: {bad[0].value}{more}", BAD, bad[0].remedy))
        else:
            rows.append(Row("nodes", host, "nothing broken", "ok"))
    return rows


def differences(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A row for each value that nodes which reported do not agree on, with who has which."""
    speaking = {host: its for host, its in found.items() if not any(row.section == "nodes" for row in its)}
    keys = dict.fromkeys((row.section, row.name) for its in speaking.values() for row in its)
    rows = []
    for section, name in keys:
        if section in _OWN or (section, name) in _OWN or (section == "variables" and name in _OWN_VARIABLES):
            continue
        holders: dict[str, list[str]] = {}
        for host, its in speaking.items():
            value = next((row.value for row in its if (row.section, row.name) == (section, name)), "-")
            holders.setdefault(value, []).append(host)
        if len(holders) > 1:
            text = "; ".join(f"{_names(hosts)}: {value}" for value, hosts in holders.items())
            rows.append(Row("differences", f"{section} {name}", text))
    if len(speaking) > 1 and not rows:
        rows.append(Row("differences", "none", "all nodes that answered are alike", INFO))
    return rows


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
