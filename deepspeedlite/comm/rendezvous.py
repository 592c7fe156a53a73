"""How the ranks of a job find each other before the first collective, and what is said when they do not.

Rank 0 hosts a TCP key-value store; the others connect. Each rank checks in under its number with its host, process
id and idea of the world size. Rank 0 waits until all are there, then releases everyone, so a job either starts
whole or every rank that came raises the same `DistributedError`: the ranks that did not come, two processes that
claim one rank, or ranks that disagree on the world size. torch's own start-up says only that a timeout passed.

Waiting costs rank 0 one request per missing rank and round, and the others a single blocking wait.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from deepspeedlite.comm.guard.tcp_store import first_line
from deepspeedlite.comm.registry import registry
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.log import logger

_POLL_S = 0.05
_STILL_WAITING_EVERY_S = 30.0
_FAREWELL_S = 2.0  # how long rank 0 keeps the store open for others to read why the start failed
_VERDICT_MARGIN_S = 3.0  # ranks other than 0 wait this much longer, so that rank 0's verdict comes first
_NAMED_RANKS = 16


def join(store: dist.Store, address: str, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Check in at `store` and return, once all ranks are there, a fresh part of it for the process group.

    Args:
        store: reached by every rank; hosted by rank 0 or by the launcher.
        address: names the store; the same on every rank.
        rank: this process's number, 0 <= rank < world_size.
        world_size: how many must come.
        timeout_s: how long the last rank may be behind the first.

    Raises:
        DistributedError: on every rank that came, when the world is not complete and consistent in time.
    """
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(registry.starts[address])}"
    entries = dist.PrefixStore(f"deepspeedlite/{attempt}/check_in", store)
    try:
        verdict = _check_in(entries, rank, world_size, timeout_s)
    except DistributedError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        why = f"rank {rank}: something else than this job's ranks writes to its store at {address} ({error!r})"
        raise DistributedError(f"{why}; start it with deepspeedlite, or choose another MASTER_PORT") from error
    except RuntimeError as error:  # torch's store errors
        raise DistributedError(
            f"rank {rank} of {world_size} lost the connection to rank 0's store while waiting for the other ranks; "
            f"rank 0 has probably ended, see its output ({first_line(error)})"
        ) from error
    if verdict:
        raise DistributedError(f"rank {rank}: {verdict}")
    return dist.PrefixStore(f"deepspeedlite/{attempt}/group", store)


def _check_in(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Claim this rank, then wait for rank 0's verdict: empty when all is well."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "world_size": world_size, "token": uuid.uuid4().hex}
    mine = json.dumps(me)
    holder = store.compare_set(f"rank/{rank}", "", mine).decode()
    if holder != mine:
        other = json.loads(holder)
        fault = f"two processes claim rank {rank}: {_named(other)} and {_named(me)}; give each process its own RANK"
        store.set("fault", fault)
        return fault
    if rank == 0:
        return _host(store, world_size, timeout_s)
    try:
        store.wait(["verdict"], timedelta(seconds=timeout_s + _VERDICT_MARGIN_S))
    except dist.DistStoreError:
        return _verdict_without_rank_0(store, me, timeout_s)
    verdict = store.get("verdict").decode()
    store.add("read", 1)
    return verdict or _disagreement(store, me)


def _host(store: dist.Store, world_size: int, timeout_s: float) -> str:
    """Rank 0's part: wait for all ranks, compare what they say, and tell them."""
    verdict = _await_ranks(store, world_size, timeout_s) or _compare(store, range(world_size))
    store.set("verdict", verdict)
    if verdict:
        present = [rank for rank in range(1, world_size) if store.check([f"rank/{rank}"])]
        deadline = time.monotonic() + _FAREWELL_S
        while store.add("read", 0) < len(present) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    return verdict


def _await_ranks(store: dist.Store, world_size: int, timeout_s: float) -> str:
    started = time.monotonic()
    next_word_s = _STILL_WAITING_EVERY_S
    missing = list(range(world_size))
    while True:
        missing = [rank for rank in missing if not store.check([f"rank/{rank}"])]
        waited_s = time.monotonic() - started
        if store.check(["fault"]):
            return store.get("fault").decode()
        if not missing:
            return ""
        if waited_s >= timeout_s:
            mismatch = _compare(store, sorted(set(range(world_size)) - set(missing)))
            did_not = f"{_ranks(missing)} of {world_size} did not arrive within {timeout_s:g} s"
            return mismatch or f"{did_not}; see the output of those ranks, and check that they were started"
        if waited_s >= next_word_s:
            next_word_s += _STILL_WAITING_EVERY_S
            logger.warning(f"still waiting for {_ranks(missing)} of {world_size} after {waited_s:.0f} s")
        time.sleep(_POLL_S)


def _compare(store: dist.Store, present: Sequence[int]) -> str:
    """What is wrong when ranks were started with different world sizes; empty when they agree."""
    by_size: dict[int, list[int]] = {}
    for rank in present:
        said = json.loads(store.get(f"rank/{rank}"))
        by_size.setdefault(said["world_size"], []).append(rank)
    if len(by_size) <= 1:
        return ""
    views = "; ".join(f"{size} on {_ranks(ranks)}" for size, ranks in sorted(by_size.items()))
    return f"the ranks disagree on the world size: {views}. Start all with the same WORLD_SIZE"


def _disagreement(store: dist.Store, me: Mapping[str, Any]) -> str:
    """The fault of a rank that rank 0 did not count on: it let its own world start without this one."""
    zero = json.loads(store.get("rank/0"))
    if zero["world_size"] == me["world_size"]:
        return ""
    return (
        f"the ranks disagree on the world size: rank 0 says {zero['world_size']}, this one {me['world_size']}. "
        "Start all with the same WORLD_SIZE"
    )


def _verdict_without_rank_0(store: dist.Store, me: Mapping[str, Any], timeout_s: float) -> str:
    """Why no verdict came: rank 0 is late itself (the store is torchrun's or a file), or it died while waiting."""
    if store.check(["rank/0"]):
        return _disagreement(store, me) or f"rank 0 checked in but gave no sign for {timeout_s:g} s; see its output"
    missing = [rank for rank in range(me["world_size"]) if not store.check([f"rank/{rank}"])]
    return (
        f"{_ranks(missing)} of {me['world_size']} did not arrive within {timeout_s:g} s; see the output of those ranks"
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED_RANKS]))
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _named(who: Mapping[str, Any]) -> str:
    return f"process {who['pid']} on {who['host']}"
