"""Where tensors live between their uses: one `Store` for a shard of values, and one for each run that is stepped.

    Store        where they are used: nothing comes or goes, and every call does nothing
    HostStore    a shard of values in the host's memory, while the device's is for those of other layers
    DiskStore    a shard of values in the swap file (disk_store.py)
    SwappedRun   what a step of one run reads and writes, in the swap file (swapped_run.py)

`fetch` begins to bring what `open` will put behind the tensors, and `close` takes it away again. `keep` makes what was
changed behind the tensors last. A step writes past a shard's store, by `values` and `region`; what had been fetched
before is then `forget`-ed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepspeedlite.offload.pinned import HostMemory
from deepspeedlite.offload.swap_file import DiskTensor, Region

# What a run's tensors are called in its store; a state's own name follows the prefix.
VALUES, MASTER, STATE = "values", "master", "state "


class Store:
    """Tensors that live where they are used; what lives elsewhere overrides it. See the file's first lines."""

    is_here = True  # whether the tensors are in the memory of the device that uses them

    def fetch(self) -> bool:
        """Begin to bring them, if that can be done without waiting for anything; whether it can."""
        return True

    def open(self) -> None:
        """Put them behind their tensors."""

    def close(self) -> None:
        """Take them away; changes are lost."""

    def keep(self) -> None:
        """Store what is behind the tensors."""

    def forget(self) -> None:
        """What was fetched is no longer what is stored."""

    def values(self, shard: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Elements of a shard as a step writes them: stored memory itself, or a tensor that a `SwappedRun` fills."""
        return shard[start:stop]

    def region(self, start: int, stop: int) -> Region | None:
        """Where in the swap file these elements of a shard are; None where they are in memory."""
        return None

    def of_run(self, start: int, stop: int, values: torch.Tensor) -> Store:
        """The store of these elements of a shard, whose `values` nothing steps."""
        return Store()

    def stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor | DiskTensor:
        """One of the tensors as it is stored, to be read."""
        return tensor

    def outlast(self) -> Store:
        """A store with the same content that needs nothing of the engine's."""
        return self

    @contextmanager
    def opened(self, write: bool = False) -> Iterator[None]:
        """They are behind their tensors inside; `write`: and changed there, so that they are stored again."""
        try:
            self.open()
            yield
            if write:
                self.keep()
        finally:
            self.close()


class HostStore(Store):
    """A shard in the host's memory."""

    is_here = False

    def __init__(self, shard: torch.Tensor, memory: HostMemory) -> None:
        self._shard, self._device = shard, shard.device
        self._host = memory.empty(shard.numel(), shard.dtype)
        self.keep()
        self.close()

    def open(self) -> None:
        """Copy it to the device, in the stream that reads it: there is nothing for `fetch` to do."""
        self._shard.data = torch.empty_like(self._host, device=self._device)
        self._shard.copy_(self._host, non_blocking=True)

    def close(self) -> None:
        """Free the device's copy."""
        self._shard.data = self._shard.new_empty(0)

    def keep(self) -> None:
        """Copy it back; the host may read it at once."""
        self._host.copy_(self._shard)

    def values(self, shard: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The host's memory."""
        return self._host[start:stop]
