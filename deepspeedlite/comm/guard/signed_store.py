"""A store of which only those who know the job's secret can read names, or write a value that is believed.

The store that ranks meet in is torch's, and whoever reaches its port may read, write and list it. So a key goes there
under a name that only the secret gives, which nobody can claim before it is there; and a value with a signature over
its key, a random number and itself (HMAC-SHA256). What is not signed counts as not there: it is waited past, and
written over.

Counters are values too: torch's server would add to what anybody wrote, so `add` and `append` are a read and a
compare-and-set, again until it holds. By the random number who has set something knows it from the same value of
another's.

What this does not do: values are not hidden; somebody who lists the names may delete or overwrite what is there, which
ends a start with an error or stops it, or put back an older value of the same key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from deepspeedlite.runtime.env import JOB_SECRET
from deepspeedlite.runtime.log import logger

_SIGNATURE_NBYTES, _RANDOM_NBYTES = 32, 8
_LOOKS_AGAIN_S = 0.05


def signed(store: dist.Store) -> dist.Store:
    """The store, over which what is written is signed if our launcher has given this process the job's secret."""
    secret = os.environ.get(JOB_SECRET, "")
    return SignedStore(store, secret) if secret else store


def for_backend(store: dist.Store, backend: str) -> dist.Store:
    """What torch gets of a part of a store: that part, but for NCCL an unsigned one, under a name that only we know.

    NCCL's threads look into it as long as the process lives. One that waits for the interpreter's lock while that ends
    is unwound through C++ that does not expect it, and the process aborts.
    """
    below = store.underlying_store if isinstance(store, dist.PrefixStore) else None
    if "nccl" not in backend or not isinstance(below, SignedStore):
        return store
    return dist.PrefixStore(store.compare_set("for NCCL", "", secrets.token_hex(16)).decode(), below.inner)


class SignedStore(dist.Store):
    """A store over another one.

    torch's C++ calls the methods by the names that they have here; some have two, one for Python's callers.
    """

    timeout: timedelta  # torch's own

    def __init__(self, inner: Any, secret: str) -> None:
        super().__init__()
        self._inner, self._secret = inner, secret  # untyped: torch's stubs lack half of what a store has
        self._keyed = hmac.new(secret.encode(), digestmod=hashlib.sha256)  # copied for each: a third of the time
        self._clones: list[SignedStore] = []  # torch holds on to the C++ part of one alone, which is nothing by itself
        self._is_warned = False
        self.set_timeout(self._inner.timeout)

    @property
    def inner(self) -> dist.Store:
        """The one below."""
        return self._inner

    def _digest(self, *parts: bytes) -> bytes:
        digest = self._keyed.copy()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    def _name(self, key: str) -> str:
        return self._digest(b"name", key.encode()).hex()[:32]

    def _signed(self, key: str, value: bytes | str) -> bytes:
        rest = secrets.token_bytes(_RANDOM_NBYTES) + (value.encode() if isinstance(value, str) else value)
        return self._digest(b"value", key.encode(), rest) + rest

    def _believed(self, key: str, found: bytes) -> bytes | None:
        """The value; None where there is none that was signed."""
        rest = found[_SIGNATURE_NBYTES:]
        if hmac.compare_digest(found[:_SIGNATURE_NBYTES], self._digest(b"value", key.encode(), rest)):
            return rest[_RANDOM_NBYTES:]
        if found and not self._is_warned:
            self._is_warned = True
            logger.warning("something else than this job writes to its store; what is not signed is ignored")
        return None

    # Values

    def set(self, key: str, value: bytes | str) -> None:
        """Write."""
        self._inner.set(self._name(key), self._signed(key, value))

    def get(self, key: str) -> bytes:
        """Wait for a value and give it.

        Raises:
            DistStoreError: none came in time, or none that was signed.
        """
        late_at = time.monotonic() + self.timeout.total_seconds()
        self._inner.set_timeout(self.timeout)
        while (value := self._believed(key, self._inner.get(self._name(key)))) is None:
            if time.monotonic() > late_at:
                raise dist.DistStoreError(f"what is there for {key} is not signed: something else writes to this store")
            time.sleep(_LOOKS_AGAIN_S)
        return value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Wait for several values."""
        found = self._inner.multi_get([self._name(key) for key in keys])
        values = [self._believed(key, value) for key, value in zip(keys, found)]
        return [self.get(key) if value is None else value for key, value in zip(keys, values)]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        """Write several values."""
        signed = [self._signed(key, value) for key, value in zip(keys, values)]
        self._inner.multi_set([self._name(key) for key in keys], signed)

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Write where the value is the expected one (empty: where there is none); the value that is there now."""
        wanted = expected.encode() if isinstance(expected, str) else expected
        name, new = self._name(key), self._signed(key, desired)
        found = self._inner.get(name) if wanted and self._inner.check([name]) else b""
        while (value := self._believed(key, found) or b"") == wanted:
            now = self._inner.compare_set(name, found, new)
            if now == new:
                return self._believed(key, new) or b""
            found = now
        return value

    def _change(self, key: str, change: Callable[[bytes], bytes]) -> bytes:
        """Replace a value (empty: none) by what `change` makes of it, and give that."""
        name, found = self._name(key), b""  # torch's server tells what there is, where it is not what was expected
        while True:
            value = change(self._believed(key, found) or b"")
            new = self._signed(key, value)
            now = self._inner.compare_set(name, found, new)
            if now == new:
                return value
            found = now

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and give what it is then."""
        return int(self._change(key, lambda value: b"%d" % (int(value or b"0") + amount)))

    def append(self, key: str, value: bytes | str) -> None:
        """Write behind what is there."""
        end = value.encode() if isinstance(value, str) else value
        self._change(key, lambda start: start + end)

    # Keys: who does not know the secret does not know a name either, so what has one was written by the job

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are there."""
        return self._inner.check([self._name(key) for key in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all are there."""
        self._inner.wait([self._name(key) for key in keys], self.timeout if timeout is None else timeout)

    def delete_key(self, key: str) -> bool:
        """Remove a value; whether it was there."""
        return self._inner.delete_key(self._name(key))

    def deleteKey(self, key: str) -> bool:  # noqa: N802
        """See `delete_key`."""
        return self.delete_key(key)

    def num_keys(self) -> int:
        """How many there are, of others too."""
        return self._inner.num_keys()

    def getNumKeys(self) -> int:  # noqa: N802
        """See `num_keys`."""
        return self.num_keys()

    def has_extended_api(self) -> bool:
        """Whether there are `append`, `multi_get` and `multi_set`."""
        return True

    def clone(self) -> SignedStore:
        """The same over a connection of its own."""
        self._clones.append(SignedStore(self._inner.clone(), self._secret))
        return self._clones[-1]
