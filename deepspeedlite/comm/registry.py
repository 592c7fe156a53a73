"""What this process keeps for communication, in one place that can be closed: see `Registry`."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeedlite.comm.transport import Transport, Work


class Wait(NamedTuple):
    """What a thread waits in, and the ranks that must come there."""

    what: str
    ranks: Sequence[int]
    is_told: bool = True  # False: whoever waits says so by itself


class Watch(Protocol):
    """Who looks at what this process and the other ranks wait in: `metrics.stall_watch`."""

    def lasts(self) -> bool:
        """Whether it is this process's, and the world that it watches still is."""

    def condition(self, rank: int) -> str:
        """`has ended` or `is stopped`, if that is known of a rank; else empty."""

    def seen(self, rank: int) -> str:
        """Where a rank is, if that is known without asking; else empty."""

    def close(self) -> None:
        """Stop looking."""


class Registry:
    """Transports by process group, what each thread waits in, and the watch over both; one for the process."""

    def __init__(self) -> None:
        # Training writes these two at every wait, and only the watch's thread reads them.
        self.waits: dict[int, Wait | None] = {}  # by thread
        self.last: Wait | None = None  # the collective that was begun last
        self._watch: Watch | None = None  # of torch.distributed's world, as long as that lasts
        # Finished collectives of gloo's that Python holds on to, also after `close`: see the note on the interpreter's
        # end in `comm.init`.
        self.kept: deque[Work] = deque(maxlen=2)
        # These two last as long as the process: what was a store of rank 0's may be another start-up's, which must not
        # meet the keys of the one before it.
        self.stores: dict[tuple[str, int, int, bool, float], dist.Store] = {}
        self.starts: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)  # by the store's address
        # Weak keys: a process group that torch has destroyed takes its transport along, and a world its store.
        self._worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.Store] = weakref.WeakKeyDictionary()
        self._transports: weakref.WeakKeyDictionary[dist.ProcessGroup, Transport] = weakref.WeakKeyDictionary()

    def transport(
        self, process_group: dist.ProcessGroup | None, make: Callable[[dist.ProcessGroup | None], Transport]
    ) -> Transport:
        """The one of a process group (None: the world), made the first time."""
        key = process_group or dist.distributed_c10d._get_default_group()
        if key not in self._transports:
            self._transports[key] = make(process_group)
        return self._transports[key]

    def use_store(self, store: dist.Store) -> None:
        """Have this one for the world that has begun."""
        self._worlds[dist.distributed_c10d._get_default_group()] = store

    @property
    def store(self) -> dist.Store:
        """Where the world's ranks leave words for each other."""
        own = self._worlds.get(dist.distributed_c10d._get_default_group())
        return dist.distributed_c10d._get_default_store() if own is None else own

    def use_watch(self, watch: Watch) -> None:
        """Ask this one from now on."""
        self._watch = watch

    @property
    def watch(self) -> Watch | None:
        """The watch of this world, if there is one."""
        return self._watch if self._watch is not None and self._watch.lasts() else None

    def condition(self, rank: int) -> str:
        """See `Watch.condition`."""
        return self.watch.condition(rank) if self.watch is not None else ""

    def seen(self, rank: int) -> str:
        """See `Watch.seen`."""
        return self.watch.seen(rank) if self.watch is not None else ""

    def close(self) -> None:
        """End all of it, with torch.distributed; what is asked for later is made anew."""
        if self._watch is not None:
            self._watch.close()
        transports, self._transports = list(self._transports.values()), weakref.WeakKeyDictionary()
        for transport in transports:
            transport.close()
        self._watch, self.last = None, None
        self.waits.clear()


registry = Registry()
