"""Ranks that do one thing together: all come, or an error says who did not; one fails, and all raise the same error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.comm import Group, whereabouts
from deepspeedlite.comm.guard import objects
from deepspeedlite.comm.registry import registry
from deepspeedlite.comm.roll_call import absent_ranks
from deepspeedlite.runtime.errors import CheckpointError

_T = TypeVar("_T")
_NOTICE_S = 30.0  # before a warning tells which ranks do not come


class Ranks:
    """The ranks of an engine, which exchange small objects over a gloo group of their own.

    It is their own because a save in the background talks while the training does, and because objects are on the CPU.
    All talk to rank 0 alone. So rank 0 notices a rank's death, by its broken connection, and tells the others; and all
    notice rank 0's. Around a ring, some would wait for ranks that live and have failed.
    """

    def __init__(self) -> None:
        everyone = Group()
        self.rank, self.size = everyone.rank, everyone.size
        self._call = ""  # in which they meet: compared with what they do first
        self._records: Collection[type] = ()  # of what they tell each other in it
        # Made when the ranks first meet: an engine that neither saves nor loads needs none.
        self.process_group: dist.ProcessGroup | None = None

    def meet(self, what: str, records: Collection[type] = ()) -> None:
        """Return when every rank has come here. They then tell each other plain data and `records`.

        Raises:
            CheckpointError: after `DEEPSPEED_TIMEOUT`, naming the ranks that did not come.
        """
        if self.size == 1:
            return
        limit, self._call, self._records = comm.default_timeout(), what, records
        with whereabouts(f"waits in {what}, which every rank must call"):
            limit_s, everyone = limit.total_seconds(), range(self.size)
            missing = absent_ranks(everyone, what, "checkpoint", sys.maxsize, limit_s, _NOTICE_S)
            if missing:
                ended = [rank for rank in missing if registry.condition(rank) == "has ended"]
                raise CheckpointError(
                    f"{what} must be called by every rank, and ranks {missing} did not call it "
                    f"({f'of these, {ended} have ended' if ended else f'in {limit_s:g} s'}); take the call out of "
                    "`if rank == 0` (a rank that died shows above)"
                )
        if self.process_group is None:
            self.process_group = dist.new_group(list(everyone), limit, backend="gloo")

    def each(self, what: str, action: Callable[[], _T]) -> list[_T]:
        """Do `action` on every rank; rank 0 gets all results, the others none.

        Raises:
            CheckpointError: on every rank the same, with what went wrong on each.
        """
        return self._exchange(what, action)[0]

    def first(self, what: str, action: Callable[[], _T]) -> _T:
        """Do `action` on rank 0 and give its result to all; raises as `each`."""
        return self._exchange(what, lambda: action() if self.rank == 0 else None, share=True)[1]

    def _exchange(self, what: str, action: Callable[[], Any], share: bool = False) -> tuple[list[Any], Any]:
        mine = (*_outcome(action), self._call)
        if self.rank > 0:
            self._send(mine, 0)
            failure, shared = self._receive(0) or (f"{what} failed: rank 0: {self._silence()}", None)
            answers = []
        else:
            gone = (None, self._silence(), self._call)
            answers = [mine, *(self._receive(rank) or gone for rank in range(1, self.size))]
            problems, calls = _failures([problem for _, problem, _ in answers]), [call for *_, call in answers]
            failure = f"{what} failed: {problems}" if problems else ""
            if len(set(calls)) > 1:
                failure = f"the ranks call different things: {', '.join(calls)}"
            shared = mine[0] if share else None
            for rank in range(1, self.size):
                self._send((failure, shared), rank)
        if failure:
            raise CheckpointError(failure)
        return [result for result, *_ in answers], shared

    def _silence(self) -> str:
        return (
            f"ended before it was done, or did not answer within {comm.default_timeout().total_seconds():g} s; "
            "its own output tells why, and earlier checkpoints are as they were"
        )

    def _send(self, obj: Any, rank: int) -> None:
        """Send an object; a rank that is gone is noticed where its answer is received."""
        data = objects.to_bytes(obj)
        with contextlib.suppress(RuntimeError):
            objects.send_bytes(data, rank, self.process_group)

    def _receive(self, rank: int) -> Any:
        """The object that a rank sends; None if it has gone."""
        try:
            data = objects.receive_bytes(rank, self.process_group)
        except RuntimeError:
            return None
        return objects.from_bytes(data, self._records)


def _outcome(action: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """What an action gives, or what went wrong in it."""
    try:
        return action(), None
    except Exception as error:
        return None, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _failures(problems: Sequence[str | None]) -> str:
    """What went wrong, with the ranks on which it did; empty where nothing was."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, those))}: {problem}" for problem, those in ranks.items())
