"""Where a shard of stage 3 lives while nobody gathers it: the host's memory, or the disk.

`open` puts it behind the shard's tensor and `close` takes it away again; `fetch` begins to do what `open` will need.
`keep` makes what was changed behind the tensor last. A step writes past all this, by `piece` and `region`; what had
been fetched before is then `forget`-ed.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from deepspeedlite.offload.pinned import HostMemory
from deepspeedlite.offload.swap_file import DiskTensor, Region, StagingBuffer, SwapFile, padded


class Store(Protocol):
    """Where one shard lives. See the file's first lines."""

    def fetch(self) -> bool:
        """Begin to bring the shard, if that can be done without waiting for anything; whether it can."""

    def open(self) -> None:
        """Put the shard behind its tensor."""

    def close(self) -> None:
        """Take it away; changes are lost."""

    def keep(self) -> None:
        """Store what is behind the tensor."""

    def forget(self) -> None:
        """What was fetched is no longer what is stored."""

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """Elements of the shard: stored memory itself, or a tensor whose memory comes and goes with `region`."""

    def region(self, start: int, stop: int) -> Region | None:
        """Where on the disk these elements are; None where they are in memory."""

    def stored(self, start: int, stop: int) -> torch.Tensor | DiskTensor:
        """These elements as they are stored, to be read."""

    def outlast(self) -> Store:
        """A store with the same content that needs nothing of the engine's."""


class HostStore:
    """The host's memory."""

    def __init__(self, shard: torch.Tensor, memory: HostMemory) -> None:
        self._shard, self._device = shard, shard.device
        self._host = memory.empty(shard.numel(), shard.dtype)
        self.keep()
        self.close()

    def fetch(self) -> bool:
        """Nothing to do: the copy is started by `open`, in the stream that reads it."""
        return True

    def open(self) -> None:
        """Copy it to the device."""
        self._shard.data = torch.empty_like(self._host, device=self._device)
        self._shard.copy_(self._host, non_blocking=True)

    def close(self) -> None:
        """Free the device's copy."""
        self._shard.data = self._shard.new_empty(0)

    def keep(self) -> None:
        """Copy it back; the host may read it at once."""
        self._host.copy_(self._shard)

    def forget(self) -> None:
        """Nothing is fetched before `open`."""

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """The host's memory."""
        return self._host[start:stop]

    stored = piece

    def region(self, start: int, stop: int) -> None:
        """It is in memory."""

    def outlast(self) -> HostStore:
        """Itself."""
        return self


class BufferPool:
    """Slots that shards are read into, `count` of them; one more for each that must be opened when all are taken."""

    def __init__(self, swap_file: SwapFile, count: int) -> None:
        self.swap_file, self._count = swap_file, count
        self._idle = deque(swap_file.buffer() for _ in range(count))

    def take(self) -> StagingBuffer | None:
        """A buffer, if one is idle."""
        return self._idle.popleft() if self._idle else None

    def give(self, buffer: StagingBuffer) -> None:
        """It is idle again."""
        if len(self._idle) < self._count:
            self._idle.append(buffer)


class DiskStore:
    """A region of the disk."""

    def __init__(self, shard: torch.Tensor, pool: BufferPool) -> None:
        self._shard, self._pool = shard, pool
        self._region = pool.swap_file.reserve(shard.nbytes)
        self._buffer: StagingBuffer | None = None
        self._memory: torch.Tensor | None = None
        self.keep()
        self.close()

    def _start(self, buffer: StagingBuffer) -> None:
        buffer.begin(padded(self._region.nbytes))
        self._buffer, self._memory = buffer, buffer.take(self._region.nbytes)
        buffer.read(self._memory, self._region)

    def fetch(self) -> bool:
        """Start reading, if a buffer is idle."""
        if self._buffer is None and (buffer := self._pool.take()) is not None:
            self._start(buffer)
        return self._buffer is not None

    def open(self) -> None:
        """Wait for what was read."""
        self.fetch()
        if self._buffer is None:
            self._start(self._pool.swap_file.buffer())
        assert self._buffer is not None and self._memory is not None
        self._buffer.wait()
        self._shard.data = self._memory.view(self._shard.dtype).to(self._shard.device)

    def close(self) -> None:
        """Let another shard have the buffer."""
        self._shard.data = self._shard.new_empty(0)
        buffer, self._buffer, self._memory = self._buffer, None, None
        if buffer is not None:
            buffer.wait()
            self._pool.give(buffer)

    forget = close

    def keep(self) -> None:
        """Write it."""
        with self._pool.swap_file.borrowed_buffer() as buffer:
            buffer.write(self._shard.cpu(), self._region)
            buffer.wait()

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """A tensor without memory; a `SwappedRun` brings it."""
        return torch.empty(0, dtype=self._shard.dtype)

    def region(self, start: int, stop: int) -> Region:
        """Its place on the disk."""
        itemsize = self._shard.dtype.itemsize
        return Region(self._region.offset + start * itemsize, (stop - start) * itemsize)

    def stored(self, start: int, stop: int) -> DiskTensor:
        """What is on the disk."""
        return DiskTensor(self._pool.swap_file, self.region(start, stop), self._shard.dtype)

    def outlast(self) -> HostStore:
        """The host's memory: the disk goes with the engine."""
        self.open()
        kept = HostStore(self._shard, HostMemory(pinned=False))
        self.close()
        return kept
