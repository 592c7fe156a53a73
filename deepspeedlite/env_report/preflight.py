"""Before a training on several machines: what each says of itself, and what would keep them from working together.

`facts` runs on every node in a few milliseconds and imports no torch; `check` compares. A row's section is the host.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepspeedlite._version import __version__
from deepspeedlite.env_report.rows import BAD, OK, WARN, Row, output_of, read_text, torch_files
from deepspeedlite.host import network
from deepspeedlite.host.cores import usable_cores
from deepspeedlite.host.gpus import Devices, find_devices
from deepspeedlite.host.text import GIB, MIB, columns, size_text
from deepspeedlite.launcher.hostfile import bare, ssh_words
from deepspeedlite.runtime.errors import LaunchError

_SKEW_S = 2.0  # logs and file times of the nodes stop making sense together
_LOOKUP_S = 1.0  # a name server that is slower delays every start by it
_SHM_BYTES, _OPS_BYTES = GIB, 512 * MIB  # less of it free is too little for loaders' workers, and to compile ops
OWN_NAME_REMEDY = (
    "give it the network's address in /etc/hosts; ranks of the launcher do without (GLOO_SOCKET_IFNAME), torchrun's not"
)
_REMEDIES = {
    "start": (BAD, "every node needs the same files at the same paths, and variables that fit its own devices"),
    "own name": (WARN, OWN_NAME_REMEDY),
    "cores": (WARN, "start fewer ranks there: they wait for each other"),
    "/dev/shm": (WARN, "give a container more: docker run --shm-size=8g (or --ipc=host); delete old files in it"),
    "open files": (WARN, "raise it there: ulimit -n 65536, LimitNOFILE= of sshd, docker run --ulimit nofile=65536"),
    "ops' folder": (WARN, "make room, or name another by TORCH_EXTENSIONS_DIR; a wheel with compiled ops needs none"),
}
_ALIKE = {
    "python": "every node runs the same Python; `install.sh` installs one wheel on all of them",
    "torch": "install the same torch on every node: pip install torch==VERSION",
    "deepspeedlite": "install the same wheel on every node: install.sh --hostfile FILE",
}
# What ssh, pdsh, srun or an agent says of a host that it names, after which nothing comes from it any more.
_FATAL = re.compile(
    r"\bssh: |exited with exit code|Permission denied|[Hh]ost key|Connection (closed|reset|timed out|refused)"
    r"|srun: error|^deepspeedlite: "
)
_FATAL_FOR_ALL = re.compile(r"srun: Required node not available")
# What is said of a host that does not answer -> what to do.
_UNREACHED = (
    (
        "launcher cannot be reached",
        "open this machine's ports to it (firewall); --launcher ssh needs sshd's port alone",
    ),
    (
        "no connection",
        "see that `ssh {ssh} true` works without a password, and that {host} can connect to this machine (firewall); "
        "--launcher ssh needs sshd's port alone",
    ),
    ("--venv_script", "see what that waits for there, or give it longer by --start_timeout"),
    ("given up because", "see to that one first"),
    ("srun", "`sinfo -N -l` says which node is down, and why"),
    ("No such file|not found", "every node needs Python and the wheel at the same path: install.sh --hostfile FILE"),
    ("Permission denied", "let this user in without a password: ssh-copy-id {ssh}"),
    ("[Hh]ost key", "accept its key once: ssh {ssh} true"),
    ("resolve|not known", "correct the name in the hostfile, or add it to /etc/hosts"),
    ("timed out|No route|refused", "see that {host} is on, that sshd runs there, and that no firewall is between"),
    ("", "see that `ssh {ssh} true` works without a password, and that Python is at the same path there"),
)
_COLUMNS = ("reached", *_ALIKE, "clock", "GPUs", "master")  # of the table; what else is odd is counted in the last one


@dataclass
class Found:
    """One node: how many slots are asked of it (None: whatever it has), and what it said."""

    host: str
    slots: Sequence[int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""  # why it said nothing
    skew_s: float = 0.0  # its clock, less the launcher's
    reached: bool | None = None  # whether it reaches the master; None: not tried
    unreached: str = ""  # why not

    @property
    def devices(self) -> Devices:
        """What its ranks may use."""
        return Devices(**self.facts["devices"])

    @property
    def used_ids(self) -> list[str]:
        """Those of them that its slots are; a slot beyond them is none."""
        return [self.devices.ids[slot] for slot in self.slots or () if slot < len(self.devices.ids)]


def reason_for(host: str, said: str) -> str:
    """Why a host was not reached, in the words of ssh, of what started ssh, or of an agent; "" where none is said."""
    name, lines = bare(host), said.strip().splitlines()
    about = [
        line for line in lines if _FATAL.search(line) and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", line)
    ]
    own = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
    every = [line for line in lines if _FATAL_FOR_ALL.search(line)]
    return ((about and own) or about or every or [""])[-1].strip()


def last_line(said: str) -> str:
    """The last that was said, or the first of what Open MPI frames."""
    lines = [line.strip() for line in said.splitlines() if line.strip(" -")]
    return lines[0 if "-----" in said else -1] if lines else ""


def own_name() -> tuple[str, str]:
    """This machine's name and the address that it finds under it; "" for none."""
    name = socket.gethostname()
    if shutil.which("getent") is not None:  # which, unlike a call, can be given up
        return name, output_of(["getent", "ahostsv4", name], _LOOKUP_S).partition(" ")[0]
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, ""


def own_name_fault(name: str, address: str) -> str:
    """Why ranks that look their own address up would not be found by others; "" where they would."""
    if not address:
        return f"{name} has no address"
    return f"{name} is {address}, which only this machine reaches" if address.startswith("127.") else ""


def facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """What this machine is for ranks with this environment, as JSON. `fault`: why none can start here."""
    from deepspeedlite.ops.op_builder.folders import cache_folder

    devices, fault = Devices("cpu"), ""
    try:
        devices = find_devices(environ)
    except LaunchError as error:
        fault = str(error)
    torch, cache = torch_files(), cache_folder()
    cache = next(path for path in (cache, *cache.parents) if os.path.exists(path))
    return {
        "addresses": network.addresses(),
        "machine": f"{read_text('/proc/sys/kernel/random/boot_id').strip()} {os.stat('/proc/self/ns/net').st_ino}",
        "own_name": own_name_fault(*own_name()),
        "cores": usable_cores(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_bytes": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        "cache": [str(cache), os.access(cache, os.W_OK), shutil.disk_usage(cache).free],
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch.version if torch else "none",
        "deepspeedlite": f"{__version__} {_wheel_mark()}".strip(),
        "devices": asdict(devices),
        "fault": fault,
        "time": time.time(),
    }


def _wheel_mark() -> str:
    """What tells two wheels of one version apart; "" for a source tree."""
    try:
        record = importlib.metadata.distribution("deepspeedlite").read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    files = sorted(line for line in record.splitlines() if line.startswith("deepspeedlite/") and ".pyc" not in line)
    return f"({zlib.crc32(chr(10).join(files).encode()):08x})" if len(files) > 1 else ""


def check(nodes: Sequence[Found], master: str = "", by_hand: bool = False) -> list[Row]:
    """A row per node and thing that was looked at; the bad ones keep a training from starting.

    `by_hand`: somebody started a command for each node, so that two on one machine are no mistake of a hostfile.
    """
    said = [node for node in nodes if node.facts]
    ranks = sum(len(node.slots or ()) for node in said)
    first_on: dict[str, Found] = {}  # each machine
    usual = {key: Counter(node.facts[key] for node in said).most_common(1)[0][0] for key in _ALIKE if said}
    rows = []
    for node in nodes:
        if not node.facts:
            ssh = " ".join(word for word in ssh_words(node.host) if word != "--")
            remedy = next(text for pattern, text in _UNREACHED if re.search(pattern, node.error))
            rows.append(
                Row(node.host, "reached", node.error or "no answer", BAD, remedy.format(host=bare(node.host), ssh=ssh))
            )
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
        rows += [_gpus(node), *_short_of(node, ranks)]
        other = first_on.setdefault(node.facts["machine"], node)
        if other is not node:
            rows.append(_twice(node, other, by_hand))
        if node.reached is not None:
            remedy = "open the port between the nodes (firewall), or name another address with --master_addr"
            value = f"reaches {master}" if node.reached else f"cannot reach {master}: {node.unreached}"
            rows.append(Row(node.host, "master", value, OK if node.reached else BAD, "" if node.reached else remedy))
    return rows


def _twice(node: Found, other: Found, by_hand: bool) -> Row:
    """The row of a machine that `other` is too."""
    if not by_hand:
        remedy = f"name it once, with all of its slots: remove {node.host} or {other.host}"
        return Row(node.host, "machine", f"is {other.host} under another name", BAD, remedy)
    shared = sorted(set(node.used_ids) & set(other.used_ids))
    value = f"is the one that {other.host} is on" + (f", and both would use GPU {', '.join(shared)}" if shared else "")
    remedy = f"one command with --num_gpus is quicker; GPUs are shared out by {node.devices.variable}"
    return Row(node.host, "machine", value, BAD if shared else WARN, remedy)


def _short_of(node: Found, ranks: int) -> Iterator[Row]:
    """What of this node will stop or slow a training of so many ranks in all."""
    facts, slots = node.facts, len(node.slots or ())
    limit, files = facts["files"], 256 + 8 * slots + 4 * ranks  # each rank is connected to each, some twice
    folder, is_writable, free_bytes = facts["cache"]
    room = f"{size_text(free_bytes)} free in {folder}" if free_bytes < _OPS_BYTES else ""
    shm_bytes = facts["shm_bytes"]
    faults = {
        "start": facts["fault"],
        "own name": facts["own_name"],
        "cores": f"{facts['cores']} for {slots} ranks" if slots > facts["cores"] else "",
        "/dev/shm": f"{size_text(shm_bytes)} free" if shm_bytes < _SHM_BYTES else "",
        "open files": f"{limit}, and {slots} of {ranks} ranks may take {files}" if 0 <= limit < files else "",
        "ops' folder": room if is_writable else f"{folder} cannot be written",
    }
    return (Row(node.host, name, value, *_REMEDIES[name]) for name, value in faults.items() if value)


def _gpus(node: Found) -> Row:
    devices = node.devices
    count = len(devices.ids)
    has = f"{count} {devices.vendor}" if count else "none, CPU ranks"
    if count and node.slots and max(node.slots) >= count:
        remedy = f"{devices.source}: correct the slots of {node.host} in the hostfile, or the variable"
        return Row(node.host, "GPUs", f"{has}; slot {max(node.slots)} is asked for", BAD, remedy)
    return Row(node.host, "GPUs", has, OK)


def table(rows: Sequence[Row], colour: bool) -> str:
    """One line per node, and below it what is not well, with its remedy."""
    hosts = list(dict.fromkeys(row.section for row in rows))
    shown = list(dict.fromkeys(row.name for row in rows if row.name in _COLUMNS))
    cells = {(row.section, row.name): row for row in rows}
    marks = {OK: "", WARN: "! ", BAD: "X "}
    paint = {OK: "32", WARN: "33", BAD: "1;31"}

    def text(status: str, value: str) -> str:
        value = marks[status] + (value if len(value) <= 28 else value[:27] + "…")
        return f"\x1b[{paint[status]}m{value}\x1b[0m" if colour else value

    def line(host: str) -> Iterator[str]:
        yield host
        for row in (cells.get((host, name)) for name in shown):
            yield text(row.status, row.value) if row else ""
        more = [row for row in rows if row.section == host and row.name not in _COLUMNS]
        worst = BAD if any(row.status == BAD for row in more) else WARN
        yield text(worst, f"{len(more)} below") if more else ""

    lines = columns([["node", *shown, ""], *map(list, map(line, hosts))])
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.remedy:
            alike.setdefault((row.name, row.value, row.remedy), []).append(row.section)
    for (name, value, remedy), where in alike.items():
        lines.append(f"{', '.join(where)}: {name}: {value}\n    {remedy}")
    return "\n".join(lines)
