"""A file of this rank's own on a fast disk, and buffers: the memory through which tensors pass to and from it.

    file    | region of a tensor | region | ...        regions begin at pages, and never move
    buffer  | page-aligned, locked memory |            a queue of its own: waiting for it waits for nothing else

[Note: a file without a name]
The file is unlinked as soon as it is open, and opened again by way of /proc/self/fd. So no other run can meet it,
nobody can remove or shrink it by its name, and the disk gets its space back when this process ends, however it ends.

[Note: room]
A region is allocated on the disk before it is written. A disk that is too small is noticed when a tensor is given its
region, in `initialize` or in the first step, and not while a later step replaces what it needs.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepspeedlite.ops.aio import ALIGNMENT, aio_handle
from deepspeedlite.runtime.errors import OffloadError, OpError

_READ_NBYTES = 1 << 23  # of a stored tensor that is read piece by piece


class Region(NamedTuple):
    """Bytes `[offset, offset + nbytes)` of the file."""

    offset: int
    nbytes: int


def padded(nbytes: int) -> int:
    """Bytes in whole pages."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class SwapFile:
    """The file and its regions.

    Args:
        directory: on the disk; it must exist.
        aio: keyword arguments of `aio_handle`, for every buffer.
        locked: lock the buffers' memory, as far as the limit allows.

    Raises:
        OffloadError: the directory cannot be used.
    """

    def __init__(self, directory: str | Path, aio: Mapping[str, Any] | None = None, locked: bool = True) -> None:
        self.directory = Path(directory)
        self.locked = locked
        self._aio = dict(aio or {})
        self.nbytes = 0
        # Not set while a checkpoint in the background reads what is here: writes wait for it.
        self.has_been_read = threading.Event()
        self.has_been_read.set()
        self._file = _open_unnamed(self.directory)  # closed, and so gone, with the last buffer that moves its bytes
        self._spare: StagingBuffer | None = None

    @property
    def path(self) -> str:
        """By which this process opens the file."""
        return f"/proc/self/fd/{self._file.number}"

    def close(self) -> None:
        """Give the disk its space back. Buffers that are still there cannot be used any more."""
        self._file.close()

    def reserve(self, nbytes: int) -> Region:
        """A region, and room on the disk for it.

        Raises:
            OffloadError: there is none.
        """
        region = Region(self.nbytes, nbytes)
        try:
            if nbytes:
                os.posix_fallocate(self._file.number, region.offset, padded(nbytes))
        except OSError as error:
            left = os.statvfs(self.directory)
            raise OffloadError(
                f"{self.directory} has no room for {nbytes / 2**20:,.0f} MiB more ({error.strerror}; this rank has "
                f"{self.nbytes / 2**30:.2f} GiB there, {left.f_bavail * left.f_frsize / 2**30:.2f} GiB are free): make "
                "room, give another nvme_path, or offload less"
            ) from error
        self.nbytes += padded(nbytes)
        return region

    def buffer(self) -> StagingBuffer:
        """A new buffer."""
        return StagingBuffer(self)

    @contextmanager
    def borrowed_buffer(self) -> Iterator[StagingBuffer]:
        """A buffer for what happens now and then."""
        buffer, self._spare = self._spare or self.buffer(), None
        try:
            yield buffer
        finally:
            self._spare = buffer

    def new_handle(self) -> aio_handle:
        """What moves bytes for a buffer."""
        try:
            return aio_handle(**self._aio)
        except OpError as error:
            raise OffloadError(f"offloading to {self.directory} needs async_io: {error}") from error

    def explain(self, error: OpError) -> OffloadError:
        """What went wrong with a read or write, with the directory for the file's name."""
        text = str(error).replace(self.path, f"this rank's file in {self.directory}")
        full = os.strerror(errno.ENOSPC) in text
        remedy = "make room there" if full else "look at the disk (dmesg), or give another nvme_path"
        return OffloadError(f"{text}; {remedy}, and go on from the last checkpoint")


class _File:
    """A file descriptor that is closed when nobody has it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):  # at the interpreter's end `os` may be gone, and the file soon is
            self.close()


def _open_unnamed(directory: Path) -> _File:
    """A new file, readable by this user alone, that has no name."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise OffloadError(f"nvme_path {directory} {what}: make a directory on the fast disk, and name it")
    try:
        fd, name = tempfile.mkstemp(prefix=".deepspeedlite-", dir=directory)  # 0600
        os.unlink(name)
    except OSError as error:
        raise OffloadError(
            f"nvme_path {directory} cannot be written to ({error.strerror}): give this user a directory there"
        ) from error
    return _File(fd)


class StagingBuffer:
    """Memory that tensors lie in between a read and a write, used for one thing at a time.

    buffer.begin(nbytes); memory = buffer.take(n); buffer.read(memory, region); buffer.wait()
    """

    def __init__(self, swap_file: SwapFile) -> None:
        self._swap_file = swap_file
        self._handle = swap_file.new_handle()
        self._memory = torch.empty(0, dtype=torch.uint8)  # grows to the largest use, and stays: pages faulted in once
        self._used = 0  # bytes that `take` has given out in this use

    def begin(self, nbytes: int) -> None:
        """A new use, of this many bytes in whole pages. What was taken before must not be used any more."""
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)
            example = torch.empty(0, dtype=torch.uint8)
            if self._swap_file.locked:
                self._memory = self._handle.new_cpu_locked_tensor(nbytes, example)
            else:
                memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
                start = -memory.data_ptr() % ALIGNMENT
                self._memory = memory[start : start + nbytes]
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """The next bytes of the memory, from a page's beginning on."""
        memory = self._memory[self._used : self._used + nbytes]
        self._used += padded(nbytes)
        return memory

    def read(self, memory: torch.Tensor, region: Region) -> None:
        """Start filling the memory (contiguous, of the region's size) from the file."""
        self._submit(self._handle.async_pread, memory, region)

    def write(self, memory: torch.Tensor, region: Region) -> None:
        """Start writing the memory to the file; it must not change before `wait`."""
        self._swap_file.has_been_read.wait()
        self._submit(self._handle.async_pwrite, memory, region)

    def _submit(self, how: Any, memory: torch.Tensor, region: Region) -> None:
        if memory.nbytes != region.nbytes:
            raise OffloadError(f"a tensor of {memory.nbytes} bytes does not fit its {region.nbytes} on the disk")
        if region.nbytes == 0:
            return
        try:
            how(memory, self._swap_file.path, region.offset)
        except OpError as error:
            raise self._swap_file.explain(error) from error

    def wait(self) -> None:
        """Return when everything started here is done.

        Raises:
            OffloadError: something failed; all the rest has ended nevertheless.
        """
        try:
            self._handle.wait()
        except OpError as error:
            raise self._swap_file.explain(error) from error


@dataclass(frozen=True)
class DiskTensor:
    """A 1-D tensor that is on the disk: what a checkpoint is given in place of a tensor in memory."""

    swap_file: SwapFile
    region: Region
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def numel(self) -> int:
        """How many elements it has."""
        return self.region.nbytes // self.dtype.itemsize

    @property
    def shape(self) -> tuple[int]:
        """Of one dimension."""
        return (self.numel(),)

    def __getitem__(self, part: slice) -> DiskTensor:
        start, stop, _ = part.indices(self.numel())
        region = Region(self.region.offset + start * self.itemsize, max(0, stop - start) * self.itemsize)
        return DiskTensor(self.swap_file, region, self.dtype)

    def pieces(self, nbytes: int = _READ_NBYTES) -> Iterator[torch.Tensor]:
        """Its content from the beginning on, in pieces that are valid until the next one. From any thread."""
        buffer = self.swap_file.buffer()
        for start in range(0, self.region.nbytes, nbytes):
            region = Region(self.region.offset + start, min(nbytes, self.region.nbytes - start))
            buffer.begin(padded(nbytes))
            memory = buffer.take(region.nbytes)
            buffer.read(memory, region)
            buffer.wait()
            yield memory.view(self.dtype)
