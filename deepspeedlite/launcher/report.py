"""Decides which rank failed first, and words the last thing the launcher prints.

The order in which ranks exit can mislead: while a rank that raised is still tearing down its GPU, its peers may
already have died of the broken connection. So a failure counts from the moment its final traceback appeared, not
from the exit, and among failures of the same moment an error that looks like a lost peer comes last.
"""

from __future__ import annotations

import re
import signal
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepspeedlite.runtime.log import logger

_TAIL_BYTES = 64 << 10
_MAX_LINES = 60
_EARLY_GRACE_S = 5.0
_NAMED = 8  # ranks in a line
_HEADER = "Traceback (most recent call last):"
_HEADER_BYTES = _HEADER.encode()
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_IGNORED = "Exception ignored"
_RANK_TAG = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)  # torch puts it before each line of an initialised rank
# What a rank says that lost its peer, in the words of torch's TCPStore, gloo and NCCL.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused|remote process exited|ncclRemoteError"
    r"|ncclSystemError|NCCL watchdog|Watchdog caught collective|DistNetworkError|DistStoreError|recvValue failed"
    r"|socket timeout|collective operation timeout|Gloo connectFullMesh",
    re.IGNORECASE,
)
_SIGNAL_HINTS = {
    signal.SIGKILL: "nobody but the system or a person sends this: often the kernel was out of memory (see `dmesg`)",
    signal.SIGBUS: "often shared memory is full: see `df -h /dev/shm`, and give a container more with --shm-size",
    signal.SIGSEGV: "a crash in native code; PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: "native code gave up; its message is above",
}


class ErrorTail:
    """The last part of what one rank wrote to stderr, and when its latest traceback began."""

    def __init__(self) -> None:
        self._bytes = b""
        self.traceback_s: float | None = None  # time.monotonic()

    def feed(self, data: bytes, now_s: float) -> None:
        """Take the next bytes, read at `now_s`."""
        seen = len(self._bytes)
        self._bytes += data
        at = self._bytes.find(_HEADER_BYTES, max(0, seen - len(_HEADER_BYTES) + 1))
        while at >= 0:
            lead = self._bytes[max(0, at - 200) : at].decode(errors="replace")
            last_lines = "\n".join(lead.splitlines()[-4:])
            # A chained traceback continues the one before it; an ignored exception ends nothing.
            if _IGNORED not in last_lines and not any(mark in last_lines for mark in _CHAINED):
                self.traceback_s = now_s
            at = self._bytes.find(_HEADER_BYTES, at + 1)
        self._bytes = self._bytes[-_TAIL_BYTES:]

    @property
    def text(self) -> str:
        """What is kept, decoded for reading."""
        return self._bytes.decode(errors="backslashreplace").replace("\r\n", "\n")


@dataclass(frozen=True)
class Failure:
    """One rank that ended badly on its own. Times are time.monotonic()."""

    rank: int
    status: int  # >= 0: exit code; < 0: the signal that killed it
    exited_s: float
    traceback_s: float | None = None
    stderr: str = ""
    log_path: str | None = None
    host: str = ""  # "" where there is one machine
    lost: str = ""  # why, if it is not a rank but its whole node that failed
    left: Sequence[int] = ()  # ranks of its machine that had ended well before it

    @property
    def failed_s(self) -> float:
        """When it went wrong, as nearly as can be told from outside."""
        return self.exited_s if self.traceback_s is None else min(self.traceback_s, self.exited_s)

    @property
    def lost_peer(self) -> bool:
        """Whether its last words are those of a rank whose peer has gone."""
        return not self.lost and _LOST_PEER.search(last_words(self.stderr)) is not None

    @property
    def exit_status(self) -> int:
        """The status a shell would show."""
        if self.lost:
            return 1
        return self.status if self.status >= 0 else 128 - self.status

    @property
    def ending(self) -> str:
        """`exit code 3`, or `killed by SIGSEGV` with what that often means."""
        if self.status >= 0:
            return f"exit code {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.status}"
        hint = _SIGNAL_HINTS.get(-self.status)  # type: ignore[call-overload]
        return f"killed by {name}" + (f" ({hint})" if hint else "")


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The failure to blame: errors of its own before lost peers, then by time, then by rank."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.failed_s, failure.rank))


def extract_traceback(text: str) -> str:
    """The last Python traceback in `text`, with those it is chained to; "" if there is none."""
    lines = _RANK_TAG.sub("", text).splitlines()
    ignored = [
        any(line.startswith(_IGNORED) for line in lines[max(0, index - 1) : index]) for index in range(len(lines))
    ]
    headers = [i for i, line in enumerate(lines) if line.rstrip().endswith(_HEADER) and not ignored[i]]
    if not headers:
        return ""
    start = headers.pop()
    while headers and any(line.startswith(_CHAINED) for line in lines[max(0, start - 3) : start]):
        start = headers.pop()
    block = lines[start:]
    end = next((i for i, line in enumerate(block) if line.startswith(_IGNORED)), len(block))
    return "\n".join(_shorten(block[:end])).rstrip()


def last_words(text: str) -> str:
    """What a rank had to say at its end: its last traceback, else its last lines on stderr."""
    return extract_traceback(text) or "\n".join(text.rstrip().splitlines()[-12:])


def _shorten(lines: list[str]) -> list[str]:
    if len(lines) <= _MAX_LINES:
        return lines
    head, tail = lines[:10], lines[10 - _MAX_LINES :]
    return [*head, f"    ... {len(lines) - _MAX_LINES} lines left out ...", *tail]


def failure_report(first: Failure, started_s: float, num_ranks: int, also_failed: Sequence[int]) -> str:
    """The block that is printed last: who failed first, how, when, its last words, and where to read more."""
    when = f"{duration(first.failed_s - started_s)} after the start"
    where = f" on {first.host}" if first.host else ""
    if first.lost:
        return f"{first.host} failed: {first.lost}, {when}\nthe other ranks, of {num_ranks} in all, were ended"
    facts = [f"rank {first.rank}{where} failed first: {first.ending}, {when}"]
    if also_failed:
        facts.append(f"failed after it: rank {', '.join(map(str, sorted(also_failed)))}")
    if first.left:
        facts.append(f"ended before it, with exit code 0: rank {', '.join(map(str, sorted(first.left)))}")
    others = num_ranks - 1 - len(also_failed) - len(first.left)
    if others:
        facts.append(f"the other {others} of {num_ranks} ranks were ended or had ended")
    if first.log_path:
        facts.append(f"its log: {first.log_path}{where}")
    words = last_words(first.stderr)
    if words:
        kind = "traceback" if extract_traceback(first.stderr) else "lines on stderr"
        facts.append(f"its last {kind}:")
        facts.append(textwrap.indent(words, "    "))
    else:
        facts.append("it wrote nothing to stderr")
    return "\n".join(facts)


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class EarlyEnds:
    """Says which ranks, or machines, have ended well while others run on: a script that leaves its loop early on one.

    That may be right, as where rank 0 saves at the end, so it is one line and no failure, said when it has lasted.

    Args:
        noun: of what ends.
        started_s: time.monotonic() of the start.
    """

    def __init__(self, noun: str, started_s: float) -> None:
        self._noun, self._started_s = noun, started_s
        self._told: set[str] = set()

    def look(self, ended_s: Mapping[str, float], running: Sequence[str], now_s: float) -> bool:
        """Say what there is to say. True if there will be more: call again within about a second.

        Args:
            ended_s: what has ended well, and when.
            running: what has not ended.
            now_s: time.monotonic().
        """
        new = {name: at_s for name, at_s in ended_s.items() if name not in self._told} if running else {}
        due = [name for name, at_s in new.items() if now_s - at_s >= _EARLY_GRACE_S]
        if due:
            self._told.update(due)
            after = duration(min(new[name] for name in due) - self._started_s)
            logger.info(
                "%s %s ended with exit code 0, %s after the start, and %s still %s",
                *(self._names(due), "have" if len(due) > 1 else "has", after),
                *(self._names(running), "run" if len(running) > 1 else "runs"),
                extra={"ranks": (-1,)},
            )
        return len(due) < len(new)

    def _names(self, names: Sequence[str]) -> str:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{self._noun}{'s' * (len(names) > 1)} {', '.join(names[:_NAMED])}{more}"
