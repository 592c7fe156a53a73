"""A shard of values in the swap file, and the buffers that such shards are read into ahead of their use."""

from __future__ import annotations

from collections import deque

import torch

from deepspeedlite.offload.pinned import HostMemory
from deepspeedlite.offload.store import VALUES, HostStore, Store
from deepspeedlite.offload.swap_file import Region, StagingBuffer, SwapFile, padded
from deepspeedlite.offload.swapped_run import SwappedRun


class BufferPool:
    """Buffers that shards are read into, `count` of them; one more for each that must be opened when all are taken."""

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


class DiskStore(Store):
    """A shard in the swap file."""

    is_here = False

    def __init__(self, shard: torch.Tensor, pool: BufferPool) -> None:
        self._shard, self._pool = shard, pool
        self._region = pool.swap_file.reserve(shard.nbytes)
        self._buffer: StagingBuffer | None = None  # what the shard is being read into, or is in
        self._memory = torch.empty(0, dtype=torch.uint8)  # its part of the buffer
        self.keep()
        self.close()

    def _start(self, buffer: StagingBuffer) -> StagingBuffer:
        buffer.begin(padded(self._region.nbytes))
        self._buffer, self._memory = buffer, buffer.take(self._region.nbytes)
        buffer.read(self._memory, self._region)
        return buffer

    def fetch(self) -> bool:
        """Start reading, if a buffer is idle."""
        if self._buffer is None and (buffer := self._pool.take()) is not None:
            self._start(buffer)
        return self._buffer is not None

    def open(self) -> None:
        """Wait for what was read."""
        buffer = self._buffer or self._start(self._pool.take() or self._pool.swap_file.buffer())
        buffer.wait()
        self._shard.data = self._memory.view(self._shard.dtype).to(self._shard.device)

    def close(self) -> None:
        """Let another shard have the buffer."""
        self._shard.data = self._shard.new_empty(0)
        buffer, self._buffer, self._memory = self._buffer, None, self._memory.new_empty(0)
        if buffer is not None:
            buffer.wait()
            self._pool.give(buffer)

    forget = close

    def keep(self) -> None:
        """Write it."""
        with self._pool.swap_file.borrowed_buffer() as buffer:
            buffer.write(self._shard.cpu(), self._region)
            buffer.wait()

    def values(self, shard: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A tensor without memory."""
        return torch.empty(0, dtype=shard.dtype)

    def region(self, start: int, stop: int) -> Region:
        """Their place in the file."""
        itemsize = self._shard.dtype.itemsize
        return Region(self._region.offset + start * itemsize, (stop - start) * itemsize)

    def of_run(self, start: int, stop: int, values: torch.Tensor) -> SwappedRun:
        """It has the values' place in the file."""
        return SwappedRun(self._pool.swap_file, lambda: {VALUES: values}, {VALUES: self.region(start, stop)})

    def outlast(self) -> HostStore:
        """The host's memory: the file goes with the engine."""
        self.open()
        kept = HostStore(self._shard, HostMemory(pinned=False))
        self.close()
        return kept
