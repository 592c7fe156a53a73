"""Who waits where: what a rank says when a collective fails because the ranks do not meet in it.

A collective that some rank never calls ends, after the process group's timeout, in torch's error, which tells neither
what was to be moved nor what the others were doing. Here every rank that fails leaves a note in the job's store, reads
the others' notes for a few seconds, and raises one error with all of them.

This is for gloo. On NCCL the failing collective is found by torch's watchdog thread, which ends the process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from deepspeedlite.errors import DistributedError

_OTHERS_SPEAK_S = 5.0


class LabelledWork:
    """A collective under way that can say what it is."""

    def __init__(self, work: Any, what: str, ranks: Sequence[int]) -> None:
        self._work, self._what, self._ranks = work, what, ranks

    def wait(self) -> Any:
        """Wait for completion.

        Raises:
            DistributedError: it failed or timed out; the message says where every rank was.
        """
        with explained(self._what, self._ranks):
            return self._work.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def explained(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Turn a failure inside into a DistributedError that says where every rank was; this one waits in `what`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise DistributedError(_explain(what, ranks, str(error))) from error


@contextlib.contextmanager
def whereabouts(note: str) -> Iterator[None]:
    """Let other ranks' errors say where this one is, while it waits for them outside of a collective, or has failed."""
    store = _notes()
    store.set(str(dist.get_rank()), note)
    yield
    store.delete_key(str(dist.get_rank()))


def _notes() -> Any:
    return dist.PrefixStore("deepspeedlite/stalled", dist.distributed_c10d._get_default_store())


def _explain(what: str, ranks: Sequence[int], reason: str) -> str:
    me = dist.get_rank()
    notes = dict.fromkeys(ranks, "has not said where it is: it has ended, or is busy elsewhere")
    notes[me] = f"waits in {what}"
    with contextlib.suppress(RuntimeError):
        store = _notes()
        store.set(str(me), notes[me])
        deadline = time.monotonic() + _OTHERS_SPEAK_S
        for rank in ranks:
            left = max(0.1, deadline - time.monotonic())
            with contextlib.suppress(RuntimeError):
                store.wait([str(rank)], timedelta(seconds=left))
                notes[rank] = store.get(str(rank)).decode()
    lines = "\n".join(f"  rank {rank} {note}" for rank, note in notes.items())
    return (
        f"the ranks do not meet in a collective ({reason.splitlines()[0][:200]}):\n{lines}\n"
        "Every rank must run the same modules in the same order. Where ranks take different paths on purpose "
        "(experts), make the block that holds them a leaf: deepspeedlite.utils.set_z3_leaf_modules(model, [Class])"
    )
