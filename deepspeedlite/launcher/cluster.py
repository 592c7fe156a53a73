"""The launcher's side of a training: turns the loop, hands on signals, and ends all nodes with the first failure.

A single machine is a cluster of one, whose node is the agent itself, in this process. Nodes on other machines are
reached over links (multinode.py). Both tell an `Outcome` what happens to their ranks.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from deepspeedlite.launcher.agent import FAILURE_GRACE_S, RECENT_S, SIGNAL_GRACE_S
from deepspeedlite.launcher.loop import ENDING, PASSED_ON, Loop
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.report import Outcome
from deepspeedlite.runtime.errors import LaunchError

_POLL_S = 0.05
_SCHEDULER_S = 0.02
_SETTLE_S = 1.0  # how long a rank that has raised may take to exit before others are ended
_CAUSE_S = 3.0  # the same where all that have ended say that a peer has gone, and none is known to have
_ANSWER_S = 5.0  # how long other machines may take to say what they know of a failure


class NotReadyError(LaunchError):
    """A run on several machines did not start. `gone`: those that did not answer."""

    def __init__(self, message: str, gone: Sequence[str]) -> None:
        super().__init__(message)
        self.gone = tuple(gone)


class Node(Protocol):
    """One machine, as the launcher sees it."""

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come from it."""

    def turn(self) -> float | None:
        """Do what is due, after each turn of the loop. Gives how long that may sleep; None: until something happens."""

    def signal(self, number: int) -> None:
        """Hand a signal that does not end them to the ranks."""

    def end(self, number: int, grace_s: float) -> None:
        """Ask the ranks to end, and kill them after `grace_s`; the earliest order counts."""

    def has_answered(self, begin_s: float) -> bool:
        """Whether it has said something since, which it is asked for, so that all that happened before was told."""

    def close(self, status: int) -> None:
        """Let it go, with the exit status of all."""


class Cluster:
    """One run of one training. Use once.

    Args:
        loop: open.
        outcome: what the nodes tell; whole when `run` returns.
    """

    def __init__(self, nodes: Sequence[Node], loop: Loop, screen: Screen, outcome: Outcome) -> None:
        self._nodes, self._loop, self._screen, self.outcome = nodes, loop, screen, outcome
        self._is_ending = False
        self._wait_s: float | None = 0.0  # how long the loop may sleep; None: until something happens

    # Turning

    def turn(self, timeout_s: float | None = None) -> None:
        """Wait for something and handle it."""
        for number in self._loop.turn(_soonest(timeout_s, self._wait_s)):
            self._obey(number)
        self._wait_s = _soonest(*(node.turn() for node in self._nodes))

    def _obey(self, number: int) -> None:
        if number in ENDING:
            if self.outcome.interrupted_by is None and not self._is_ending:
                self.outcome.interrupted_by = number
            self._end(signal.SIGTERM if number == signal.SIGPIPE else number, SIGNAL_GRACE_S)
            return
        if number == signal.SIGWINCH:
            self._screen.measure()
        if number in (*PASSED_ON, signal.SIGWINCH, signal.SIGTSTP):
            self._signal(number)
        if number == signal.SIGTSTP:  # Ctrl-Z stops the ranks too; `fg` wakes all
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for node in self._nodes:
            node.signal(number)

    def _end(self, number: int, grace_s: float) -> None:
        """End all; who asks once more does not want to wait."""
        for node in self._nodes:
            node.end(number, 0.0 if self._is_ending else grace_s)
        self._is_ending = True

    def until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Turn until `done`; False if time ran out or someone asked for the end."""
        deadline_s, before = time.monotonic() + limit_s, self.outcome.interrupted_by
        while not done() and (left_s := deadline_s - time.monotonic()) > 0:
            if self.outcome.interrupted_by != before:
                break
            self.turn(min(_POLL_S, left_s))
        return done()

    # Running

    def run(self) -> Outcome:
        """Run the training, which the nodes know by now, to its end."""
        outcome = self.outcome
        while not self._is_over() and not self._has_ended():
            self.turn(outcome.tell_early_ends())
        if outcome.interrupted_by is None and outcome.failed():
            self._settle()
        if outcome.interrupted_by is None:
            outcome.failures = outcome.failed()
        if not self._is_ending and self._is_over():
            interrupted = outcome.interrupted_by is not None  # as a node has told
            self._end(outcome.interrupted_by or signal.SIGTERM, SIGNAL_GRACE_S if interrupted else FAILURE_GRACE_S)
        while not self._has_ended():
            self.turn(_POLL_S)
        return outcome

    def _has_ended(self) -> bool:
        return all(node.is_done for node in self._nodes)

    def _is_over(self) -> bool:
        return self.outcome.interrupted_by is not None or bool(self.outcome.failed())

    def _settle(self) -> None:
        """Learn the true cause: who raised may take longer to exit than its peers take to notice.

        Every node must have spoken since the first failure was known, or be lost.
        """
        outcome, begin_s = self.outcome, time.monotonic()

        def is_known() -> bool:
            failures = outcome.failed()
            oldest_s = min(end.exited_s for end in failures) - RECENT_S
            raised = [rank for rank, at_s in outcome.raised_s.items() if at_s > oldest_s and rank not in outcome.ends]
            is_sure = not raised and not all(end.lost_peer for end in failures)
            is_caused = any(not end.lost_peer for end in failures) or len(outcome.ends) > len(failures)
            is_late = time.monotonic() > begin_s + (_SETTLE_S if is_caused else _CAUSE_S)
            working = [node for node in self._nodes if not node.is_done]
            is_told = all(node.has_answered(begin_s) for node in working)
            return is_told and (is_sure or is_late or len(outcome.ends) == outcome.num_ranks)

        self.until(is_known, _ANSWER_S + _CAUSE_S)
        # A scheduler that ends everything at once signals us and the ranks: that is no rank's failure.
        self.until(lambda: False, _SCHEDULER_S)

    def close(self, status: int) -> None:
        """Let the nodes go, and show what is left."""
        self.outcome.ended_s = time.monotonic()
        for node in self._nodes:
            node.close(status)
        # A stopped pager is waited for, but not after a signal.
        self._screen.finish(1.0 if self.outcome.interrupted_by is not None else 1e9)


def _soonest(*waits: float | None) -> float | None:
    return min((wait_s for wait_s in waits if wait_s is not None), default=None)
