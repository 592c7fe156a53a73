"""`dslite_ssh`: one command on all hosts of a hostfile, at once, by ssh.

Every line comes out whole, with its host in front, as it would from pdsh. A host that is dead or hangs costs its own
time-out and no other host's. No torch. `run_on_hosts` serves dslite_report too, and `HostProcess` the launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deepspeedlite.launcher.hostfile import DEFAULT_HOSTFILE, read_hostfile, ssh_words
from deepspeedlite.launcher.loop import ENDING, Loop
from deepspeedlite.launcher.process_tree import die_with
from deepspeedlite.runtime.errors import LaunchError

TIMED_OUT = 124  # as coreutils' timeout has it
CONNECT_S = 6
ASK_NOTHING = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}")
# Notices within 15 s that a host is gone, before the connection or in the middle of it.
QUICK_TO_NOTICE = (*ASK_NOTHING, "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SSH_FAILED = 255
_LINE_LIMIT_BYTES = 1 << 20  # a longer line is broken rather than held in memory
_DRAIN_S = 0.5  # for output that is still in the pipes when ssh has ended; a process left behind may hold them open
_GRACE_S = 1.0  # between SIGTERM and SIGKILL
_POLL_S = 0.05

Write = Callable[[int, bytes], None]  # 1 or 2 for stdout or stderr, and whole lines for it


class Stopped(SystemExit):
    """A signal, or a reader that has left, ended all; `code` is the exit status."""


class HostProcess:
    """A local process that reaches hosts: its lines are handed on as they come, and its last words kept.

    Args:
        write: gets its lines.
        is_link: its stdin and stdout are pipes for somebody else, and only stderr is read here.
        input_path: a file that it reads on stdin.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        loop: Loop,
        write: Write,
        env: Mapping[str, str] | None = None,
        is_link: bool = False,
        input_path: str = os.devnull,
    ) -> None:
        pipe = subprocess.PIPE
        with open(input_path, "rb") as given:
            self.process = subprocess.Popen(
                argv,
                env={**os.environ, **(env or {})},
                stdin=pipe if is_link else given,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),  # safe: no other thread runs yet
            )
        self.last_words = b""  # of stderr
        self._loop, self._write = loop, write
        self._rests: dict[int, bytes] = {}  # descriptor -> its unfinished line; only those that are open
        self.is_late = False  # it was ended for that
        self._limit_s, self._next_signal = 1e12, signal.SIGTERM
        assert self.process.stdout is not None and self.process.stderr is not None
        for number, stream in ((1, self.process.stdout), (2, self.process.stderr))[is_link:]:
            os.set_blocking(stream.fileno(), False)
            self._rests[stream.fileno()] = b""
            loop.watch(stream.fileno(), functools.partial(self._read, number, stream.fileno()))

    @property
    def is_open(self) -> bool:
        """Whether more may be said."""
        return bool(self._rests)

    def _read(self, number: int, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        *lines, rest = (self._rests[fd] + data).split(b"\n")
        if rest and (not data or len(rest) > _LINE_LIMIT_BYTES):
            lines, rest = [*lines, rest], b""
        self._rests[fd] = rest
        if not data:
            self._forget(fd)
        if number == 2:
            self.last_words = (self.last_words + data)[-4096:]
        if lines:
            self._write(number, b"".join(line + b"\n" for line in lines))

    def _forget(self, fd: int) -> None:
        self._loop.forget(fd)
        del self._rests[fd]

    def limit(self, deadline_s: float) -> None:
        """End it by then, if it has not ended: it and what it has started (a ProxyCommand, say)."""
        self._limit_s = deadline_s

    def has_ended(self) -> bool:
        """Whether it is over and has said all; ends it where it is late."""
        now_s = time.monotonic()
        if self.process.poll() is None:
            if now_s >= self._limit_s:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, self._next_signal)
                self._limit_s, self._next_signal, self.is_late = now_s + _GRACE_S, signal.SIGKILL, True
            return False
        self._limit_s = min(self._limit_s, now_s + _DRAIN_S)
        if self._rests and now_s < self._limit_s:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Hear no more of it."""
        for fd in list(self._rests):
            self._forget(fd)


@dataclass(frozen=True)
class HostResult:
    """How the command ended on a host: its exit status, and the reason in words where that is not 0."""

    status: int
    reason: str = ""


def run_on_hosts(
    hosts: Sequence[str],
    words: Sequence[str],
    write: Callable[[str, int, bytes], None],
    ssh: str = "ssh",
    timeout_s: float | None = None,
    at_once: int = 64,
    input_path: str = os.devnull,
) -> dict[str, HostResult]:
    """Run a command on hosts, `at_once` of them at a time, and give every host's result, in the hosts' order.

    `words` are joined by spaces and read by the shell there, as ssh does it. `write` gets a host, 1 or 2, and whole
    lines. `timeout_s` is for one host: then its ssh is ended (the command there may go on). Each command reads the
    file `input_path` on stdin.

    Raises:
        Stopped: by a signal, or by an OSError of `write`; every ssh has been ended before.
    """
    command = [*shlex.split(ssh), *["-n"] * (input_path == os.devnull), "-T", *QUICK_TO_NOTICE]
    waiting, running, results = list(hosts), dict[str, HostProcess](), dict[str, HostResult]()
    stopped_by = 0  # the first signal
    with Loop() as loop:

        def relay(host: str, number: int, lines: bytes) -> None:
            try:
                write(host, number, lines)
            except OSError:  # nobody can be told here
                loop.poke(signal.SIGPIPE)

        while running or (waiting and not stopped_by):
            while waiting and len(running) < at_once and not stopped_by:
                host = waiting.pop(0)
                try:
                    argv = [*command, *ssh_words(host), " ".join(words)]
                    running[host] = HostProcess(argv, loop, functools.partial(relay, host), input_path=input_path)
                except OSError as error:
                    reason = f"{command[0]} cannot be run: {error.strerror}; install openssh-client"
                    results[host] = HostResult(_SSH_FAILED, reason)
                    continue
                running[host].limit(time.monotonic() + (timeout_s or 1e9))
            for number in loop.turn(_POLL_S if running else 0):
                if number in ENDING and not stopped_by:
                    stopped_by = number
                    for each in running.values():
                        each.limit(0.0)
            for host in [host for host, each in running.items() if each.has_ended()]:
                results[host] = _result(running.pop(host), timeout_s)
    if stopped_by:
        raise Stopped(128 + stopped_by)
    return {host: results[host] for host in hosts}


def _result(ended: HostProcess, timeout_s: float | None) -> HostResult:
    status = ended.process.returncode
    if ended.is_late:
        return HostResult(TIMED_OUT, f"took longer than {timeout_s or 0:g} s")
    if status == 0:
        return HostResult(0)
    if status < 0:
        return HostResult(128 - status, f"its ssh was ended by {signal.Signals(-status).name}")
    said = [line.strip() for line in ended.last_words.decode(errors="replace").splitlines() if line.strip()]
    return HostResult(status, f"exit status {status}{f': {said[-1]}' if status == _SSH_FAILED and said else ''}")


def _print(host: str, number: int, lines: bytes) -> None:
    view = memoryview(b"".join(f"{host}: ".encode() + line for line in lines.splitlines(keepends=True)))
    while view:
        view = view[os.write(number, view) :]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        args.command = args.command[1:]
    if not args.command:
        parser.error("there is no command; write it last, such as: dslite_ssh -H hosts -- nvidia-smi -L")
    if not os.access(args.input, os.R_OK):
        parser.error(f"--input {args.input} cannot be read")
    try:
        hosts = list(read_hostfile(args.hostfile, slots_needed=False))
    except LaunchError as error:
        parser.error(str(error))
    try:
        results = run_on_hosts(hosts, args.command, _print, args.ssh, args.timeout, args.at_once, args.input)
    except Stopped as stopped:
        with contextlib.suppress(OSError):
            print("dslite_ssh: stopped; what runs on the hosts may go on there", file=sys.stderr)
        return int(stopped.code or 0)
    failed = {host: result for host, result in results.items() if result.status != 0}
    if failed:
        print(f"dslite_ssh: {len(failed)} of {len(hosts)} hosts failed:", file=sys.stderr)
        for host, result in failed.items():
            print(f"  {host}: {result.reason}", file=sys.stderr)
    return next((result.status for result in failed.values()), 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dslite_ssh",
        description="Run a command on all hosts of a hostfile, at once, by ssh.",
        usage="dslite_ssh [options] [--] COMMAND [ARGUMENT ...]",
        epilog="Exit status: that of the first host, in the hostfile's order, whose command failed; 255 where ssh did, "
        "124 for a time-out, 2 for a wrong command line; 0 where all is well.",
    )
    parser.add_argument(
        *("-H", "-f", "--hostfile"), metavar="FILE", default=DEFAULT_HOSTFILE, help=f"the hosts ({DEFAULT_HOSTFILE})"
    )
    parser.add_argument("-t", "--timeout", metavar="S", type=_positive, help="for each host, in seconds (none)")
    parser.add_argument("--at_once", metavar="N", type=_count, default=64, help="how many hosts at a time (64)")
    parser.add_argument("--ssh", metavar="COMMAND", default="ssh", help="such as 'ssh -p 2222'")
    parser.add_argument("--input", metavar="FILE", default=os.devnull, help="that each command reads (nothing)")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="as for ssh: joined by spaces, and read by the shell of each host"
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} hosts at a time would be none; write at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time; write seconds, such as 30")
    return value


if __name__ == "__main__":
    sys.exit(main())
