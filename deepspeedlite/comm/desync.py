"""Who waits where: what a rank says when a collective fails because the ranks do not meet in it.

A collective that some rank never calls ends, after the process group's timeout, in torch's error, which tells neither
what was to be moved nor what the others were doing. Here every rank that fails leaves a note in the job's store, reads
the others' notes for a few seconds, and raises one error with all of them. What a rank waits in is written to
`registry`, for notices long before that (`metrics.stall_watch`).

This is for gloo. On NCCL the failing collective is found by torch's watchdog thread, which ends the process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch.distributed as dist

from deepspeedlite.comm.registry import Wait, registry
from deepspeedlite.runtime.errors import DistributedError

_OTHERS_SPEAK_S = 5.0
_POLL_S = 0.05
_TITLE = "the ranks do not meet in a collective"


class LabelledWork:
    """A collective under way that can say what it is."""

    def __init__(self, work: Any, what: str, ranks: Sequence[int]) -> None:
        self._work, self._wait = work, Wait(what, ranks)
        registry.last = self._wait

    def wait(self) -> Any:
        """Wait for completion.

        Raises:
            DistributedError: it failed or timed out; the message says where every rank was.
        """
        with _Waiting(self._wait, explains=True):
            return self._work.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def explained(what: str, ranks: Sequence[int]) -> AbstractContextManager[object]:
    """Turn a failure inside into a DistributedError that says where every rank was; this one waits in `what`."""
    return _Waiting(Wait(what, ranks), explains=True)


@contextlib.contextmanager
def whereabouts(note: str) -> Iterator[None]:
    """Let others know where this rank is, while it waits for them outside of a collective, or has failed."""
    store = _notes()
    store.set(str(dist.get_rank()), note)
    with _Waiting(Wait(note.removeprefix("waits in "), range(dist.get_world_size()), is_told=False), explains=False):
        yield
    store.delete_key(str(dist.get_rank()))


class _Waiting:
    """Has the registry say that this thread waits, and explains a failure if asked to."""

    def __init__(self, wait: Wait, explains: bool) -> None:
        self._wait, self._explains, self._thread = wait, explains, get_ident()
        self._before = registry.waits.get(self._thread)

    def __enter__(self) -> None:
        registry.waits[self._thread] = self._wait

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._explains and isinstance(error, (RuntimeError, OSError)):
                raise _explained(self._wait, error) from error
        finally:
            registry.waits[self._thread] = self._before


def _notes() -> Any:
    return dist.PrefixStore("deepspeedlite/stalled", registry.store)


def _explained(wait: Wait, error: Exception) -> DistributedError:
    if isinstance(error, DistributedError) and str(error).startswith(_TITLE):
        return error  # by a collective that is part of this one
    return DistributedError(_explain(wait.what, wait.ranks, str(error)))


def _explain(what: str, ranks: Sequence[int], reason: str) -> str:
    me = dist.get_rank()
    notes = {me: f"waits in {what}"}
    if "stopped" not in registry.condition(0):  # the store, which it hosts as a rule, would not answer
        with contextlib.suppress(RuntimeError):
            store = _notes()
            store.set(str(me), notes[me])
            late_at = time.monotonic() + _OTHERS_SPEAK_S
            notes.update({rank: _note(store, rank, late_at) for rank in ranks if rank != me})
    silent = "has not said where it is: it has ended, or is busy elsewhere"
    notes = {rank: notes.get(rank) or registry.seen(rank) or silent for rank in sorted({me, *ranks})}
    lines = "\n".join(f"  rank {rank} {note}" for rank, note in notes.items())
    hint = advice(notes.values())
    return f"{_TITLE} ({reason.splitlines()[0][:200]}):\n{lines}" + (f"\n{hint}" if hint else "")


def _note(store: Any, rank: int, late_at: float) -> str:
    """A rank's note; empty if it has ended, is stopped, or does not write one in time."""
    while not store.check([str(rank)]):
        if registry.condition(rank) or time.monotonic() > late_at:
            return ""
        time.sleep(_POLL_S)
    return str(store.get(str(rank)).decode())


def advice(places: Iterable[str]) -> str:
    """What to do about ranks that are at these places, if that can be said."""
    waits = {place for place in places if place.startswith("waits in ") and not place.startswith("waits in no ")}
    if len(waits) < 2:
        return ""
    text = "Every rank must run the same modules in the same order."
    if not any(" of the values of " in wait for wait in waits):
        return text
    return (
        f"{text} Where ranks take different paths on purpose (experts), make the block that holds them a leaf: "
        "deepspeedlite.utils.set_z3_leaf_modules(model, [Class])"
    )
