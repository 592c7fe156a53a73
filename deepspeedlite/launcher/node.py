"""What runs on each node of a training on several machines: `python -m deepspeedlite.launcher.node`.

It meets the launcher over a `Link` (ssh's pipes, or TCP), says what machine this is, gets its job, and runs it as an
`Agent` whose screen is the link. The launcher's silence ends it and its ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deepspeedlite.env_report.preflight import facts
from deepspeedlite.host.network import listen, names
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.agent import FAILURE_GRACE_S, SIGNAL_GRACE_S, Agent
from deepspeedlite.launcher.job import Assignment, Port, build_job, check_script, choose_port
from deepspeedlite.launcher.loop import ENDING, Loop
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.output import WINDOW_BYTES, Screen
from deepspeedlite.launcher.plan import ranks_environ
from deepspeedlite.launcher.protocol import KEY
from deepspeedlite.runtime.errors import LaunchError

_CONNECT_S = 3.0
# Set by what started this agent. Ranks would take them for a word on their own place.
_SCHEDULER = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "HYDRA", "HYDI_", "MPI_LOCAL", "MV2_COMM", "MPIR_", "MPIEXEC_")
_SLURM = "PROCID LOCALID NODEID STEP TASK_PID NTASKS NPROCS"


class RemoteSurface:
    """The launcher's screen at the other end of a link: full while too much of what was sent was not shown there."""

    def __init__(self, link: protocol.Link, terminals: Mapping[str, str], has_colour: bool) -> None:
        self.has_colour = has_colour
        self.terminals = {int(stream): bytes.fromhex(size) for stream, size in terminals.items()}
        self._link, self._sent_bytes, self._shown_bytes = link, 0, 0

    @property
    def is_full(self) -> bool:
        """Whether too much waits to be shown, and somebody is there who could show it."""
        return self._sent_bytes - self._shown_bytes > WINDOW_BYTES and not self._link.closed

    def show(self, stream: int, data: bytes, is_live: bool) -> None:
        """Send it in one frame: what is cut between frames could be shown with another node's lines between."""
        self._sent_bytes += len(data)
        self._link.send(protocol.OUTPUT, raw=bytes([stream, is_live]) + data)

    def acknowledge(self, nbytes: int) -> None:
        """So much has been shown."""
        self._shown_bytes += nbytes


class AgentSession:
    """This machine's side of the talk with the launcher.

    Args:
        fds: the link's.
        index: which node this is, and `is_told`, whether the launcher said so (or only a scheduler's numbering).
        own: what to run, and show here, instead of what the launcher tells: without ssh every node was given it.
    """

    def __init__(
        self,
        loop: Loop,
        fds: Sequence[int],
        index: int | None,
        own: LaunchOptions | None = None,
        is_told: bool = True,
    ) -> None:
        self._loop, self._index, self._is_told = loop, index, is_told
        self._options, self._own_screen = own, Screen(loop) if own is not None else None
        self._environ: Mapping[str, str] = {}  # of the ranks
        self._key, self._nonce = os.environ.get(KEY, ""), protocol.new_secret()
        self._is_known = False  # the launcher has shown that it is ours
        self._port: Port | None = None  # of the ranks, where they meet on this node: this process keeps it
        self._listener: socket.socket | None = None  # at that port until they start
        self._surface: RemoteSurface | None = None
        self._agent: Agent | None = None
        self._is_paused = False  # the launcher is stopped too, and its silence means nothing
        self._status: int | None = None  # of all; None: it goes on
        self._link = protocol.Link(loop, self._hear, *fds)

    def run(self) -> int:
        """Meet the launcher, do what it asks, and give the exit status of the whole job."""
        wait_s: float | None = None
        while self._status is None:
            for number in self._loop.turn(protocol.BEAT_S if wait_s is None else min(wait_s, protocol.BEAT_S)):
                self._obey_signal(number)
            is_silent = time.monotonic() - self._link.heard_s > protocol.SILENCE_S and not self._is_paused
            if is_silent or self._link.closed:
                self._lose_launcher()
            try:
                wait_s = self._agent.turn() if self._agent is not None else None
            except LaunchError as error:
                self._agent = None
                self._link.send(protocol.ERROR, str(error))
            if self._link.closed and (self._agent is None or self._agent.is_done):
                break
        if self._agent is not None:
            self._agent.close(1)  # the launcher may not have waited for its end
        if self._own_screen is not None:
            self._own_screen.finish(1e9 if self._status == 0 else 1.0)
        return 1 if self._status is None else self._status

    def _lose_launcher(self) -> None:
        if not self._is_known:
            _complain("the launcher did not answer")
        self._link.closed = True
        if self._agent is not None:  # sooner than otherwise: nobody waits for what ranks save
            self._agent.end(signal.SIGHUP, FAILURE_GRACE_S)

    def _obey_signal(self, number: int) -> None:
        """One that this process got itself, by a scheduler or, without ssh, a person."""
        if self._agent is None:
            self._status = 128 + number if number in ENDING else None
        elif number in ENDING:
            self._agent.end(signal.SIGTERM if number == signal.SIGPIPE else number, SIGNAL_GRACE_S)
            self._link.send(protocol.SIGNAL, int(number))
        else:
            self._agent.signal(number)

    # What the launcher says

    def _hear(self, link: protocol.Link) -> None:
        for kind, value in link.receive():
            if self._status is None:
                self._obey(link, kind, value)

    def _obey(self, link: protocol.Link, kind: bytes, value: Any) -> None:
        if kind == protocol.BEAT:
            link.send(protocol.BEAT, [time.monotonic(), value])
        elif kind == protocol.CHALLENGE:
            hello = {"names": names(), "index": self._index, "is_told": self._is_told, "nonce": self._nonce}
            link.send(protocol.HELLO, {**hello, "proof": protocol.proof(self._key, value, "node")})
        elif kind == protocol.WELCOME:
            self._is_known = value == protocol.proof(self._key, self._nonce, "launcher")
        if kind in (protocol.BEAT, protocol.CHALLENGE):
            return
        if not self._is_known:
            self._status = _complain("the launcher refused this node, or is not the one that started it")
        elif kind == protocol.ASK:
            link.send(protocol.TELL, self._answer(value))
            link.heard_s = time.monotonic()  # while a --venv_script was sourced nobody listened
        elif kind == protocol.JOB:
            self._start(value)
        elif kind == protocol.SIGNAL and self._agent is not None:
            if value in (signal.SIGTSTP, signal.SIGCONT):
                self._is_paused = value == signal.SIGTSTP
            self._agent.signal(value)
        elif kind == protocol.END and self._agent is not None:
            self._agent.end(*value)
        elif kind == protocol.ACK and self._surface is not None:
            self._surface.acknowledge(value)
        elif kind == protocol.CLOSE:
            self._status = value

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`options`: what is this machine, for them? `port`: find one here and listen there.

        `reach`: which of these addresses answer, from which address, and why not.
        """
        if "options" in asked:
            return self._look_at_own(self._options or LaunchOptions(**asked["options"]))
        if "port" in asked:
            if self._port is not None:  # of an attempt before
                self._port.close()
            try:
                self._port = choose_port(asked["port"])
                self._listener = listen(self._port.number)
            except (LaunchError, OSError) as error:
                return {"fault": str(error)}
            return {"port": self._port.number, "note": self._port.note}

        reached, failed = {}, {}

        def reach(address: str) -> None:
            try:
                with socket.create_connection((address, asked["reach"]), timeout=_CONNECT_S) as found:
                    reached[address] = found.getpeername()[0]
            except OSError as error:
                failed[address] = error.strerror or str(error)

        with ThreadPoolExecutor(len(asked["addresses"])) as pool:
            list(pool.map(reach, asked["addresses"]))
        return {"reached": reached, "failed": failed}

    def _look_at_own(self, options: LaunchOptions) -> dict[str, Any]:
        self._options, fault = options, ""
        self._environ = environment(os.environ)
        try:
            if options.cwd:
                os.chdir(options.cwd)
            self._environ = ranks_environ(options, self._environ)
            if options.script:
                check_script(options, self._environ)
        except (LaunchError, OSError) as error:
            fault = str(error)
        said = facts(self._environ)
        return {**said, "fault": fault or said["fault"]}

    def _start(self, told: Mapping[str, Any]) -> None:
        if self._listener is not None:
            self._listener.close()
        assert self._options is not None, "the launcher asks what this machine is before it gives a job"
        self._surface = RemoteSurface(self._link, told["terminals"], told["colour"])
        try:
            # Of the key, which does not travel where others might listen: where there is none, all goes through ssh.
            secret = protocol.proof(self._key, told["salt"], "job")
            job = build_job(
                self._options, Assignment(**told["assignment"], secret=secret), self._environ, keyboard=False
            )
        except (LaunchError, OSError) as error:
            self._link.send(protocol.ERROR, str(error))
            return
        self._agent = Agent(job, self._own_screen or self._surface, self._loop, self._link.send)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks inherit: all but the launcher's key and what says where this agent stands among agents."""
    tasks = (KEY, *_SCHEDULER, *(f"SLURM_{name}" for name in _SLURM.split()))
    return {name: value for name, value in environ.items() if not name.startswith(tasks)}


def connect(addresses: Sequence[str], port: int, patience_s: float) -> socket.socket:
    """Reach the launcher at the first address that answers.

    Raises:
        LaunchError: none does within `patience_s`.
    """
    came_from = os.environ.get("SSH_CONNECTION", "").split()[:1]
    tried = list(dict.fromkeys([*came_from, *addresses]))
    deadline_s = time.monotonic() + patience_s
    reasons: dict[str, str] = {}
    while True:
        for address in tried:
            try:
                found = socket.create_connection((address, port), timeout=_CONNECT_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return found
            except OSError as error:
                reasons[address] = error.strerror or str(error)
        if time.monotonic() > deadline_s:
            each = ", ".join(f"{address} ({reason})" for address, reason in reasons.items())
            raise LaunchError(f"the launcher cannot be reached at port {port} of {each}")
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent."""
    parser = argparse.ArgumentParser(prog="python -m deepspeedlite.launcher.node", description=__doc__)
    parser.add_argument("--index", type=int, help="which of the launcher's nodes this is")
    parser.add_argument(
        "--connect", metavar="ADDRESS[,ADDRESS...]:PORT", help="where the launcher is; else stdin, stdout"
    )
    parser.add_argument("--keyed", action="store_true", help=f"the first line of stdin is {KEY}")
    args = parser.parse_args(argv)
    if args.keyed:
        os.environ[KEY] = sys.stdin.readline().strip()
    if args.connect is None:
        fds = [os.dup(0), os.dup(1)]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what anything here prints is no frame
    else:
        addresses, _, port = args.connect.rpartition(":")
        try:
            fds = [connect(addresses.split(","), int(port), protocol.SILENCE_S).detach()]
        except LaunchError as error:
            return _complain(str(error))
    index = args.index
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        index = int(os.environ[name]) if index is None and name in os.environ else index
    with Loop() as loop:
        AgentSession(loop, fds, index, is_told=args.index is not None).run()
    return 0  # whose status the job's is, the launcher says; pdsh and mpirun would only add words of their own


def _complain(text: str) -> int:
    print(f"deepspeedlite: {socket.gethostname()}: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
