"""Ranks that do one thing together: all come, or an error says who did not; one fails, and all raise the same error."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.comm import Group, whereabouts
from deepspeedlite.comm.stall_watch import condition
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import logger

_T = TypeVar("_T")
_PROMPT = timedelta(seconds=1)  # within which the others usually come
_POLL_S = 0.2
_PATIENCE = timedelta(seconds=30)  # before a warning tells which ranks do not come
# How often the ranks of a process group have met; every engine's meetings count, in the order in which they are called.
_MEETINGS: MutableMapping[Any, int] = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of an engine, which exchange small objects over a gloo group of their own.

    It is their own because a save in the background talks while the training does, and because objects are on the CPU.
    All talk to rank 0 alone. So rank 0 notices a rank's death, by its broken connection, and tells the others; and all
    notice rank 0's. Around a ring, some would wait for ranks that live and have failed.
    """

    def __init__(self) -> None:
        everyone = Group()
        self.rank, self.size = everyone.rank, everyone.size
        # Made when the ranks first meet: an engine that neither saves nor loads needs none.
        self._own: dist.ProcessGroup | None = None

    def meet(self, what: str) -> None:
        """Return when every rank has come here.

        Raises:
            CheckpointError: after `DEEPSPEED_TIMEOUT`, naming the ranks that did not come.
        """
        if self.size == 1:
            return
        world = dist.group.WORLD
        number = _MEETINGS.get(world, 0)
        store = dist.PrefixStore(f"deepspeedlite/checkpoint/{number}", dist.distributed_c10d._get_default_store())
        limit = comm.default_timeout()
        store.set(str(self.rank), what)
        with whereabouts(f"waits in {what}, which every rank must call"):
            self._wait_for_all(store, what, limit)
        calls = {rank: store.get(str(rank)).decode() for rank in range(self.size)}
        _MEETINGS[world] = number + 1
        if len(set(calls.values())) > 1:
            raise CheckpointError(f"the ranks call different things: {calls}")
        if self._own is None:
            self._own = dist.new_group(list(range(self.size)), limit, backend="gloo")

    def _wait_for_all(self, store: Any, what: str, limit: timedelta) -> None:
        everyone = [str(rank) for rank in range(self.size)]
        started_s, warn_s, limit_s = time.monotonic(), _PATIENCE.total_seconds(), limit.total_seconds()
        with contextlib.suppress(RuntimeError):
            store.wait(everyone, min(limit, _PROMPT, _PATIENCE))
            return
        while not store.check(everyone):
            waited_s = time.monotonic() - started_s
            ended = [rank for rank in range(self.size) if condition(rank) == "has ended"]
            if waited_s >= limit_s or not store.check([str(rank) for rank in ended]):
                missing = self._missing(store)
                store.delete_key(str(self.rank))
                why = f"of these, {gone} have ended" if (gone := sorted({*ended} & {*missing})) else f"in {limit_s:g} s"
                raise CheckpointError(
                    f"{what} must be called by every rank, and ranks {missing} did not call it ({why}); take the call "
                    "out of `if rank == 0` (a rank that died shows above)"
                )
            if waited_s >= warn_s:
                logger.warning(
                    "%s has waited %g s for ranks %s; every rank must call it: take it out of any `if rank == 0`",
                    *(what, warn_s, self._missing(store)),
                )
                warn_s = limit_s
            time.sleep(_POLL_S)

    def _missing(self, store: Any) -> list[int]:
        return [rank for rank in range(self.size) if not store.check([str(rank)])]

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
        mine = _outcome(action)
        if self.rank > 0:
            self._send(mine, 0)
            failure, shared = self._receive(0) or (f"rank 0: {self._silence()}", None)
            answers = []
        else:
            answers = [mine, *((self._receive(rank) or (None, self._silence())) for rank in range(1, self.size))]
            failure, shared = _failures([problem for _, problem in answers]), mine[0] if share else None
            for rank in range(1, self.size):
                self._send((failure, shared), rank)
        if failure:
            raise CheckpointError(f"{what} failed: {failure}")
        return [result for result, _ in answers], shared

    def _silence(self) -> str:
        return (
            f"ended before it was done, or did not answer within {comm.default_timeout().total_seconds():g} s; "
            "its own output tells why, and earlier checkpoints are as they were"
        )

    def _send(self, obj: Any, rank: int) -> None:
        """Send an object; a rank that is gone is noticed where its answer is received."""
        with contextlib.suppress(RuntimeError):
            dist.send_object_list([obj], rank, self._own)

    def _receive(self, rank: int) -> Any:
        """The object that a rank sends; None if it has gone."""
        held = [None]
        with contextlib.suppress(RuntimeError):
            dist.recv_object_list(held, rank, self._own)
        return held[0]


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
