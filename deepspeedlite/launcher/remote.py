"""Nodes on other machines: starts an agent on each, hears them over their links, and takes silence for a loss.

gather    start the agents, hear what every node is
meet      find a port on the first node and an address at which all reach it
assign    hand out the jobs; `Cluster.run` does the rest
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deepspeedlite.env_report.preflight import Found
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.agent import Outcome
from deepspeedlite.launcher.backends import Launch
from deepspeedlite.launcher.cluster import KILL_S, Cluster, Node
from deepspeedlite.launcher.job import Assignment, Workload
from deepspeedlite.launcher.loop import Writer
from deepspeedlite.launcher.options import Hosts
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.report import Failure
from deepspeedlite.launcher.signals import SignalQueue
from deepspeedlite.launcher.ssh import HostProcess
from deepspeedlite.runtime.errors import LaunchError

_SETTLE_S = 1.0  # how long to wait for a failure that explains those of lost connections


class RemoteNode(Node):
    """A machine whose agent is at the other end of a link. `slots`: None for as many as it has devices."""

    def __init__(self, host: str, slots: Sequence[int] | None) -> None:
        super().__init__(host, KILL_S)
        self.wait_s = protocol.BEAT_S
        self.link: protocol.Link | None = None  # None until its agent has shown that it is ours
        self.slots = slots
        self.facts: dict[str, Any] = {}  # what it is
        self.skew_s = 0.0  # its clock, less ours
        self.reached: bool | None = None  # whether it reaches where ranks will meet; None: not tried
        self.error = ""  # why it said nothing of itself, or could not start its ranks
        self.told: dict[str, Any] | None = None  # the answer to the last question
        self._ranks_failed: list[Failure] = []
        self._first_rank = 0
        self._offset_s = 0.0  # its monotonic clock, less ours, as the quickest answer to a beat has told it
        self._round_trip_s = 1e9
        self._beat_s = 0.0  # when it was last sent a beat

    @property
    def found(self) -> Found:
        """All that is known of it."""
        return Found(self.host, self.slots, self.facts, self.error, self.skew_s, self.reached)

    @property
    def failures(self) -> list[Failure]:
        """Its ranks that failed, and the node itself where it was lost or could not start them."""
        why = (self.error or self.lost) if self.outcome is None else ""
        heard_s = self.link.heard_s if self.link is not None else time.monotonic()
        its = [Failure(self._first_rank, 1, heard_s, host=self.host, lost=why)] if why else []
        return self._ranks_failed + its

    def writers(self) -> list[Writer]:
        """Its link, while the other side has not taken all."""
        return [self.link] if self.link is not None and self.link.pending else []

    def send(self, kind: bytes, value: Any = None) -> None:
        """Tell its agent something, if there is one."""
        if self.link is not None and not self.link.closed:
            self.link.send(kind, value)

    def assign(self, workload: Workload, assignment: Assignment, terminals: dict[int, str], colour: bool) -> None:
        """Let it start its ranks. `terminals`: which of our streams are some, and their window's size."""
        self._first_rank = assignment.first_rank
        ranks = {**asdict(assignment), "slots": list(assignment.slots)}
        job = {"workload": asdict(workload), "assignment": ranks, "terminals": terminals, "colour": colour}
        self.send(protocol.JOB, job)

    def hear(self, screen: Screen) -> None:
        """Take in what has come over the link."""
        assert self.link is not None
        for kind, value in self.link.receive():
            if kind == protocol.OUTPUT:
                fd = screen.out_fd if value[0] == 1 else screen.err_fd
                shown = functools.partial(self.link.send, protocol.ACK)
                screen.show(fd, value[2:], "live" if value[1] else "lines", shown)
            elif kind == protocol.BEAT:
                theirs_s, sent_s = value
                now_s = time.monotonic()
                if now_s - sent_s < self._round_trip_s:
                    self._round_trip_s, self._offset_s = now_s - sent_s, theirs_s - (now_s + sent_s) / 2
            elif kind == protocol.TELL:
                self.told = value
            elif kind == protocol.ERROR:
                self.error = str(value)
            elif kind == protocol.FAILED:
                self._ranks_failed = [self._on_our_clock(fields) for fields in value]
            elif kind == protocol.DONE:
                self._ranks_failed = [self._on_our_clock(fields) for fields in value["failures"]]
                self.outcome = Outcome(**{**value, "failures": self._ranks_failed})

    def _on_our_clock(self, fields: dict[str, Any]) -> Failure:
        seen_s = fields["traceback_s"]
        seen_s = None if seen_s is None else seen_s - self._offset_s
        return Failure(**{**fields, "exited_s": fields["exited_s"] - self._offset_s, "traceback_s": seen_s})

    def turn(self) -> None:
        """Send a beat where one is due, and notice a loss."""
        if self.link is None:
            return
        now_s = time.monotonic()
        if now_s - self._beat_s >= protocol.BEAT_S:
            self._beat_s = now_s
            self.send(protocol.BEAT, now_s)
        if not self.is_working:
            return
        if self.link.closed:
            self.lost = "it was lost (its connection closed)"
        elif now_s - self.link.heard_s > protocol.SILENCE_S:
            self.lost = f"it was lost (no word from it for {now_s - self.link.heard_s:.1f} s)"
            self.link.closed = True

    def signal(self, number: int) -> None:
        """Hand it to the ranks there; their terminal's size stays what it was."""
        if number == signal.SIGCONT and self.link is not None:
            self.link.heard_s = time.monotonic()  # while we were stopped nobody listened
        if number != signal.SIGWINCH:
            self.send(protocol.SIGNAL, int(number))

    def end(self) -> None:
        """End the ranks there."""
        self.send(protocol.END)

    def has_spoken_since(self, begin_s: float) -> bool:
        """Whether something came since; ask by a beat first."""
        return self.link is None or self.link.heard_s > begin_s

    def close(self, status: int) -> None:
        """Tell the agent how all has ended."""
        self.send(protocol.END, status)
        if self.link is not None:
            self.link.flush(1.0)


class RemoteCluster(Cluster):
    """A cluster whose nodes are reached over links.

    Args:
        hosts: each node's name and slots.
        key: what agents that connect must know; "" with ssh, whose pipes are theirs alone.
        listener: where they connect; None with ssh.
    """

    def __init__(
        self, hosts: Hosts, key: str, listener: socket.socket | None, screen: Screen, signals: SignalQueue
    ) -> None:
        super().__init__(screen, signals)
        self.nodes: list[RemoteNode] = [RemoteNode(host, slots) for host, slots in hosts.items()]
        self._key, self._listener = key, listener
        self._starters: list[tuple[int | None, HostProcess]] = []  # with the one node whose link it is
        self._strangers: dict[protocol.Link, str] = {}  # connected, and not yet known -> the nonce they were given

    # Meeting

    def gather(self, launches: Sequence[Launch], limit_s: float) -> None:
        """Start the agents and return when each has said what it is, or why not (`found.error`) is known."""
        for launch in launches:
            self._start(launch)
        self.screen.start()
        if self._listener is not None:
            self.loop.watch(self._listener.fileno(), self._accept)
        for number, starter in self._starters:
            if number is not None:  # over the process's own pipes
                theirs, ours = starter.process.stdin, starter.process.stdout
                assert theirs is not None and ours is not None
                self._challenge(protocol.Link(os.dup(ours.fileno()), os.dup(theirs.fileno())))
        self.until(lambda: all(n.found.facts or self._has_failed(n) for n in self.nodes), limit_s)
        for node in self.nodes:
            if not node.facts and not node.error:
                node.error = f"no answer in {limit_s:.0f} s"

    def _start(self, launch: Launch) -> None:
        """Start a process that starts agents, and show what it, or an agent, says."""
        tag = f"[{self.nodes[launch.node].host}] ".encode() if launch.node is not None else b""

        def write(_: int, lines: bytes) -> None:
            self.screen.show(self.screen.err_fd, b"".join(tag + line for line in lines.splitlines(True)))

        try:
            starter = HostProcess(launch.argv, self.loop, write, launch.env, is_link=launch.node is not None)
        except OSError as error:
            raise LaunchError(f"cannot start {launch.argv[0]}: {error.strerror}") from error
        self._starters.append((launch.node, starter))

    def _has_failed(self, node: RemoteNode) -> bool:
        """Whether the process that should have started this node's agent has gone, or says that it could not."""
        index = self.nodes.index(node)
        own = next((starter for number, starter in self._starters if number in (None, index)), None)
        if own is None:
            return False
        words = own.last_words.decode(errors="replace").strip().splitlines()
        is_given_up = any(f": {node.host}: ssh exited" in line for line in words)  # pdsh, which goes on with the others
        if not is_given_up and (own.process.poll() is None or own.is_open):
            return False
        about = [line for line in words if line.startswith(f"{node.host}: ")] or words
        node.error = about[-1] if about else f"its starter ended with {own.process.returncode}"
        return True

    def _accept(self) -> None:
        assert self._listener is not None
        self._challenge(protocol.Link(self._listener.accept()[0].detach()))

    def _challenge(self, link: protocol.Link) -> None:
        nonce = protocol.new_secret()
        self._strangers[link] = nonce
        link.send(protocol.CHALLENGE, {"nonce": nonce})
        self.loop.watch(link.read_fd, functools.partial(self._hear_stranger, link))

    def _hear_stranger(self, link: protocol.Link) -> None:
        hello = next((value for kind, value in link.receive() if kind == protocol.HELLO), None)
        if hello is None and not link.closed:
            return
        nonce = self._strangers.pop(link)
        self.loop.forget(link.read_fd)
        node = self._recognise(hello, nonce)
        if hello is None or node is None:
            link.close()
            return
        link.send(protocol.WELCOME, {"proof": protocol.proof(self._key, hello["nonce"], "launcher")})
        node.link, node.facts = link, hello
        node.skew_s = hello["time"] - time.time()
        if node.slots is None:
            node.slots = range(hello["gpus"] or 1)
        self.loop.watch(link.read_fd, functools.partial(self._hear, node))

    def _recognise(self, hello: Any, nonce: str) -> RemoteNode | None:
        """Who knows the key is the node that its starter named; under MPI and Slurm, the one with its host's name."""
        if not isinstance(hello, dict) or hello.get("proof") != protocol.proof(self._key, nonce, "node"):
            return None
        index = hello["index"]
        by_name = [node for node in self.nodes if node.host in hello["names"] and not hello["is_told"]]
        by_index = [self.nodes[index]] if index is not None and index < len(self.nodes) else []
        return next((node for node in (*by_name, *by_index) if node.link is None), None)

    def _hear(self, node: RemoteNode) -> None:
        node.hear(self.screen)
        if node.link is not None and node.link.closed:
            self.loop.forget(node.link.read_fd)

    def meet(self, port: int | None, address: str, is_checked: bool) -> tuple[str, int, str]:
        """Where ranks will meet: (address, port, a line to say if it is not what was expected).

        Raises:
            LaunchError: the port is taken, or a node does not answer.
        """
        first = self.nodes[0]
        told = self._ask([first], {"port": port})[0]
        if "fault" in told:
            raise LaunchError(f"{first.host}: {told['fault']}")
        candidates = [address] if address else list(dict.fromkeys([first.host, *first.facts["addresses"]]))
        if not is_checked:
            return address or candidates[-1], told["port"], told["note"]
        answers = self._ask(self.nodes, {"reach": told["port"], "addresses": candidates})
        best = max(candidates, key=lambda name: sum(name in answer["reached"] for answer in answers))
        for node, answer in zip(self.nodes, answers):
            node.reached = best in answer["reached"]
        return best, told["port"], told["note"]

    def _ask(self, nodes: Sequence[RemoteNode], question: dict[str, Any]) -> list[dict[str, Any]]:
        for node in nodes:
            node.told = None
            node.send(protocol.ASK, question)
        self.until(lambda: all(node.told is not None or node.lost for node in nodes), 2 * protocol.SILENCE_S)
        if self.interrupted_by is not None:
            raise KeyboardInterrupt
        for node in nodes:
            if node.told is None:
                raise LaunchError(f"{node.host} was lost before the start: {node.lost or 'it does not answer'}")
        return [node.told or {} for node in nodes]

    # Working

    def assign(self, workload: Workload, assignments: Sequence[Assignment]) -> None:
        """Hand out the jobs."""
        screen = self.screen
        terminals = {fd: screen.window_size(fd).hex() for fd in (1, 2) if screen.is_terminal(fd)}
        for node, assignment in zip(self.nodes, assignments):
            node.assign(workload, assignment, terminals, screen.has_colour)

    def _settle(self) -> None:
        begin_s = time.monotonic()
        for node in self.nodes:
            node.send(protocol.BEAT, begin_s)

        def is_known() -> bool:
            working = [node for node in self.nodes if node.is_working]
            is_sure = any(not failure.lost_peer for failure in self._failures())
            is_late = time.monotonic() > begin_s + _SETTLE_S
            return all(node.has_spoken_since(begin_s) for node in working) and (is_sure or not working or is_late)

        self.until(is_known, protocol.SILENCE_S + _SETTLE_S)

    def close(self, status: int) -> None:
        """Let the agents go, and kill what started them if it stays."""
        for node in self.nodes:
            node.close(status)
        self.until(lambda: all(starter.process.poll() is not None for _, starter in self._starters), KILL_S)
        for _, starter in self._starters:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starter.process.pid, signal.SIGKILL)
            starter.process.wait()
        self._show_rest()
        for link in [*self._strangers, *(node.link for node in self.nodes if node.link is not None)]:
            link.close()
