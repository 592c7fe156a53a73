"""A call that a user may make on one rank alone finds out, within seconds, whether the other ranks come too.

A gather that one rank starts and another never joins waits for the process group's time limit, or pairs up with the
gather of something else. So calls that are made outside of the training loop, such as `state_dict()` and
`save_checkpoint()`, meet in the job's store first. Nothing is communicated by a rank that is left alone, and none waits
longer for one that has ended.

[Note: who is present]
Per call and group there is one counter. Whoever comes adds one to it; the one that makes it a multiple of the group's
size is the last and opens the door, a key of that meeting's number. A rank that has waited long enough takes its one
back by a compare-and-set, which fails if anybody came meanwhile: so a rank cannot leave a meeting that is complete, and
nobody is paired with one that has left. A late rank finds nobody and waits for the next meeting of that name.

[Note: who waits where]
Ranks may wait for each other in different meetings: one asks for a part's state dict by itself, while the others have
gone on to a call of all. Every rank says where it is; one that sees another in a weightier call leaves at once, and
the two meet when it comes there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from deepspeedlite.comm.registry import registry
from deepspeedlite.runtime.log import logger

PATIENCE_S = 5.0
"""How long a rank waits for the others."""
LEFT_ALONE_S = 1.0
"""How long where they did not come the last time."""
_NOTICE_S = 2.0  # after this it says so
_PAUSES_S = (0.001, 0.1)  # between two looks at the door, the shortest and the longest
_LOOKED_AT = 8  # ranks whose whereabouts are read


def absent_ranks(
    ranks: Sequence[int],
    call: str,
    key: str,
    weight: int = 0,
    patience_s: float | None = None,
    notice_s: float | None = None,
) -> list[int]:
    """Wait until every rank has made this call, but no longer than `patience_s`, or `PATIENCE_S`.

    Args:
        ranks: the ranks that are to come, this one among them.
        call: what the user calls, for the log.
        key: tells it from every other call; the same on all ranks.
        weight: of two calls that wait for each other, the lighter one is given up.
        patience_s: how long to wait.
        notice_s: after how long it is said that this rank waits.

    Returns:
        the ranks that have not come; none if all have. If any, this rank has withdrawn.
    """
    name = f"{_short(str(list(ranks)))}/{_short(key)}"
    times_s = (PATIENCE_S if patience_s is None else patience_s, _NOTICE_S if notice_s is None else notice_s)
    try:
        return _RollCall(ranks, call, (weight, name), *times_s).join()
    except RuntimeError as error:  # the store has gone, and with it the rank that holds it
        logger.debug("the job's store does not answer: %s", error)
        return [rank for rank in ranks if rank != dist.get_rank()]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _RollCall:
    """One rank's coming to a call."""

    def __init__(
        self, ranks: Sequence[int], call: str, position: tuple[int, str], patience_s: float, notice_s: float
    ) -> None:
        self._size, self._me, self._call, self._position = len(ranks), dist.get_rank(), call, position
        self._patience_s, self._notice_s = patience_s, notice_s
        self._others = [rank for rank in ranks if rank != self._me]
        group = position[1].split("/")[0]
        self._store: Any = dist.PrefixStore(f"deepspeedlite/roll_call/{position[1]}", registry.store)
        self._positions: Any = dist.PrefixStore(f"deepspeedlite/roll_call/{group}/at", registry.store)

    def join(self) -> list[int]:
        """See `absent_ranks`."""
        come = self._store.add("come", 1)
        number = (come - 1) // self._size + 1
        if come == number * self._size:
            self._store.set(f"open {number}", "")
            self._store.delete_key(f"open {number - 1}")  # all who waited for that one are here
            return []
        self._store.set(str(self._me), f"{number} {time.time()}")
        self._positions.set(str(self._me), "{} {}".format(*self._position))
        opened = self._opens(number) or not self._withdraw(number * self._size)
        self._positions.set(str(self._me), "")
        return [] if opened else self._missing(number) or self._others

    def _opens(self, number: int) -> bool:
        start, pause_s, notice_s = time.monotonic(), _PAUSES_S[0], self._notice_s
        while not self._store.check([f"open {number}"]):
            waited_s = time.monotonic() - start
            if waited_s > self._patience_s or self._is_outweighed():
                return False
            if pause_s == _PAUSES_S[1] and any(
                registry.condition(rank) == "has ended" for rank in self._missing(number)
            ):
                return False
            if waited_s > notice_s:
                notice_s = self._patience_s
                shown = ", ".join(map(str, self._missing(number)[:8]))
                left_s = self._patience_s - waited_s
                logger.warning(
                    "%s waits for rank %s, up to %.0f s more; all ranks must call it", self._call, shown, left_s
                )
            time.sleep(pause_s)
            # Looked at soon after it opens, however long that takes, and seldom where it takes long.
            pause_s = min(max(_PAUSES_S[0], waited_s / 10), _PAUSES_S[1])
        return True

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in self._others if not self._came(rank, number)]

    def _is_outweighed(self) -> bool:
        """Whether another rank waits in a weightier call, and so will not come here first."""
        for rank in self._others[:_LOOKED_AT]:
            said = self._positions.get(str(rank)).decode().split() if self._positions.check([str(rank)]) else []
            if said and (int(said[0]), said[1]) > self._position:
                return True
        return False

    def _withdraw(self, complete: int) -> bool:
        """Take this rank's one back, unless the meeting is complete."""
        while (come := int(self._store.get("come"))) < complete:
            if self._store.compare_set("come", str(come), str(come - 1)).decode() == str(come - 1):
                return True
        return False

    def _came(self, rank: int, number: int) -> bool:
        """Whether a rank has come to this meeting lately; it may have left again, for the same reason as this one."""
        said = self._store.get(str(rank)).decode().split() if self._store.check([str(rank)]) else ["0", "0"]
        return int(said[0]) == number and float(said[1]) > time.time() - 2 * self._patience_s
