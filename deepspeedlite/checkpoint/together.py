"""Ranks that do one thing together: all come, or an error says who did not; one fails, and all raise the same error."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.errors import CheckpointError, UnsupportedError

_T = TypeVar("_T")
# How often the ranks of a process group have met; every engine's meetings count, in the order in which they are called.
_MEETINGS: MutableMapping[Any, int] = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of an engine, which exchange small objects over a gloo group of their own.

    It is their own because a save in the background talks while the training does, and because objects are on the CPU.
    """

    def __init__(self, group: Group) -> None:
        self._all, self._own = group, None if group.size > 1 else group

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._all.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self._all.size

    def meet(self, what: str) -> None:
        """Return when every rank has come here.

        Raises:
            CheckpointError: after `DEEPSPEED_TIMEOUT`, naming the ranks that did not come.
        """
        if comm.get_world_size() != self.size:
            raise UnsupportedError(
                "checkpoints of a part of the ranks (model parallelism by mpu) are not in this release"
            )
        if self.size == 1:
            return
        world = dist.group.WORLD
        number = _MEETINGS.get(world, 0)
        store = dist.PrefixStore(f"deepspeedlite/checkpoint/{number}", dist.distributed_c10d._get_default_store())
        limit = comm.default_timeout()
        store.set(str(self.rank), what)
        try:
            store.wait([str(rank) for rank in range(self.size)], limit)
        except RuntimeError as error:
            missing = [rank for rank in range(self.size) if not self._has_come(store, rank)]
            store.delete_key(str(self.rank))
            raise CheckpointError(
                f"{what} must be called by every rank, and ranks {missing} did not call it within "
                f"{limit.total_seconds():g} s; take the call out of `if rank == 0` (a rank that died shows above)"
            ) from error
        calls = {rank: store.get(str(rank)).decode() for rank in range(self.size)}
        _MEETINGS[world] = number + 1
        if len(set(calls.values())) > 1:
            raise CheckpointError(f"the ranks call different things: {calls}")
        if self._own is None:
            self._own = Group(dist.new_group(list(range(self.size)), limit, backend="gloo"))

    @staticmethod
    def _has_come(store: Any, rank: int) -> bool:
        try:
            store.wait([str(rank)], timedelta(milliseconds=10))
        except RuntimeError:
            return False
        return True

    def each(self, what: str, action: Callable[[], _T]) -> list[_T]:
        """Do `action` on every rank and return all results.

        Raises:
            CheckpointError: on every rank, with what went wrong on each.
        """
        result: Any = None
        problem = None
        try:
            result = action()
        except Exception as error:
            problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if self._own is None:
            raise CheckpointError(f"{what}: the ranks have not met")
        try:
            answers = self._own.all_gather_objects((result, problem))
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(
                f"{what}: a rank ended before it was done ({reason}); earlier checkpoints are as they were"
            ) from error
        by_problem: dict[str, list[int]] = {}
        for rank, (_, found) in enumerate(answers):
            if found is not None:
                by_problem.setdefault(found, []).append(rank)
        if by_problem:
            told = "; ".join(f"rank {', '.join(map(str, ranks))}: {found}" for found, ranks in by_problem.items())
            raise CheckpointError(f"{what} failed: {told}")
        return [answer for answer, _ in answers]

    def first(self, what: str, action: Callable[[], _T]) -> _T:
        """Do `action` on rank 0 and give its result to all; raises as `each`."""
        return self.each(what, lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]
