"""Files that `torch.save` is given: DeepSpeed's `FastFileWriter`, `PyFileWriter` and `MockFileWriter`.

    handle = AsyncIOBuilder().load().aio_handle()
    memory = handle.new_cpu_locked_tensor(64 << 20, torch.empty(0, dtype=torch.uint8))
    with FastFileWriter(path, FastFileWriterConfig(handle, memory)) as file:
        torch.save(state, file)

The fast one collects what it is given in the memory and has async_io write it past the page cache; with two halves of
the memory one is filled while the other is written. `close` returns when all of it is on the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspeedlite.runtime.errors import OpError
from deepspeedlite.runtime.log import logger

_SIZE = np.dtype(np.int64)  # how many elements a storage has, before its bytes, where that is asked for
Bytes = bytes | bytearray | memoryview
Storages = Sequence[tuple[torch.UntypedStorage, torch.dtype]]


class FileWriter:
    """What the three have in common, and what they count: calls, bytes and seconds, by DeepSpeed's names."""

    def __init__(self, file_path: str | os.PathLike[str]) -> None:
        self._file_path = os.fspath(file_path)
        self._stats: dict[str, float] = dict.fromkeys(("write", "flush", "fileno", "close", "bytes", "write_secs"), 0)
        self._file = open(self._file_path, "wb")  # noqa: SIM115  (`close` closes it)

    def file_path(self) -> str:
        """The path it was given."""
        return self._file_path

    def write(self, buffer: Bytes) -> int:
        """Take all of the buffer; its bytes."""
        if self._file.closed:
            raise ValueError(f"{self._file_path} is closed")
        started_s, nbytes = time.monotonic(), self._take(buffer)
        self._stats["write"] += 1
        self._stats["bytes"] += nbytes
        self._stats["write_secs"] += time.monotonic() - started_s
        return nbytes

    def flush(self) -> None:
        """Counted; what is collected here stays here until `close`."""
        self._stats["flush"] += 1

    def fileno(self) -> int:
        """-1: who writes to the descriptor would overtake what is collected here."""
        self._stats["fileno"] += 1
        return -1

    def close(self) -> None:
        """Finish the file: when this returns it is on the disk, and so is its name. May be called again.

        Raises:
            OSError: the disk did not take it, or (FastFileWriter) OpError.
        """
        self._stats["close"] += 1
        if not self._file.closed:
            with self._file:
                self._finish()

    def _take(self, buffer: Bytes) -> int:
        raise NotImplementedError

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        folder = os.open(os.path.dirname(os.path.abspath(self._file_path)), os.O_RDONLY)
        try:
            os.fsync(folder)  # a new file's name is in it
        finally:
            os.close(folder)

    def _dump_state(self) -> None:
        seconds = self._stats["write_secs"]
        rate = self._stats["bytes"] / seconds / (1 << 30) if seconds else 0.0
        logger.info("%s", self._stats | {"path": self._file_path, "write_GB/s": rate})

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_file" not in vars(self) or self._file.closed:
            return
        try:
            self.close()
        except (OSError, OpError) as error:
            logger.error("%s was dropped before it was closed, and is incomplete: %s", self._file_path, error)


class PyFileWriter(FileWriter):
    """A plain file."""

    def _take(self, buffer: Bytes) -> int:
        return self._file.write(buffer)

    def flush(self) -> None:
        """Hand what is collected to the system."""
        super().flush()
        self._file.flush()


class MockFileWriter(FileWriter):
    """An empty file: counts what it is given, and writes none of it."""

    def __init__(self, file_path: str | os.PathLike[str]) -> None:
        super().__init__(file_path)
        self._stats |= {"save_storage": 0, "save_storage_bytes": 0}

    def save_torch_storage_object_list(self, storage_obj_list: Storages, save_size: bool) -> int:
        """Count storages; their bytes, and those of their sizes where `save_size`."""
        total_bytes = 0
        for piece in _pieces(storage_obj_list, save_size):
            total_bytes += self.write(piece.data)
        self._stats["save_storage"] += len(storage_obj_list)
        self._stats["save_storage_bytes"] += total_bytes
        return total_bytes

    def _take(self, buffer: Bytes) -> int:
        return memoryview(buffer).nbytes


@dataclass
class FastFileWriterConfig:
    """How a `FastFileWriter` writes.

    Attributes:
        dnvme_handle: an `aio_handle`, or what has its async_pwrite, wait and get_alignment.
        pinned_tensor: memory on the CPU, best from the handle's `new_cpu_locked_tensor`; a multiple of the alignment.
        double_buffer: fill one half of it while the other is written.
        num_parallel_writers: writers that share the storages given to `save_torch_storage_object_list`, each into a
            file of its own: in order, these files are what one writer would have written.
        writer_rank: which of them this one is.
        global_rank: of the process; only told.
    """

    dnvme_handle: Any
    pinned_tensor: Tensor
    double_buffer: bool = True
    num_parallel_writers: int = 1
    writer_rank: int = 0
    global_rank: int = 0


class FastFileWriter(FileWriter):
    """Collects what is written in memory of its own, which async_io writes while more is collected.

    A failed write (a full disk) is raised by the `write`, or at the latest by the `close`, that finds it; a file of
    which one has failed takes no more.

    Raises:
        OpError: the memory is not a multiple of the handle's alignment (of each half, with two); (of `write`, `close`)
            the disk did not take it.
        OSError: the file cannot be opened.
    """

    def __init__(self, file_path: str | os.PathLike[str], config: FastFileWriterConfig) -> None:
        memory = config.pinned_tensor.detach().view(-1).view(torch.uint8)
        halves = memory.chunk(2) if config.double_buffer else (memory,)
        alignment = config.dnvme_handle.get_alignment()
        if not memory.numel() or any(half.numel() % alignment for half in halves):
            raise OpError(
                f"FastFileWriter of {os.fspath(file_path)}: the pinned tensor must have a multiple of "
                f"{alignment * len(halves)} bytes, got {memory.numel()}"
            )
        if not 0 <= config.writer_rank < config.num_parallel_writers:
            raise OpError(f"writer_rank {config.writer_rank} is none of {config.num_parallel_writers} parallel writers")
        super().__init__(file_path)
        self._config = config
        self._halves = halves
        self._current = 0  # the half that is being filled
        self._filled_bytes = 0  # of that half
        self._file_offset = 0  # where in the file it begins
        self._is_writing = False  # whether the other half is
        self._failed = ""
        self._stats |= dict.fromkeys(("aio_bytes", "aio_write_secs", "save_storage", "save_storage_bytes"), 0)

    def save_torch_storage_object_list(self, storage_obj_list: Storages, save_size: bool) -> int:
        """Write this writer's share of the storages one after the other, each after its number of elements where
        `save_size` (8 bytes; so `torch.save` did before it wrote zip files); the bytes of the share.
        """
        config = self._config
        total_bytes = sum(storage.nbytes() + save_size * _SIZE.itemsize for storage, _ in storage_obj_list)
        share, larger = divmod(total_bytes, config.num_parallel_writers)
        begin = config.writer_rank * share + min(config.writer_rank, larger)
        end = begin + share + (config.writer_rank < larger)
        position = 0
        for piece in _pieces(storage_obj_list, save_size):
            mine = piece[max(begin - position, 0) : max(end - position, 0)]
            position += len(piece)
            if len(mine):
                self.write(mine.data)
        self._stats["save_storage"] += len(storage_obj_list)
        self._stats["save_storage_bytes"] += end - begin
        return end - begin

    def _take(self, buffer: Bytes) -> int:
        if self._failed:
            raise OpError(self._failed)
        rest = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
        nbytes = len(rest)
        while len(rest):
            half = self._halves[self._current].numpy()
            taken_bytes = min(len(half) - self._filled_bytes, len(rest))
            half[self._filled_bytes : self._filled_bytes + taken_bytes] = rest[:taken_bytes]
            rest = rest[taken_bytes:]
            self._filled_bytes += taken_bytes
            if self._filled_bytes == len(half):
                self._drain()
        return nbytes

    def _drain(self) -> None:
        """Begin to write what is collected, and go on with memory that nobody reads any more."""
        self._wait()
        memory = self._halves[self._current][: self._filled_bytes]
        self._of_handle("async_pwrite", memory, self._file.fileno(), self._file_offset)
        self._is_writing = True
        self._stats["aio_bytes"] += self._filled_bytes
        self._file_offset += self._filled_bytes
        self._filled_bytes = 0
        self._current = (self._current + 1) % len(self._halves)
        if len(self._halves) == 1:
            self._wait()

    def _wait(self) -> None:
        if self._is_writing:
            self._is_writing = False
            started_s = time.monotonic()
            self._of_handle("wait")
            self._stats["aio_write_secs"] += time.monotonic() - started_s

    def _of_handle(self, method: str, *args: Any) -> None:
        try:
            getattr(self._config.dnvme_handle, method)(*args)
        except OpError as error:
            self._failed = f"{self._file_path} is incomplete: {error}"
            raise OpError(self._failed) from error

    def _finish(self) -> None:
        try:
            if self._filled_bytes and not self._failed:
                self._drain()
        finally:
            self._wait()
        if self._failed:
            raise OpError(self._failed)
        super()._finish()


def _pieces(storages: Storages, save_size: bool) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The bytes of storages, each after those of its number of elements where `save_size`."""
    for storage, dtype in storages:
        if save_size:
            yield np.array([storage.nbytes() // dtype.itemsize], dtype=_SIZE).view(np.uint8)
        yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy()
