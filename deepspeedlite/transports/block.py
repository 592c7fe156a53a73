"""Memory of a rank that others of its host map: it has no name, and goes with the last process that maps it."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import torch

_MADV_REMOVE = 9  # from Linux's mman-common.h: free the pages of a shared mapping, which then reads as zeros


class Block:
    """Memory of this rank that others read."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.fd = os.memfd_create("deepspeedlite")
        os.ftruncate(self.fd, nbytes)
        self._mapping = map_memory(self.fd, nbytes)
        self.memory = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        self.known_to: set[int] = set()
        self.unread: set[tuple[int, int]] = set()  # message and rank that has not said that it has read it
        self.touched_nbytes = 0  # how far it was written, which is what has memory
        self._shared: weakref.ref[memoryview] | None = None

    def alloc_shared(self, nbytes: int) -> torch.Tensor:
        """Its first bytes, as a tensor; the block is not idle while any tensor of that memory is left."""
        # torch holds on to the view, and the view to the mapping, so the view lives as long as the memory is used.
        view = memoryview(self._mapping)[:nbytes]
        self._shared = weakref.ref(view)
        self.touched_nbytes = max(self.touched_nbytes, nbytes)
        return torch.frombuffer(view, dtype=torch.uint8)

    @property
    def shared_nbytes(self) -> int:
        view = None if self._shared is None else self._shared()
        return 0 if view is None else view.nbytes

    @property
    def is_shared(self) -> bool:
        return self.shared_nbytes > 0

    @property
    def is_idle(self) -> bool:
        return not self.unread and not self.is_shared

    def give_back(self) -> None:
        """Let the kernel have the memory until the block is written again."""
        address, nbytes = ctypes.c_void_p(self.address), ctypes.c_size_t(self.memory.numel())
        if ctypes.CDLL(None).madvise(address, nbytes, _MADV_REMOVE) == 0:
            self.touched_nbytes = 0


def map_memory(fd: int, nbytes: int) -> Any:
    """A file's memory, which the object returned keeps mapped. Python's own mmap would keep a descriptor too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes that ranks of this host share")
    buffer = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(buffer, libc.munmap, address, nbytes)
    return buffer
