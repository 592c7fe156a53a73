"""Before a training on several machines: what each says of itself, and what would keep them from working together.

`facts` runs on every node in a few milliseconds and imports no torch; `check` compares. A row's section is the host.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeedlite._version import __version__
from deepspeedlite.env_report.rows import BAD, OK, WARN, Row, torch_files
from deepspeedlite.runtime.gpus import find_devices
from deepspeedlite.runtime.text import columns

_SKEW_S = 2.0  # logs and file times of the nodes stop making sense together
_ALIKE = {
    "python": "every node runs the same Python; `install.sh` installs one wheel on all of them",
    "torch": "install the same torch on every node: pip install torch==VERSION",
    "deepspeedlite": "install the same wheel on every node: install.sh --hostfile FILE",
}


@dataclass
class Found:
    """One node: how many slots are asked of it (None: whatever it has), and what it said."""

    host: str
    slots: Sequence[int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""  # why it said nothing
    skew_s: float = 0.0  # its clock, less the launcher's
    reached: bool | None = None  # whether it reaches the master; None: not tried


def facts() -> dict[str, Any]:
    """What this machine is, as JSON."""
    import psutil

    devices = find_devices(os.environ)
    torch = torch_files()
    named = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), socket.gethostname().split(".")[0]]
    found = [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
    return {
        "names": [name for name in dict.fromkeys(named) if name],
        "addresses": [address for address in dict.fromkeys(found) if not address.startswith("127.")],
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch.version if torch else "none",
        "deepspeedlite": f"{__version__} {_wheel_mark()}".strip(),
        "time": time.time(),
        "gpus": len(devices.ids),
        "vendor": devices.vendor,
        "visible": f"{devices.variable}={','.join(devices.ids)}" if devices.from_variable else "",
    }


def _wheel_mark() -> str:
    """What tells two wheels of one version apart; "" for a source tree."""
    try:
        record = importlib.metadata.distribution("deepspeedlite").read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    files = sorted(line for line in record.splitlines() if line.startswith("deepspeedlite/") and ".pyc" not in line)
    return f"({zlib.crc32(chr(10).join(files).encode()):08x})" if len(files) > 1 else ""


def check(nodes: Sequence[Found], master: str = "") -> list[Row]:
    """A row per node and thing that was looked at; the bad ones keep a training from starting."""
    said = [node for node in nodes if node.facts]
    usual = {key: Counter(node.facts[key] for node in said).most_common(1)[0][0] for key in _ALIKE if said}
    rows = []
    for node in nodes:
        if not node.facts:
            remedy = (
                f"see that `ssh {node.host} true` works without a password, and that Python is at the same path there"
            )
            rows.append(Row(node.host, "reached", node.error or "no answer", BAD, remedy))
            continue
        rows.append(Row(node.host, "reached", "yes", OK))
        for key, remedy in _ALIKE.items():
            value = str(node.facts[key])
            bad = value != usual[key] or (key == "torch" and value == "none")
            others = f" (most nodes: {usual[key]})" if value != usual[key] else ""
            rows.append(Row(node.host, key, value + others, BAD if bad else OK, remedy if bad else ""))
        skewed = abs(node.skew_s) > _SKEW_S
        remedy = "run an NTP client (chrony, systemd-timesyncd) on every node" if skewed else ""
        rows.append(Row(node.host, "clock", f"{node.skew_s:+.1f} s", WARN if skewed else OK, remedy))
        rows.append(_gpus(node))
        if node.reached is not None:
            remedy = "open the port between the nodes (firewall), or name another address with --master_addr"
            value = f"reaches {master}" if node.reached else f"cannot reach {master}"
            rows.append(Row(node.host, "master", value, OK if node.reached else BAD, "" if node.reached else remedy))
    return rows


def _gpus(node: Found) -> Row:
    count, vendor = node.facts["gpus"], node.facts["vendor"]
    has = f"{count} {vendor}" if count else "none, CPU ranks"
    if count and node.slots and max(node.slots) >= count:
        remedy = f"correct the slots of {node.host} in the hostfile, or its CUDA_VISIBLE_DEVICES"
        return Row(node.host, "GPUs", f"{has}; slot {max(node.slots)} is asked for", BAD, remedy)
    return Row(node.host, "GPUs", has, OK)


def table(rows: Sequence[Row], colour: bool) -> str:
    """One line per node, and below it the remedies of what is not well."""
    names = list(dict.fromkeys(row.name for row in rows))
    hosts = list(dict.fromkeys(row.section for row in rows))
    cells = {(row.section, row.name): row for row in rows}
    marks = {OK: "", WARN: "! ", BAD: "X "}
    paint = {OK: "32", WARN: "33", BAD: "1;31"}

    def text(host: str, name: str) -> str:
        row = cells.get((host, name))
        if row is None:
            return ""
        shown = marks[row.status] + (row.value if len(row.value) <= 28 else row.value[:27] + "…")
        return f"\x1b[{paint[row.status]}m{shown}\x1b[0m" if colour else shown

    lines = columns([["node", *names], *([host, *(text(host, name) for name in names)] for host in hosts)])
    for row in rows:
        if row.remedy:
            lines.append(f"{row.section}: {row.name}: {row.value}\n    {row.remedy}")
    return "\n".join(lines)
