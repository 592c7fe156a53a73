"""The launcher's side of a training: turns the loop, hands on signals, and ends all nodes with the first failure.

A single machine is a cluster of one, whose agent runs in this process (`LocalNode`). Nodes on other machines, which are
reached over links, are in multinode.py.
"""

from __future__ import annotations

import abc
import os
import signal
import time
from collections.abc import Callable, Sequence

from deepspeedlite.launcher.agent import FAILURE_GRACE_S, SIGNAL_GRACE_S, Agent, Outcome
from deepspeedlite.launcher.job import Job
from deepspeedlite.launcher.loop import Loop, Writer
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.report import EarlyEnds, Failure
from deepspeedlite.launcher.signals import ENDING, PASSED_ON, SignalQueue
from deepspeedlite.runtime.errors import LaunchError

POLL_S = 0.05
KILL_S = 3.0  # beyond a grace: how long an agent may take to end its ranks by SIGKILL and say so


class NotReadyError(LaunchError):
    """A run on several machines did not start. `gone`: those that did not answer."""

    def __init__(self, message: str, gone: Sequence[str]) -> None:
        super().__init__(message)
        self.gone = tuple(gone)


class Node(abc.ABC):
    """One machine, as the launcher sees it.

    Args:
        host: its name; "" where there is one machine.
        limit_s: how long it may take to say that all has ended, beyond its ranks' grace.
    """

    def __init__(self, host: str, limit_s: float) -> None:
        self.host, self.limit_s = host, limit_s
        self.outcome: Outcome | None = None  # None: more is to come from it
        self.lost = ""  # why nothing more will come
        self.wait_s: float | None = 0.0  # how long the loop may sleep before `turn`; None: until something happens

    @property
    def is_working(self) -> bool:
        """Whether more is to come from it."""
        return self.outcome is None and not self.lost

    @property
    @abc.abstractmethod
    def failures(self) -> list[Failure]:
        """Ranks, or the node itself, that failed on their own; times are on our clock."""

    def writers(self) -> list[Writer]:
        """What has something to write to it."""
        return []

    @abc.abstractmethod
    def turn(self) -> None:
        """Do what is due, after each turn of the loop."""

    @abc.abstractmethod
    def signal(self, number: int) -> None:
        """Hand a signal to the ranks."""

    @abc.abstractmethod
    def end(self) -> None:
        """End the ranks: others have failed."""

    @abc.abstractmethod
    def close(self, status: int) -> None:
        """Let it go, with the exit status of all."""


class LocalNode(Node):
    """This machine alone: its agent runs in this process, and its ranks' end is waited for as long as it takes."""

    def __init__(self, job: Job, screen: Screen, loop: Loop) -> None:
        super().__init__("", 1e9)
        self._agent = Agent(job, screen, loop)
        self._steps = self._agent.run()  # the first turn starts the ranks

    @property
    def failures(self) -> list[Failure]:
        """Ranks that failed on their own, which the agent has settled."""
        return self._agent.outcome.failures

    def turn(self) -> None:
        """Resume the agent until it would sleep."""
        try:
            self.wait_s = next(self._steps) if self.outcome is None else None
        except StopIteration:
            self.outcome, self.wait_s = self._agent.outcome, None

    def signal(self, number: int) -> None:
        """Hand it to the ranks."""
        self._agent.signal(number)

    def end(self) -> None:
        """End the ranks, which the agent does by itself too."""
        self._agent.end()

    def close(self, status: int) -> None:
        """Kill what an error has left running."""
        self._steps.close()


class Cluster:
    """One run of one training. Use once.

    Args:
        signals: open, and read by nobody else.
    """

    def __init__(self, screen: Screen, signals: SignalQueue) -> None:
        self.nodes: Sequence[Node] = []
        self.screen, self.loop = screen, Loop(signals)
        self.started_s = time.monotonic()
        self.interrupted_by: int | None = None

    # Turning

    def turn(self, timeout_s: float | None = None) -> bool:
        """Wait for something and handle it. True if someone asked for the end (again)."""
        waits = [wait_s for wait_s in (timeout_s, *(node.wait_s for node in self.nodes)) if wait_s is not None]
        writers = [writer for node in self.nodes for writer in node.writers()]
        asked = self._obey(self.loop.turn(min(waits) if waits else None, writers))
        for node in self.nodes:
            node.turn()
        return asked

    def _obey(self, numbers: bytes) -> bool:
        asked = False
        for number in numbers:
            if number in ENDING:
                asked = True
                if self.interrupted_by is None and not self._failures():
                    self.interrupted_by = number
                self._signal(signal.SIGTERM if number == signal.SIGPIPE else number)
            elif number in PASSED_ON or number == signal.SIGWINCH:
                self._signal(number)
            elif number == signal.SIGTSTP:  # Ctrl-Z stops the ranks too; `fg` wakes all
                self._signal(number)
                os.kill(os.getpid(), signal.SIGSTOP)
                self._signal(signal.SIGCONT)
        return asked

    def _signal(self, number: int) -> None:
        for node in self.nodes:
            node.signal(number)

    def until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Turn until `done`; False if time ran out or someone asked for the end."""
        deadline_s = time.monotonic() + limit_s
        while not done():
            if self.turn(POLL_S) or time.monotonic() > deadline_s:
                return done()
        return True

    # Running

    def run(self, num_ranks: int) -> Outcome:
        """Run the training, which the nodes know by now, to its end."""
        outcome = Outcome(time.monotonic(), num_ranks=num_ranks)
        early, ended_s = EarlyEnds("machine", outcome.started_s), dict[str, float]()
        while self._working() and not self._is_over():
            self.turn()
            ended_s = {node.host: ended_s.get(node.host, time.monotonic()) for node in self.nodes if node.outcome}
            early.look(ended_s, [node.host for node in self._working()], time.monotonic())
        if self.interrupted_by is not None:
            self._finish(SIGNAL_GRACE_S)
        elif self._is_over():
            self._settle()
            for node in self.nodes:
                node.end()
            self._finish(FAILURE_GRACE_S)
        outcome.ended_s = time.monotonic()
        outcome.interrupted_by, outcome.failures = self.interrupted_by, self._failures()
        outcome.gone = tuple(node.host for node in self.nodes if node.lost)
        for node in self.nodes:
            its = node.outcome or Outcome(0.0)
            outcome.left_behind += its.left_behind
            outcome.unkillable += tuple(f"{node.host}:{pid}" if node.host else pid for pid in its.unkillable)
            if outcome.interrupted_by is None and not outcome.failures:
                outcome.interrupted_by = its.interrupted_by
        return outcome

    def _working(self) -> list[Node]:
        return [node for node in self.nodes if node.is_working]

    def _failures(self) -> list[Failure]:
        return [failure for node in self.nodes for failure in node.failures]

    def _is_over(self) -> bool:
        ended = any(node.outcome is not None and node.outcome.interrupted_by is not None for node in self.nodes)
        return ended or self.interrupted_by is not None or bool(self._failures())

    def _settle(self) -> None:
        """Learn the true cause: every node must have spoken since the first failure was known, or be lost.

        A node alone has seen to that by itself.
        """

    def _finish(self, grace_s: float) -> None:
        """Wait for the nodes to say that all has ended; asked once more, no longer."""
        began_s = time.monotonic()
        while any(time.monotonic() < began_s + grace_s + node.limit_s for node in self._working()):
            self.turn(POLL_S)

    def close(self, status: int) -> None:
        """Let the nodes go, and show what is left."""
        for node in self.nodes:
            node.close(status)
        self._show_rest()

    def _show_rest(self) -> None:
        """A stopped pager is waited for, but not after a signal."""
        self.screen.stop(1.0 if self.interrupted_by is not None else 1e9)
        self.loop.close()
