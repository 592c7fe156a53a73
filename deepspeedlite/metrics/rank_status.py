"""Where every rank is, told through the job's store once some rank has waited long.

A rank that waits puts up a question; every rank looks for one now and then and, while there is one, writes down its own
status. The keys are overwritten, nothing is written while nobody asks, and a rank that waits for the same as one with a
lower number leaves it to that one to read all answers. What cannot answer is looked for as a process, on the same host.

This has a thread of its own, with its own connection to the store: an operation takes for good when rank 0, which
usually hosts the store, is stopped, and that is one of the things to be said.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.distributed as dist

from deepspeedlite.comm.registry import Wait
from deepspeedlite.runtime.process_record import ProcessRecord

_ASKED = "asked"
_LEFT = b"left"
_SILENT_ROUNDS = 3  # without a new word, and an answer is no longer taken for where a rank is now
_ALL_KNOWN = 64
_FIRST_ROUND_S = 0.5  # after which all ranks have said which processes they are


class RankStatus(NamedTuple):
    """Where a rank is."""

    waits_in: str | None = None
    for_s: float = 0.0
    at: str = ""  # of its Python code
    last: str = ""  # collective that was begun
    sees: Mapping[str, str] = MappingProxyType({})  # which other ranks of its host have ended, or are stopped


def _is_file(store: dist.Store) -> bool:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return isinstance(store, dist.FileStore)


class StatusBoard(threading.Thread):
    """One rank's side of it.

    Args:
        store: the job's.
        rank: this process's number.
        size: how many ranks there are.
        period_s: how often to look for questions and answers.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, period_s: float) -> None:
        super().__init__(name="deepspeedlite: tells where this rank is", daemon=True)
        self._store, self._rank, self._period_s = store, rank, period_s
        self._process = ProcessRecord.here()
        self._prefix("who").set(str(rank), self._process.model_dump_json())
        self._over = threading.Event()
        self._is_left = False
        self._token = ""
        self._rounds = itertools.count()
        self._heard: dict[int, tuple[int, float, RankStatus]] = {}  # number of the answer, when it came, what it says
        self._left: set[int] = set()
        self._told: dict[str, str] = {}  # by rank, what others have seen of it
        self._processes: dict[int, ProcessRecord] = {}
        # In time: rank 0 hosts the store, as a rule, and a failure leaves no time to ask who it was.
        self._known = range(size) if size <= _ALL_KNOWN else range(1)
        self.status = RankStatus()
        """Where this rank is; its watch keeps it."""
        self.question: Wait | None = None
        """What this rank waits in, once it asks the others."""
        self.is_spoken_for = False
        """Whether a rank with a lower number waits for the same, and so says it."""
        self.heard_s = time.monotonic()
        """When the store last answered."""

    def _prefix(self, what: str) -> Any:
        return dist.PrefixStore(f"deepspeedlite/status/{what}", self._store)

    def run(self) -> None:
        """Until `leave` or `end`."""
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            self._store = self._store.clone()  # type: ignore[attr-defined]  # stubs lack it
            if _is_file(self._store):  # removed with its job as a rule, and then waited for, with a look every 10 ms
                self._store.set_timeout(timedelta(seconds=self._period_s))
        pause_s = min(self._period_s, _FIRST_ROUND_S)
        while not self._over.wait(pause_s):
            pause_s = self._period_s
            with contextlib.suppress(RuntimeError):
                self._round()
                self.heard_s = time.monotonic()
        if self._is_left:
            with contextlib.suppress(RuntimeError):
                self._prefix("at").set(str(self._rank), _LEFT)

    def end(self) -> None:
        """Stop."""
        self._over.set()

    def leave(self) -> None:
        """Stop, and let others know that this rank has ended."""
        self._is_left = True
        self._over.set()

    def _round(self) -> None:
        asks, answers = self._prefix("asks"), self._prefix("at")
        question = self.question
        for rank in self._known:
            self._look_up(rank)
        if question is None:
            if self._token:
                asks.delete_key(_ASKED)
                self._token, self._heard, self._told = "", {}, {}
        elif not self._token or not asks.check([_ASKED]):
            self._token = f"{self._rank}.{next(self._rounds)}"
            asks.set(_ASKED, self._token)
        if not asks.check([_ASKED]):
            return
        token = asks.get(_ASKED).decode()
        seen = {str(rank): seen for rank in list(self._processes) if (seen := self._look_at(rank))}
        answers.set(str(self._rank), json.dumps([token, next(self._rounds), self.status._replace(sees=seen)]))
        if question is not None:
            self.is_spoken_for = self._read(answers, token, question)

    def _read(self, answers: Any, token: str, question: Wait) -> bool:
        """Take in what others say; whether one says what this rank would."""
        told: dict[str, str] = {}
        for rank in question.ranks:
            if rank == self._rank:
                continue
            answer = answers.get(str(rank)) if answers.check([str(rank)]) else None
            if answer == _LEFT:
                self._left.add(rank)
            elif answer is not None:
                asked, number, status = json.loads(answer)
                if asked == token and self._heard.get(rank, (-1,))[0] != number:
                    self._heard[rank] = number, time.monotonic(), RankStatus(*status)
                there = self.of(rank)
                if rank < self._rank and there is not None and there.waits_in == question.what:
                    return True
                told.update(there.sees if there is not None else {})
            self._look_up(rank)
        self._told = told
        return False

    def _look_up(self, rank: int) -> None:
        who = self._prefix("who")
        if rank not in self._processes and who.check([str(rank)]):
            self._processes[rank] = ProcessRecord.model_validate_json(who.get(str(rank)))

    def of(self, rank: int) -> RankStatus | None:
        """Where a rank has said it is, if it has lately."""
        _, heard_s, status = self._heard.get(rank, (0, -1e9, None))
        return status if heard_s > time.monotonic() - _SILENT_ROUNDS * self._period_s else None

    def condition(self, rank: int) -> str:
        """`has ended`, `is stopped` and the like, as far as can be known; else empty."""
        if rank in self._left:
            return "has ended"
        return self._look_at(rank) or self._told.get(str(rank), "")

    def _look_at(self, rank: int) -> str:
        process = self._processes.get(rank)
        state = process.state() if process is not None and process.is_near else None
        if process is None or state is None:
            return ""
        if state == "":
            return "has ended"
        by = f"process {process.pid} on {process.host}: by SIGSTOP, SIGTSTP or a debugger"
        return f"is stopped ({by})" if state in "Tt" else ""

    def silence_s(self, rank: int) -> float | None:
        """How long a rank has said nothing; None if it never has."""
        return time.monotonic() - self._heard[rank][1] if rank in self._heard else None
