"""What runs on each node of a training on several machines: `python -m deepspeedlite.launcher.node`.

It meets the launcher over a `Link` (ssh's pipes, or TCP), says what machine this is, gets its job, and runs it as an
`Agent` whose screen is the link. The launcher's silence ends it and its ranks.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from deepspeedlite.env_report.preflight import facts
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.agent import Agent, Outcome
from deepspeedlite.launcher.job import Assignment, Job, Workload, build_job, choose_port
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.output import Screen, Shown
from deepspeedlite.launcher.signals import ENDING, SignalQueue
from deepspeedlite.runtime.errors import LaunchError

KEY = "DSL_LAUNCHER_KEY"
_CONNECT_S = 3.0
# Set by what started this agent. Ranks would take them for a word on their own place.
_SCHEDULER = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "HYDRA", "HYDI_", "MPI_LOCAL", "MV2_COMM", "MPIR_", "MPIEXEC_")
_SLURM_TASK = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP",
    "SLURM_TASK_PID",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
)


class RemoteScreen(Screen):
    """A screen at the other end of a link: full while too much of what was sent has not been shown there."""

    def __init__(self, link: protocol.Link, sizes: Mapping[str, str], has_colour: bool) -> None:
        super().__init__()
        self.has_colour = has_colour
        self._link, self._sizes = link, {int(fd): bytes.fromhex(size) for fd, size in sizes.items()}

    def is_terminal(self, fd: int) -> bool:
        """Whether the launcher's stream is one."""
        return fd in self._sizes

    def window_size(self, fd: int) -> bytes:
        """The launcher's terminal's, at the start."""
        return self._sizes.get(fd, b"")

    def start(self) -> None:
        """No thread: a link never blocks."""

    def show(self, fd: int, data: bytes, how: str = "lines", shown: Shown | None = None) -> None:
        """Send it in one frame: what is cut between frames could be shown with another node's lines between."""
        self._queued_bytes += len(data)
        self._link.send(protocol.OUTPUT, raw=bytes([fd, how == "live"]) + data)

    def acknowledge(self, nbytes: int | None) -> None:
        """So much has been shown; None: nobody is there any more, and nothing is waited for."""
        self._shown_bytes = self._queued_bytes if nbytes is None else self._shown_bytes + nbytes


class AgentSession:
    """This machine's side of the talk with the launcher.

    Args:
        index: which node this is, and `is_told`, whether the launcher said so (or only a scheduler's numbering).
        own: what to run and show here, instead of what the launcher tells: without ssh every node was given it.
    """

    def __init__(
        self, link: protocol.Link, key: str, index: int | None, own: Workload | None = None, is_told: bool = True
    ) -> None:
        self._link, self._key, self._index, self._own, self._is_told = link, key, index, own, is_told
        self._listener: socket.socket | None = None  # holds the ranks' port until they start
        self._is_paused = False  # the launcher is stopped too, and its silence means nothing

    def run(self) -> int:
        """Meet the launcher, do what it asks, and give the exit status of the whole job."""
        link = self._link
        _, challenge = link.expect(protocol.CHALLENGE, within_s=protocol.SILENCE_S)
        if challenge is None:
            return _complain("the launcher did not answer")
        nonce = protocol.new_secret()
        hello = {**facts(), "index": self._index, "is_told": self._is_told, "nonce": nonce}
        link.send(protocol.HELLO, {**hello, "proof": protocol.proof(self._key, challenge["nonce"], "node")})
        _, welcome = link.expect(protocol.WELCOME, within_s=protocol.SILENCE_S)
        if welcome is None or welcome["proof"] != protocol.proof(self._key, nonce, "launcher"):
            return _complain("the launcher refused this node, or is not the one that started it")
        while True:
            kind, value = link.expect(protocol.ASK, protocol.JOB, protocol.END)
            if kind == protocol.ASK:
                link.send(protocol.TELL, self._answer(value))
            elif kind == protocol.JOB:
                self._run_job(value)
            elif isinstance(value, int) or not kind:
                return value if isinstance(value, int) else 1

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`port`: find one on this machine and listen there. `reach`: which of these addresses answer."""
        if "port" in asked:
            try:
                port, note = choose_port(asked["port"])
                self._listener = socket.create_server(("", port), reuse_port=False)
            except (LaunchError, OSError) as error:
                return {"fault": str(error)}
            return {"port": port, "note": note}

        def reached(address: str) -> bool:
            try:
                socket.create_connection((address, asked["reach"]), timeout=_CONNECT_S).close()
            except OSError:
                return False
            return True

        with ThreadPoolExecutor(len(asked["addresses"])) as pool:
            return {"reached": [a for a, ok in zip(asked["addresses"], pool.map(reached, asked["addresses"])) if ok]}

    def _run_job(self, told: Mapping[str, Any]) -> None:
        if self._listener is not None:
            self._listener.close()
        signals = SignalQueue()
        remote = RemoteScreen(self._link, told["terminals"], told["colour"]) if self._own is None else None
        screen = remote or Screen(signals=signals)
        workload, assignment = self._own or Workload(**told["workload"]), Assignment(**told["assignment"])
        try:
            if workload.cwd:
                os.chdir(workload.cwd)
            job = build_job(workload, assignment, environment(os.environ), keyboard=False)
            with signals:
                outcome = self._serve(job, screen, Loop(signals))
        except (LaunchError, OSError) as error:
            self._link.send(protocol.ERROR, str(error))
            return
        self._link.send(protocol.DONE, asdict(outcome))

    def _serve(self, job: Job, screen: Screen, loop: Loop) -> Outcome:
        """Turn the agent until all has ended, and hand it what the launcher and signals ask for."""
        link, agent, has_told = self._link, Agent(job, screen, loop), False
        loop.watch(link.read_fd, functools.partial(self._obey, agent, screen, loop))
        for timeout_s in agent.run():
            wait_s = protocol.BEAT_S if timeout_s is None else min(timeout_s, protocol.BEAT_S)
            for number in loop.turn(wait_s, [link] if link.pending else []):
                self._signal(agent, number)
            if not link.closed and not self._is_paused and time.monotonic() - link.heard_s > protocol.SILENCE_S:
                self._lose(agent, screen, loop)
            if agent.outcome.failures and not has_told:  # ending takes seconds; the launcher should know now
                has_told = True
                link.send(protocol.FAILED, [asdict(failure) for failure in agent.outcome.failures])
        late_s = time.monotonic() + (1.0 if agent.outcome.interrupted_by is not None else 1e9)
        while self._own is not None and screen.is_behind and time.monotonic() < late_s:
            if set(loop.turn(0.05)) & set(ENDING):  # beats are answered while a pager is stopped
                break
        loop.forget(link.read_fd)
        screen.stop(0.1)
        return agent.outcome

    def _signal(self, agent: Agent, number: int) -> None:
        if number in (signal.SIGTSTP, signal.SIGCONT):
            self._is_paused = number == signal.SIGTSTP
        agent.signal(number)

    def _obey(self, agent: Agent, screen: Screen, loop: Loop) -> None:
        """Do what the launcher has sent."""
        link = self._link
        for kind, value in link.receive():
            if kind == protocol.BEAT:
                link.send(protocol.BEAT, [time.monotonic(), value])
            elif kind == protocol.SIGNAL:
                self._signal(agent, int(value))
            elif kind == protocol.END:
                agent.end()
            elif kind == protocol.ACK:
                screen.acknowledge(value)
        if link.closed:
            self._lose(agent, screen, loop)

    def _lose(self, agent: Agent, screen: Screen, loop: Loop) -> None:
        self._link.closed = True
        loop.forget(self._link.read_fd)
        screen.acknowledge(None)
        agent.lose_launcher()


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks inherit: all but the launcher's key and what says where this agent stands among agents."""
    tasks = (*_SCHEDULER, *_SLURM_TASK, KEY)
    return {name: value for name, value in environ.items() if not name.startswith(tasks)}


def connect(addresses: Sequence[str], port: int, patience_s: float) -> socket.socket:
    """Reach the launcher at the first address that answers.

    Raises:
        LaunchError: none does within `patience_s`.
    """
    came_from = os.environ.get("SSH_CONNECTION", "").split()[:1]
    tried = list(dict.fromkeys([*came_from, *addresses]))
    deadline_s = time.monotonic() + patience_s
    while True:
        for address in tried:
            try:
                found = socket.create_connection((address, port), timeout=_CONNECT_S)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return found
            except OSError as error:
                reason = error
        if time.monotonic() > deadline_s:
            raise LaunchError(f"the launcher cannot be reached at {', '.join(tried)}, port {port}: {reason}")
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent."""
    parser = argparse.ArgumentParser(prog="python -m deepspeedlite.launcher.node", description=__doc__)
    parser.add_argument("--index", type=int, help="which of the launcher's nodes this is")
    parser.add_argument(
        "--connect", metavar="ADDRESS[,ADDRESS...]:PORT", help="where the launcher is; else stdin, stdout"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the launcher, which tells us
    if args.connect is None:
        link = protocol.Link(os.dup(0), os.dup(1))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what anything here prints is no frame
    else:
        addresses, _, port = args.connect.rpartition(":")
        try:
            found = connect(addresses.split(","), int(port), protocol.SILENCE_S)
        except LaunchError as error:
            return _complain(str(error))
        link = protocol.Link(found.detach(), -1)
    index = args.index
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        index = int(os.environ[name]) if index is None and name in os.environ else index
    AgentSession(link, os.environ.get(KEY, ""), index, is_told=args.index is not None).run()
    return 0  # whose status the job's is, the launcher says; pdsh and mpirun would only add words of their own


def _complain(text: str) -> int:
    print(f"deepspeedlite: {socket.gethostname()}: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
