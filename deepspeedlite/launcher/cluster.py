"""The launcher's side of a training on several machines: starts an agent per node, keeps them together, ends them.

    gather    start the agents, hear what every node is
    meet      find a port on the first node and an address at which all reach it
    run       hand out the jobs; show output; on the first failure, signal or silence end all
    close     tell everyone the exit status, and kill what does not go

One thread turns in `_turn` and never blocks; another writes to the screen, so that a stopped pager stops neither beats
nor the end of a failed run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepspeedlite.env_report.preflight import Found
from deepspeedlite.launcher import process_tree, protocol
from deepspeedlite.launcher.agent import FAILURE_GRACE_S, SIGNAL_GRACE_S, Outcome
from deepspeedlite.launcher.backends import Launch
from deepspeedlite.launcher.early import EarlyEnds
from deepspeedlite.launcher.job import Assignment, Workload
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.report import Failure
from deepspeedlite.launcher.signals import ENDING, PASSED_ON, SignalQueue
from deepspeedlite.runtime.errors import LaunchError

_POLL_S = 0.05
_KILL_S = 3.0  # beyond a grace: how long an agent may take to end its ranks by SIGKILL and say so
_SETTLE_S = 1.0  # how long to wait for a failure that explains those of lost connections


@dataclass
class Node:
    """One machine, as the launcher sees it."""

    found: Found
    link: protocol.Link | None = None
    told: dict[str, Any] | None = None  # the answer to the last question
    outcome: dict[str, Any] | None = None
    failures: list[Failure] = field(default_factory=list)
    first_rank: int = 0
    offset_s: float = 0.0  # its monotonic clock, less ours
    round_trip_s: float = 1e9
    lost: str = ""

    @property
    def is_working(self) -> bool:
        """Whether more is to come from it."""
        return self.outcome is None and not self.lost

    def hear_beat(self, theirs_s: float, sent_s: float) -> None:
        """The answer to a beat dates the other clock; the quickest answer does it best."""
        now_s = time.monotonic()
        if now_s - sent_s < self.round_trip_s:
            self.round_trip_s, self.offset_s = now_s - sent_s, theirs_s - (now_s + sent_s) / 2

    def hear_failures(self, failures: Sequence[dict[str, Any]]) -> None:
        """Failed ranks, with their times on our clock."""
        self.failures = []
        for fields in failures:
            failure = Failure(**fields)
            seen_s = None if failure.traceback_s is None else failure.traceback_s - self.offset_s
            own = {**fields, "exited_s": failure.exited_s - self.offset_s, "traceback_s": seen_s}
            self.failures.append(Failure(**own))


class _Printer(threading.Thread):
    """Shows what nodes wrote, and tells them so."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(name="node output", daemon=True)
        self._screen = screen
        self.queue: queue.SimpleQueue[tuple[protocol.Link | None, bytes] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Until None comes."""
        while (item := self.queue.get()) is not None:
            link, body = item
            fd = self._screen.out_fd if body[0] == 1 else self._screen.err_fd
            (self._screen.live if body[1] else self._screen.lines)(fd, body[2:])
            if link is not None:
                link.send(protocol.ACK, len(body) - 2)


class _Starter:
    """A local process that starts agents, and what it says on stderr."""

    def __init__(self, launch: Launch) -> None:
        pipe = subprocess.PIPE if launch.node is not None else subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                launch.argv,
                env={**os.environ, **launch.env},
                stdin=pipe,
                stdout=pipe if launch.node is not None else subprocess.PIPE,
                stderr=subprocess.PIPE if launch.node is not None else subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=process_tree.die_with(os.getpid()),  # safe: no other thread runs yet
            )
        except OSError as error:
            raise LaunchError(f"cannot start {launch.argv[0]}: {error.strerror}") from error
        self.node = launch.node
        said = self.process.stderr if launch.node is not None else self.process.stdout
        assert said is not None
        self.said = said.fileno()
        os.set_blocking(self.said, False)
        self.is_open = True
        self.last_words = b""

    def read(self) -> bytes:
        """Whole lines that have come."""
        try:
            data = os.read(self.said, 1 << 16)
        except BlockingIOError:
            return b""
        self.is_open = bool(data)
        self.last_words = (self.last_words + data)[-4096:]
        return data if not data or data.endswith(b"\n") else data + b"\n"

    def link(self) -> protocol.Link:
        """Over the process's own pipes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        return protocol.Link(os.dup(self.process.stdout.fileno()), os.dup(self.process.stdin.fileno()))


class Cluster:
    """One run of one training. Use once.

    Args:
        hosts: each node's name and slots (None: as many as it has devices).
        key: what agents that connect must know; "" with ssh, whose pipes are theirs alone.
        listener: where they connect; None with ssh.
    """

    def __init__(
        self, hosts: Sequence[Found], key: str, listener: socket.socket | None, screen: Screen, signals: SignalQueue
    ) -> None:
        self.nodes = [Node(found) for found in hosts]
        self._key, self._listener, self._screen, self._signals = key, listener, screen, signals
        self._starters: list[_Starter] = []
        self._strangers: dict[protocol.Link, str] = {}  # connected, and not yet known -> the nonce they were given
        self._printer = _Printer(screen)
        self._beat_s = 0.0
        self.started_s = time.monotonic()
        self.interrupted_by: int | None = None
        screen.on_broken = lambda: signals.poke(signal.SIGPIPE)

    # --- turning --------------------------------------------------------------------------------------------------

    def _turn(self, timeout_s: float = protocol.BEAT_S) -> bool:
        """Wait for something and handle it. True if someone asked for the end (again)."""
        links = [*self._strangers, *(n.link for n in self.nodes if n.link is not None and not n.link.closed)]
        poll = select.poll()
        for link in links:
            poll.register(link.read_fd, select.POLLIN)
        for starter in self._starters:
            if starter.is_open:
                poll.register(starter.said, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        pending = any(link.pending for link in links)
        ready = {fd for fd, _ in poll.poll(1000 * min(timeout_s, _POLL_S if pending else protocol.BEAT_S))}
        if self._listener is not None and self._listener.fileno() in ready:
            self._welcome_stranger(protocol.Link(self._listener.accept()[0].detach()))
        for starter in self._starters:
            if starter.said in ready and (data := starter.read()):
                tag = f"[{self.nodes[starter.node].found.host}] " if starter.node is not None else ""
                lines = (tag.encode() + line for line in data.splitlines(True))
                self._printer.queue.put((None, b"\2\0" + b"".join(lines)))
        for link in list(self._strangers):
            for kind, value in link.receive():
                if kind == protocol.HELLO:
                    self._recognise(link, value)
                    break
            if link.closed:
                self._strangers.pop(link, None)
        for node in self.nodes:
            self._hear(node)
        self._beat()
        return self._obey(self._signals.take())

    def _hear(self, node: Node) -> None:
        link = node.link
        if link is None or node.lost:
            return
        for kind, value in link.receive():
            if kind == protocol.OUTPUT:
                self._printer.queue.put((link, value))
            elif kind == protocol.BEAT:
                node.hear_beat(*value)
            elif kind == protocol.TELL:
                node.told = value
            elif kind == protocol.ERROR:
                node.found.error = str(value)
            elif kind == protocol.FAILED:
                node.hear_failures(value)
            elif kind == protocol.DONE:
                node.outcome = value
                node.hear_failures(value["failures"])
        link.flush()
        if node.outcome is None:
            silent_s = time.monotonic() - link.heard_s
            if link.closed:
                node.lost = "it was lost (its connection closed)"
            elif silent_s > protocol.SILENCE_S:
                node.lost = f"it was lost (no word from it for {silent_s:.1f} s)"
                link.closed = True

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_s >= protocol.BEAT_S:
            self._beat_s = now_s
            self._tell(protocol.BEAT, now_s)

    def _tell(self, kind: bytes, value: Any = None) -> None:
        for node in self.nodes:
            if node.link is not None and not node.link.closed:
                node.link.send(kind, value)

    def _obey(self, numbers: bytes) -> bool:
        asked = False
        for number in numbers:
            if number in ENDING:
                asked = True
                self.interrupted_by = number if self.interrupted_by is None else self.interrupted_by
                self._tell(protocol.SIGNAL, int(signal.SIGTERM if number == signal.SIGPIPE else number))
            elif number in PASSED_ON:
                self._tell(protocol.SIGNAL, number)
            elif number == signal.SIGTSTP:
                self._tell(protocol.SIGNAL, number)
                os.kill(os.getpid(), signal.SIGSTOP)
                for node in self.nodes:
                    if node.link is not None:
                        node.link.heard_s = time.monotonic()
                self._tell(protocol.SIGNAL, int(signal.SIGCONT))
        return asked

    def _until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Turn until `done`; False if time ran out or someone asked for the end."""
        deadline_s = time.monotonic() + limit_s
        while not done():
            if self._turn(_POLL_S) or time.monotonic() > deadline_s:
                return done()
        return True

    # --- meeting --------------------------------------------------------------------------------------------------

    def gather(self, launches: Sequence[Launch], limit_s: float) -> None:
        """Start the agents and return when each has said what it is, or why not (`found.error`) is known."""
        self._starters = [_Starter(launch) for launch in launches]
        self._printer.start()
        for starter in self._starters:
            if starter.node is not None:
                self._welcome_stranger(starter.link())
        self._until(lambda: all(n.found.facts or self._has_failed(n) for n in self.nodes), limit_s)
        for node in self.nodes:
            if not node.found.facts and not node.found.error:
                node.found.error = f"no answer in {limit_s:.0f} s"

    def _has_failed(self, node: Node) -> bool:
        """Whether the process that should have started this node's agent has gone, or says that it could not."""
        index, host = self.nodes.index(node), node.found.host
        own = next((s for s in self._starters if s.node in (None, index)), None)
        if own is None:
            return False
        words = own.last_words.decode(errors="replace").strip().splitlines()
        is_given_up = any(f": {host}: ssh exited" in line for line in words)  # pdsh, which goes on with the others
        if not is_given_up and (own.process.poll() is None or own.is_open):
            return False
        about = [line for line in words if line.startswith(f"{host}: ")] or words
        node.found.error = about[-1] if about else f"its starter ended with {own.process.returncode}"
        return True

    def _welcome_stranger(self, link: protocol.Link) -> None:
        nonce = protocol.new_secret()
        self._strangers[link] = nonce
        link.send(protocol.CHALLENGE, {"nonce": nonce})

    def _recognise(self, link: protocol.Link, hello: Any) -> None:
        """Who knows the key is the node that its starter named; under MPI and Slurm, the one with its host's name."""
        nonce = self._strangers.pop(link)
        if not isinstance(hello, dict) or hello.get("proof") != protocol.proof(self._key, nonce, "node"):
            link.close()
            return
        index = hello["index"]
        by_name = [node for node in self.nodes if node.found.host in hello["names"] and not hello["is_told"]]
        by_index = [self.nodes[index]] if index is not None and index < len(self.nodes) else []
        node = next((node for node in (*by_name, *by_index) if node.link is None), None)
        if node is None:
            link.close()
            return
        link.send(protocol.WELCOME, {"proof": protocol.proof(self._key, hello["nonce"], "launcher")})
        link.send(protocol.BEAT, time.monotonic())
        node.link, node.found.facts = link, hello
        node.found.skew_s = hello["time"] - time.time()
        if node.found.slots is None:
            node.found.slots = range(hello["gpus"] or 1)

    def meet(self, port: int | None, address: str, is_checked: bool) -> tuple[str, int, str]:
        """Where ranks will meet: (address, port, a line to say if it is not what was expected).

        Raises:
            LaunchError: the port is taken, or a node does not answer.
        """
        told = self._ask([self.nodes[0]], {"port": port})[0]
        if "fault" in told:
            raise LaunchError(f"{self.nodes[0].found.host}: {told['fault']}")
        names = [self.nodes[0].found.host, *self.nodes[0].found.facts["addresses"]]
        candidates = [address] if address else list(dict.fromkeys(names))
        if not is_checked:
            return address or candidates[-1], told["port"], told["note"]
        answers = self._ask(self.nodes, {"reach": told["port"], "addresses": candidates})
        best = max(candidates, key=lambda name: sum(name in answer["reached"] for answer in answers))
        for node, answer in zip(self.nodes, answers):
            node.found.reached = best in answer["reached"]
        return best, told["port"], told["note"]

    def _ask(self, nodes: Sequence[Node], question: dict[str, Any]) -> list[dict[str, Any]]:
        for node in nodes:
            node.told = None
            assert node.link is not None
            node.link.send(protocol.ASK, question)
        self._until(lambda: all(node.told is not None or node.lost for node in nodes), 2 * protocol.SILENCE_S)
        if self.interrupted_by is not None:
            raise KeyboardInterrupt
        for node in nodes:
            if node.told is None:
                raise LaunchError(f"{node.found.host} was lost before the start: {node.lost or 'it does not answer'}")
        return [node.told or {} for node in nodes]

    # --- working --------------------------------------------------------------------------------------------------

    def run(self, workload: Workload, assignments: Sequence[Assignment]) -> Outcome:
        """Run the training to its end."""
        outcome = Outcome(time.monotonic())
        terminals = {fd: self._screen.window_size(fd).hex() for fd in (1, 2) if self._screen.is_terminal(fd)}
        for node, assignment in zip(self.nodes, assignments):
            node.first_rank = assignment.first_rank
            assert node.link is not None
            job = {"workload": asdict(workload), "assignment": _plain(assignment)}
            node.link.send(protocol.JOB, {**job, "terminals": terminals, "colour": self._screen.has_colour})
        early, ended_s = EarlyEnds("machine", outcome.started_s), dict[str, float]()
        while any(node.is_working for node in self.nodes) and not self._is_over():
            self._turn()
            for node in self.nodes:
                if node.outcome is not None:
                    ended_s.setdefault(node.found.host, time.monotonic())
            early.look(ended_s, [node.found.host for node in self.nodes if node.is_working], time.monotonic())
        if self.interrupted_by is not None:
            self._finish(SIGNAL_GRACE_S + _KILL_S)
        elif self._is_over():
            self._settle()
            self._tell(protocol.END)
            self._finish(FAILURE_GRACE_S + _KILL_S)
        outcome.ended_s = time.monotonic()
        outcome.interrupted_by = self.interrupted_by
        outcome.failures = self._failures()
        for node in self.nodes:
            outcome.left_behind += (node.outcome or {}).get("left_behind", 0)
            pids = (node.outcome or {}).get("unkillable", ())
            outcome.unkillable += tuple(f"{node.found.host}:{pid}" for pid in pids)
            ended_by = (node.outcome or {}).get("interrupted_by")
            if ended_by is not None and not outcome.failures and self.interrupted_by is None:
                outcome.interrupted_by = ended_by
        return outcome

    def _failures(self) -> list[Failure]:
        found = [failure for node in self.nodes for failure in node.failures]
        for node in self.nodes:
            if (node.lost or node.found.error) and node.outcome is None:
                why = node.found.error or node.lost
                heard_s = node.link.heard_s if node.link is not None else time.monotonic()
                found.append(Failure(node.first_rank, 1, heard_s, host=node.found.host, lost=why))
        return found

    def _is_over(self) -> bool:
        ended = any((node.outcome or {}).get("interrupted_by") is not None for node in self.nodes)
        return ended or self.interrupted_by is not None or bool(self._failures())

    def _settle(self) -> None:
        """Learn the true cause: every node must have spoken since the first failure was known, or be lost."""
        begin_s = time.monotonic()
        self._tell(protocol.BEAT, begin_s)

        def is_known() -> bool:
            working = [node for node in self.nodes if node.is_working and node.link is not None]
            if any(node.link.heard_s <= begin_s for node in working if node.link is not None):
                return False
            is_sure = any(not failure.lost_peer for failure in self._failures())
            return is_sure or not working or time.monotonic() > begin_s + _SETTLE_S

        self._until(is_known, protocol.SILENCE_S + _SETTLE_S)

    def _finish(self, limit_s: float) -> None:
        """Wait for the nodes to say that all has ended; asked once more, no longer."""
        deadline_s = time.monotonic() + limit_s
        while any(node.is_working for node in self.nodes) and time.monotonic() < deadline_s:
            self._turn(_POLL_S)

    def close(self, status: int) -> None:
        """Let the agents go, and kill what started them if it stays."""
        self._tell(protocol.END, status)
        for node in self.nodes:
            if node.link is not None:
                node.link.flush(1.0)
        self._until(lambda: all(s.process.poll() is not None for s in self._starters), _KILL_S)
        for starter in self._starters:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starter.process.pid, signal.SIGKILL)
            starter.process.wait()
        for link in [*self._strangers, *(node.link for node in self.nodes if node.link is not None)]:
            link.close()
        if self._printer.is_alive():
            self._printer.queue.put(None)
            deadline_s = time.monotonic() + (1.0 if self.interrupted_by is not None else 1e9)
            while self._printer.is_alive() and time.monotonic() < deadline_s:  # a stopped pager is waited for
                self._printer.join(_POLL_S)
                if set(self._signals.take()) & set(ENDING):
                    return


def _plain(assignment: Assignment) -> dict[str, Any]:
    return {**asdict(assignment), "slots": list(assignment.slots)}
