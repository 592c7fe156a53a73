"""The hostfile: which machines there are and how many ranks each takes, one line per machine. And choosing from it.

# two machines with four GPUs each
worker-1 slots=4
me@worker-2:2222 slots=4 max_slots=8   # a user and sshd's port, where they differ; the rest of a line is a comment
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.text import did_you_mean

DEFAULT_HOSTFILE = "/job/hostfile"
# ssh would take a leading dash for an option; pdsh, the include grammar and shells give other characters a meaning.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?([A-Za-z0-9_][A-Za-z0-9._-]*)(?::([0-9]{1,5}))?")
_SLOTS = re.compile(r"slots=([0-9]{1,6})")
_MORE = re.compile(r"max[_-]slots=[0-9]+")  # Open MPI's, which says nothing of how many ranks are started


def bare(host: str) -> str:
    """`me@worker-1:2222` is worker-1."""
    found = _HOST.fullmatch(host)
    return found[1] if found else host


def ssh_words(host: str, port: int | None = None) -> list[str]:
    """What ssh must be told to go there: its own port, else `port`, and its name with its user."""
    found = _HOST.fullmatch(host)
    own = found[2] if found else None
    at = own or port
    return [*(["-p", str(at)] if at is not None else []), "--", host.removesuffix(f":{own}")]


def read_hostfile(path: str | os.PathLike[str], slots_needed: bool = True) -> dict[str, int]:
    """Host -> slots (how many ranks it takes), in the file's order.

    Without `slots_needed` a line may name the host alone, which gives it 0 slots: for those who only want the names.

    Raises:
        LaunchError: it cannot be read, names nobody, or has lines that are wrong: each is listed with its number.
    """
    try:
        lines = lines_of(path)
    except OSError as error:
        raise LaunchError(f"hostfile {path} cannot be read: {error.strerror}") from error
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        host = words[0]
        fault = _fault(words, slots_needed)
        if host in line_of:
            fault = f"{host} is on line {line_of[host]} already; write one line per host, with all of its slots"
        line_of.setdefault(host, number)
        if fault:
            faults.append(f"line {number}: {fault}")
        else:
            hosts[host] = next((int(found[1]) for word in words if (found := _SLOTS.fullmatch(word))), 0)
    if faults:
        raise LaunchError(f"hostfile {path}, " + "\n  ".join(faults))
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host; write one per line, such as: worker-1 slots=4")
    return hosts


def lines_of(path: str | os.PathLike[str]) -> list[str]:
    """A file's lines. Bytes that are not UTF-8 do no harm in a comment or a value, and are refused in a name.

    Raises:
        OSError: it cannot be read.
        LaunchError: it is no UTF-8.
    """
    data = Path(path).read_bytes()
    if b"\0" in data:  # whatever is in it, every other byte of a Latin letter
        remedy = f"iconv -f UTF-16 -t UTF-8 {path} (PowerShell's `>` writes so; there: Out-File -Encoding utf8)"
        raise LaunchError(f"{path} is written in UTF-16, not UTF-8; convert it: {remedy}")
    return data.decode("utf-8-sig", "surrogateescape").split("\n")


def _fault(words: list[str], slots_needed: bool) -> str | None:
    host = words[0]
    if host.startswith("-"):
        return f"the host {host} begins with '-', which ssh would take for an option; begin the line with a host's name"
    if not _HOST.fullmatch(host):
        return (
            f"{host!r} is no host's name or IPv4 address, such as worker-1 or me@worker-1:2222; an IPv6 address goes "
            "into ssh's configuration, under a name of letters, digits, '.', '_' and '-'"
        )
    words = [word for word in words if not _MORE.fullmatch(word)]
    if len(words) == 1:
        return f"{host} has no slots; write how many ranks it takes, such as: {host} slots=4" if slots_needed else None
    slots = _SLOTS.fullmatch(words[1])
    if not slots or len(words) > 2:
        return f"{' '.join(words[1:])!r} after {host} is not understood; write: {host} slots=4"
    if int(slots[1]) < 1:
        return f"{host} has slots={slots[1]}; write at least 1, or remove the line to leave the host out"
    return None


def select(hosts: Mapping[str, Sequence[int] | None], include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """What --include leaves, or --exclude, of hosts and their slots; in the hosts' order.

    The grammar is `HOST[:SLOT,SLOT-SLOT...]@HOST...`: `worker-2:0,2-3@worker-3` is three slots of one host and all of
    another. A host whose slots are None takes any that are named.

    Raises:
        LaunchError: both are given, a host or slot is unknown or named twice, or nothing is left.
    """
    if include and exclude:
        raise LaunchError("--include and --exclude exclude each other; name what is wanted, or what is not")
    option, text = ("--include", include) if include else ("--exclude", exclude or "")
    named: dict[str, list[int] | None] = {}
    names = {**{bare(host): host for host in hosts}, **{host: host for host in hosts}}
    for part in text.split("@") if text else ():
        name = max((name for name in names if part.strip().startswith(f"{name}:")), key=len, default="")
        host, colon, slots = (word.strip() for word in part.strip()[len(name) :].partition(":"))
        host = names.get(name or host, host)
        if host not in hosts:
            near = did_you_mean(host, hosts, form="; did you mean {}?")
            raise LaunchError(f"{option} {text}: there is no host {host!r}{near}")
        if host in named:
            raise LaunchError(f"{option} {text} names {host} twice; write its slots together, as {host}:0,2-3")
        named[host] = numbers_in(slots, f"{option} {text}", "slot") if colon else None
        known = hosts[host]
        if wrong := [slot for slot in named[host] or () if known is not None and slot not in known]:
            raise LaunchError(f"{option} {text}: {host} has no slot {wrong[0]}; its slots are {known}")
    left = {}
    for host, known in hosts.items():
        asked = named.get(host)
        if include:
            slots_left = (asked if asked is not None else known) if host in named else []
        else:
            slots_left = [] if host in named and asked is None else [s for s in known or () if s not in (asked or ())]
        if slots_left:
            left[host] = sorted(slots_left)
    if not left:
        raise LaunchError(f"{option} {text} leaves no slot of {', '.join(hosts)}")
    return left


def numbers_in(text: str, where: str, what: str) -> list[int]:
    """`0,2-4` is 0, 2, 3, 4. `what` they are and `where` they stand is for errors.

    Raises:
        LaunchError: a part is no number or range, or a number comes twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if span is None or (span[2] and int(span[2]) < int(span[1])):
            raise LaunchError(f"{where}: {part!r} is no {what} or range of {what}s; write them as 0,2-3")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    if len(set(numbers)) < len(numbers):
        raise LaunchError(f"{where} names a {what} twice")
    return numbers
