"""Meetings: a call that a user may make on one rank alone finds out, within seconds, whether the other ranks come too.

A gather that one rank starts and another never joins waits for the process group's time limit, or pairs up with the
gather of something else. So calls that are made outside of the training loop, such as `state_dict()`, meet in the job's
store first. Nothing is communicated by a rank that is left alone.

[Note: who has met]
Per call and group there is one counter. Whoever comes adds one to it; the one that makes it a multiple of the group's
size is the last and opens the door, a key of that meeting's number. A rank that has waited long enough takes its one
back by a compare-and-set, which fails if anybody came meanwhile: so a rank cannot leave a meeting that is complete, and
nobody is paired with one that has left. A late rank finds the place empty and waits for the next meeting of that name.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from deepspeedlite.log import logger

PATIENCE_S = 5.0
"""How long a rank waits for the others."""
_NOTICE_S = 2.0  # after this it says so
_PAUSES_S = (0.001, 0.1)  # between two looks at the door: at first, at last


def meet(ranks: Sequence[int], call: str, key: str) -> list[int]:
    """Wait until every rank has made this call, but no longer than `PATIENCE_S`.

    Args:
        ranks: the ranks that are to come, this one among them.
        call: what the user calls, for the log.
        key: tells it from every other call; the same on all ranks.

    Returns:
        the ranks that have not come; none if all have. If any, this rank has withdrawn.
    """
    me = dist.get_rank()
    others = [rank for rank in ranks if rank != me]
    name = hashlib.sha256(f"{list(ranks)} {key}".encode()).hexdigest()[:16]
    store = dist.PrefixStore(f"deepspeedlite/meet/{name}", dist.distributed_c10d._get_default_store())
    try:
        come = store.add("come", 1)
        meeting = (come - 1) // len(ranks) + 1
        if come == meeting * len(ranks):
            store.set(f"open {meeting}", "")
            store.delete_key(f"open {meeting - 1}")  # all who waited for that one are here
            return []
        store.set(str(me), f"{meeting} {time.time()}")
        if _opens(store, f"open {meeting}", call, others) or not _withdraw(store, meeting * len(ranks)):
            return []
        return [rank for rank in others if not _came(store, rank, meeting)] or others
    except RuntimeError as error:  # the store has gone, and with it the rank that holds it
        logger.debug("the job's store does not answer: %s", error)
        return others


def _opens(store: Any, door: str, call: str, others: Sequence[int]) -> bool:
    start, pause_s, said = time.monotonic(), _PAUSES_S[0], False
    while not store.check([door]):
        waited_s = time.monotonic() - start
        if waited_s > PATIENCE_S:
            return False
        if waited_s > _NOTICE_S and not said:
            said = True
            shown = ", ".join(map(str, others[:8])) + (" ..." if len(others) > 8 else "")
            logger.warning("%s waits for rank %s, up to %.0f s more", call, shown, PATIENCE_S - waited_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSES_S[1])
    return True


def _withdraw(store: Any, complete: int) -> bool:
    """Take this rank's one back, unless the meeting is complete."""
    while (come := int(store.get("come"))) < complete:
        if store.compare_set("come", str(come), str(come - 1)).decode() == str(come - 1):
            return True
    return False


def _came(store: Any, rank: int, meeting: int) -> bool:
    """Whether a rank has come to this meeting lately; it may have left again, for the same reason as this one."""
    said = store.get(str(rank)).decode().split() if store.check([str(rank)]) else ["0", "0"]
    return int(said[0]) == meeting and float(said[1]) > time.time() - 2 * PATIENCE_S
