"""`dslite_ssh`: one command on all hosts of a hostfile, at once, by ssh.

Every line comes out whole, with its host in front, as it would from pdsh. A host that is dead or hangs costs its own
time-out and no other host's. No torch.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from deepspeedlite.launcher.hostfile import DEFAULT_HOSTFILE, read_hostfile
from deepspeedlite.runtime.errors import LaunchError

TIMED_OUT = 124  # as coreutils' timeout has it
ASK_NOTHING = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
# Notices within 15 s that a host is gone, before the connection or in the middle of it.
QUICK_TO_NOTICE = (*ASK_NOTHING, "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SSH_FAILED = 255
_LINE_LIMIT_BYTES = 1 << 20  # a longer line is broken rather than held in memory
_DRAIN_S = 0.5  # for output that is still in the pipes when ssh has ended; a process left behind may hold them open
_GRACE_S = 1.0  # between SIGTERM and SIGKILL

Write = Callable[[int, bytes], None]  # a file descriptor, and whole lines for it


@dataclass(frozen=True)
class Outcome:
    """How the command ended on a host: its exit status, and the reason in words where that is not 0."""

    status: int
    reason: str = ""


async def run_on_hosts(
    hosts: Sequence[str],
    words: Sequence[str],
    ssh: str = "ssh",
    timeout_s: float | None = None,
    at_once: int = 64,
    write: Write | None = None,
) -> dict[str, Outcome]:
    """Run a command on hosts, `at_once` of them at a time, and give every host's outcome, in the hosts' order.

    `words` are joined by spaces and read by the shell there, as ssh does it. `timeout_s` is for one host: then its ssh
    is ended (the command there may go on). What this raises or is cancelled by ends every ssh first.
    """
    write = write or _write
    gate = asyncio.Semaphore(at_once)
    command = [*shlex.split(ssh), "-n", "-T", *QUICK_TO_NOTICE, "--"]

    async def on(host: str) -> Outcome:
        async with gate:
            return await _run_on(host, [*command, host, " ".join(words)], timeout_s, write)

    tasks = [asyncio.ensure_future(on(host)) for host in hosts]
    try:
        # Not `gather`: cancelled, it cancels them, and the second time, below, would end their cleaning up.
        for task in (await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))[0]:
            task.result()  # raises what it raised
        return {host: task.result() for host, task in zip(hosts, tasks)}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_on(host: str, command: Sequence[str], timeout_s: float | None, write: Write) -> Outcome:
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        return Outcome(_SSH_FAILED, f"{command[0]} cannot be run: {error.strerror}; install openssh-client")
    assert process.stdout is not None and process.stderr is not None
    relays = [
        asyncio.ensure_future(_relay(stream, host, partial(write, fd)))
        for stream, fd in ((process.stdout, 1), (process.stderr, 2))
    ]
    try:
        status = await asyncio.wait_for(process.wait(), timeout_s)
        await asyncio.wait(relays, timeout=_DRAIN_S)
    except asyncio.TimeoutError:
        return Outcome(TIMED_OUT, f"took longer than {timeout_s:g} s")
    finally:
        await _end(process)
        for relay in relays:
            relay.cancel()
        ended = await asyncio.gather(*relays, return_exceptions=True)
    if status == 0:
        return Outcome(0)
    if status < 0:
        return Outcome(128 - status, f"its ssh was ended by {signal.Signals(-status).name}")
    last = ended[1] if isinstance(ended[1], bytes) else b""
    words = f": {last.decode(errors='replace')}" if status == _SSH_FAILED and last else ""
    return Outcome(status, f"exit status {status}{words}")


async def _relay(stream: asyncio.StreamReader, host: str, write: Callable[[bytes], None]) -> bytes:
    """Carry a stream's lines until its end; gives the last one that is not blank."""
    prefix, rest, last = f"{host}: ".encode(), b"", b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LINE_LIMIT_BYTES:
            lines, rest = [*lines, rest], b""
        if lines:
            write(b"".join(prefix + line + b"\n" for line in lines))
            last = next((line.strip() for line in reversed(lines) if line.strip()), last)
    if rest:
        write(prefix + rest + b"\n")
    return rest.strip() or last


async def _end(process: asyncio.subprocess.Process) -> None:
    """End ssh and what it has started (a ProxyCommand, say), if it has not ended by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_S)


def _write(fd: int, lines: bytes) -> None:
    view = memoryview(lines)
    while view:
        view = view[os.write(fd, view) :]


async def _until_stopped(args: argparse.Namespace, hosts: Sequence[str]) -> dict[str, Outcome] | int:
    """`run_on_hosts`, or the exit status where a signal or a reader that has left ended it."""
    running = asyncio.current_task()
    assert running is not None
    statuses: list[int] = []

    def stop(status: int) -> None:
        statuses.append(status)
        if len(statuses) == 1:  # the second would end the cleaning up
            running.cancel()

    def write(fd: int, lines: bytes) -> None:
        try:
            _write(fd, lines)
        except OSError:  # nobody can be told here
            stop(128 + signal.SIGPIPE)
            raise

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, 128 + number)
    try:
        return await run_on_hosts(hosts, args.command, args.ssh, args.timeout, args.at_once, write)
    except asyncio.CancelledError:
        if not statuses:
            raise
        return statuses[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        args.command = args.command[1:]
    if not args.command:
        parser.error("there is no command; write it last, such as: dslite_ssh -H hosts -- nvidia-smi -L")
    try:
        hosts = list(read_hostfile(args.hostfile, slots_needed=False))
    except LaunchError as error:
        parser.error(str(error))
    outcomes = asyncio.run(_until_stopped(args, hosts))
    if isinstance(outcomes, int):
        with suppress(OSError):
            print("dslite_ssh: stopped; what runs on the hosts may go on there", file=sys.stderr)
        return outcomes
    failed = {host: outcome for host, outcome in outcomes.items() if outcome.status != 0}
    if failed:
        print(f"dslite_ssh: {len(failed)} of {len(hosts)} hosts failed:", file=sys.stderr)
        for host, outcome in failed.items():
            print(f"  {host}: {outcome.reason}", file=sys.stderr)
    return next((outcome.status for outcome in failed.values()), 0)


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
