"""Decides which rank failed first, and words the last thing the launcher prints.

The order in which ranks exit can mislead: while a rank that raised is still tearing down its GPU, its peers may
already have died of the broken connection. So a failure counts from the moment its final traceback appeared, not
from the exit, and among failures of the same moment an error that looks like a lost peer comes last.
"""

from __future__ import annotations

import re
import signal
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepspeedlite.runtime.log import logger

# What an agent tells: [rank, when] of a traceback, the fields of a RankEnd, and at last [how many processes the ranks
# have left behind, those that cannot be ended]. Times are its time.monotonic().
RAISED, ENDED, CLOSED = b"R", b"D", b"Q"
_TAIL_BYTES = 64 << 10
_MAX_LINES = 12  # of what a rank said at its end
_EARLY_GRACE_S = 5.0
_NAMED = 8  # ranks in a line
_HEADER = "Traceback (most recent call last):"
_HEADER_BYTES = _HEADER.encode()
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_IGNORED = "Exception ignored"
_RANK_TAG = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)  # torch puts it before each line of an initialised rank
# What a rank says that lost its peer, by whose words these are.
CONSEQUENCES = {
    "torch's store": r"DistNetworkError|DistStoreError|recvValue failed|sendBytes failed|socket timeout",
    "gloo": r"connection (was )?(closed|reset)|broken pipe|connection refused|remote process exited"
    r"|Gloo connectFullMesh|timed out waiting \d+ ?ms for (recv|send) operation",
    "NCCL": r"ncclRemoteError|ncclSystemError|NCCL watchdog|Watchdog caught collective|collective operation timeout",
    "transports": r"rank \d+ has ended|rank \d+ has read nothing for|waited \d+ s for rank",
    "saves and loads": r"\[[\d, ]+\] have ended|ended before it was done, or did not answer",
    "the start": r"lost the connection to rank 0's store|did not arrive within|could not reach rank 0",
}
_LOST_PEER = re.compile("|".join(CONSEQUENCES.values()), re.IGNORECASE)
# Signals by which a rank ends that lost its peer: native code gives up, or somebody who has noticed ends it.
_OF_CONSEQUENCES = (signal.SIGABRT, signal.SIGTERM)
# torch's C++ warnings about sockets: their first line, and how the lines begin that follow.
_SOCKET_WARNING = re.compile(rb"(\[rank\d+\]:)?\[W\d+ [\d:.]+ \w+\.cpp:\d+\] \[c10d\] ")
_GOES_ON = (b"Exception raised from ", b"frame #", b"<omitting python frames>", b"\n")
_SIGNAL_HINTS = {
    signal.SIGKILL: "nobody but the system or a person sends this: often the kernel was out of memory (see `dmesg`)",
    signal.SIGBUS: "often shared memory is full: see `df -h /dev/shm`, and give a container more with --shm-size",
    signal.SIGSEGV: "a crash in native code; PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: "native code gave up; its message is above",
}


class Quiet:
    """Leaves torch's warnings about sockets out of a stream: where a peer has gone each rank has dozens of lines."""

    def __init__(self) -> None:
        self._is_inside = False

    def __call__(self, lines: bytes) -> bytes:
        """Whole lines without those."""
        if not self._is_inside and b"[c10d]" not in lines:
            return lines
        kept = []
        for line in lines.splitlines(True):
            is_more = self._is_inside and line.startswith(_GOES_ON)
            self._is_inside = is_more or _SOCKET_WARNING.match(line) is not None
            if not self._is_inside:
                kept.append(line)
        return b"".join(kept)


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
class RankEnd:
    """How one rank, or a whole node, ended on its own. Times are time.monotonic()."""

    rank: int
    status: int  # >= 0: exit code; < 0: the signal that killed it
    exited_s: float
    traceback_s: float | None = None
    stderr: str = ""
    log_path: str | None = None
    host: str = ""  # "" where there is one machine
    lost: str = ""  # why, if it is not a rank but its whole node that failed

    @property
    def failed_s(self) -> float:
        """When it went wrong, as nearly as can be told from outside."""
        return self.exited_s if self.traceback_s is None else min(self.traceback_s, self.exited_s)

    @property
    def lost_peer(self) -> bool:
        """Whether its last words are those of a rank whose peer has gone. One that was killed needs no other reason."""
        if self.lost or (self.status < 0 and -self.status not in _OF_CONSEQUENCES):
            return False
        return _LOST_PEER.search(last_words(self.stderr)) is not None

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


def first_failure(failures: Sequence[RankEnd]) -> RankEnd:
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
    return "\n".join(block[:end]).rstrip()


def last_words(text: str) -> str:
    """What a rank had to say at its end: its last traceback, else its last lines on stderr."""
    text = Quiet()(text.encode(errors="replace")).decode() or text
    return extract_traceback(text) or "\n".join(text.rstrip().splitlines()[-_MAX_LINES:])


def _message(traceback: str) -> str:
    """What a traceback is about: all behind its frames, which are indented."""
    lines = traceback[traceback.rfind(_HEADER) :].splitlines()[1:]
    start = next((index for index, line in enumerate(lines) if line[:1].strip()), -1)
    return "\n".join(lines[start:][:_MAX_LINES])


def failure_report(
    first: RankEnd, started_s: float, num_ranks: int, also_failed: Sequence[int], left: Sequence[int] = ()
) -> str:
    """The block that is printed last: who failed first, how, when, its last words, and where to read more."""
    when = f"{duration(first.failed_s - started_s)} after the start"
    where = f" on {first.host}" if first.host else ""
    if first.lost:
        return f"{first.host} failed: {first.lost}, {when}\nthe other ranks, of {num_ranks} in all, were ended"
    facts = [f"rank {first.rank}{where} failed first: {first.ending}, {when}"]
    if also_failed:
        facts.append(f"failed after it: rank {', '.join(map(str, sorted(also_failed)))}")
    if left:
        facts.append(f"ended before it, with exit code 0: rank {', '.join(map(str, sorted(left)))}")
    others = num_ranks - 1 - len(also_failed) - len(left)
    if others:
        facts.append(f"the other {others} of {num_ranks} ranks were ended or had ended")
    if first.log_path:
        facts.append(f"its log: {first.log_path}{where}")
    words, traceback = last_words(first.stderr), extract_traceback(first.stderr)
    if traceback:  # it has been shown, among what others have said since
        tag = "" if num_ranks == 1 else f", after [{f'{first.host}:' * bool(first.host)}{first.rank}]"
        facts.append(f"its last error (the traceback is in its output{tag}):")
        words = _message(traceback)
    else:
        facts.append("its last lines on stderr:" if words else "it wrote nothing to stderr")
    return "\n".join([*facts, *[textwrap.indent(words, "    ")] * bool(words)])


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Outcome:
    """How a start of a training goes, as its nodes tell it. Use once. Times are time.monotonic().

    Args:
        num_ranks: on all machines; 0 until they are known.
    """

    def __init__(self, num_ranks: int) -> None:
        self.begin(num_ranks)
        self.ended_s = self.started_s
        self.ends: dict[int, RankEnd] = {}  # of those ranks that have ended
        self.raised_s: dict[int, float] = {}  # when a rank's latest traceback began
        self.lost: list[RankEnd] = []  # whole nodes
        self.gone: list[str] = []  # those of them that cannot be used again
        self.failures: list[RankEnd] = []  # those that count: what ends later has been ended
        self.interrupted_by: int | None = None
        self.left_behind = 0
        self.unkillable: list[str] = []
        self._early_told: set[int] = set()

    def begin(self, num_ranks: int) -> None:
        """So many ranks start."""
        self.num_ranks, self.started_s = num_ranks, time.monotonic()

    def hear(self, kind: bytes, value: Any, host: str = "", offset_s: float = 0.0) -> None:
        """Take in what the agent of a host tells, whose clock is ahead of ours by `offset_s`."""
        if kind == RAISED:
            rank, at_s = value
            self.raised_s[rank] = at_s - offset_s
        elif kind == ENDED:
            end = RankEnd(**value)
            seen_s = None if end.traceback_s is None else end.traceback_s - offset_s
            self.ends[end.rank] = replace(end, host=host, exited_s=end.exited_s - offset_s, traceback_s=seen_s)
        elif kind == CLOSED:
            left_behind, unkillable = value
            self.left_behind += left_behind
            self.unkillable += [f"{host}:{pid}" if host else str(pid) for pid in unkillable]

    def failed(self) -> list[RankEnd]:
        """Who has ended badly by now."""
        return [*self.lost, *(end for end in self.ends.values() if end.status)]

    @property
    def first(self) -> RankEnd | None:
        """The failure to blame."""
        return first_failure(self.failures) if self.failures else None

    @property
    def exit_status(self) -> int:
        """0, the first failing rank's status, or 128 + the signal that ended the job."""
        if self.interrupted_by is not None:
            return 128 + self.interrupted_by
        return self.first.exit_status if self.first else 0

    def report(self) -> str:
        """What is printed last after a failure."""
        assert self.first is not None
        also = [end.rank for end in self.failures if end is not self.first and not end.lost]
        before_s = self.first.exited_s
        left = [end.rank for end in self.ends.values() if end.status == 0 and end.exited_s < before_s]
        return failure_report(self.first, self.started_s, self.num_ranks, also, left)

    def tell_early_ends(self) -> float | None:
        """Say once which ranks have ended well while others run on: a script that leaves its loop early on one.

        That may be right, as where rank 0 saves at the end, so it is one line and no failure, said when it has lasted.
        Gives how long to wait before the next call; None: until something happens.
        """
        now_s = time.monotonic()
        new = [end for end in self.ends.values() if not end.status and end.rank not in self._early_told]
        running = [str(rank) for rank in range(self.num_ranks) if rank not in self.ends] if new else []
        due = sorted(end.rank for end in new if now_s - end.exited_s >= _EARLY_GRACE_S)
        if due and running:
            self._early_told.update(due)
            after = duration(min(self.ends[rank].exited_s for rank in due) - self.started_s)
            logger.info(
                "%s %s ended with exit code 0, %s after the start, and %s still %s",
                *(_names([str(rank) for rank in due]), "have" if len(due) > 1 else "has", after),
                *(_names(running), "run" if len(running) > 1 else "runs"),
                extra={"ranks": (-1,)},
            )
        return 1.0 if running and len(due) < len(new) else None


def _names(ranks: Sequence[str]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:_NAMED])}{more}"
