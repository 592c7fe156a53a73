"""Reading and writing files beside the program: `aio_handle`, with DeepSpeed's methods.

    handle = aio_handle(intra_op_parallelism=4)
    buffer = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0))
    handle.async_pread(buffer, path)          # returns at once; the buffer must not be touched
    handle.wait()                             # raises what went wrong, with file, place and reason

The kernel moves blocks of a file, several at once: whole pages of the file past the page cache (O_DIRECT), through
another buffer where the given one is not aligned for that, and what is left at both ends through the cache. Its
io_uring does it, or its older native AIO where that is not to be had, or threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeedlite.ops import load
from deepspeedlite.runtime.device import on_accelerator
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.runtime.log import log_once

ALIGNMENT = 4096
ENGINES = ("io_uring", "aio", "threads")  # the best first
ENGINE_VARIABLE = "DSL_AIO_ENGINE"
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # x86-64's and most others'; Linux's number
_MOST_DEPTH, _MOST_THREADS = 4096, 64
File = str | os.PathLike[str] | int  # a path, or the descriptor of an open file


class _Request(NamedTuple):
    """One read or write under way, and what is to be done when it has ended. It keeps both tensors alive."""

    buffer: Tensor  # the caller's
    memory: Tensor  # what the kernel reads into or writes from: the buffer itself, or a contiguous copy on the CPU
    is_read: bool
    file: str
    file_offset: int
    validate: bool

    def finish(self) -> None:
        """Give the caller what was read; compare where that was asked for."""
        if self.validate:
            expected = self.memory.view(-1).view(torch.uint8).numpy()
            with open(self.file, "rb") as file:
                file.seek(self.file_offset)
                if file.read(len(expected)) != expected.tobytes():
                    raise OpError(f"async_io: {self.file} from byte {self.file_offset} on is not what the buffer holds")
        if self.is_read and self.memory.data_ptr() != self.buffer.data_ptr():
            self.buffer.detach().copy_(self.memory)


class pin_handle:  # noqa: N801  (DeepSpeed's name)
    """Memory for files that stays where it is: pages locked into memory where the limit allows."""

    def __init__(self) -> None:
        self._locked: dict[int, int] = {}  # bytes by address

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """A 1-D tensor of the example's dtype, at a page's beginning and locked into memory where the limit allows.

        One that has room for huge pages begins at one, and asks for them: the disk is then given few long pieces of
        memory instead of many short ones.
        """
        nbytes = num_elem * example_tensor.element_size()
        alignment = _HUGE_PAGE if nbytes >= _HUGE_PAGE else ALIGNMENT
        memory = torch.empty(nbytes + alignment, dtype=torch.uint8)
        start = -memory.data_ptr() % alignment
        tensor = memory[start : start + nbytes].view(example_tensor.dtype)
        libc = ctypes.CDLL(None, use_errno=True)
        if alignment == _HUGE_PAGE:  # it may be refused, and changes no result
            whole_bytes = nbytes // _HUGE_PAGE * _HUGE_PAGE
            libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(whole_bytes), _MADV_HUGEPAGE)
        if nbytes and libc.mlock(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes)) != 0:
            reason = os.strerror(ctypes.get_errno())
            log_once(f"memory for async_io is not locked ({reason}); raise the limit with ulimit -l to lock it")
        else:
            self._locked[tensor.data_ptr()] = nbytes
            weakref.finalize(tensor, _unlock, self._locked, tensor.data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Unlock what `new_cpu_locked_tensor` gave; whether it was locked. Its memory goes with its last view."""
        return _unlock(self._locked, tensor.data_ptr())

    def is_pinned(self, buffer: Tensor) -> bool:
        """Whether the buffer is one that `new_cpu_locked_tensor` locked, or is pinned for a GPU."""
        return buffer.data_ptr() in self._locked or buffer.is_pinned()


class aio_handle(pin_handle):  # noqa: N801  (DeepSpeed's name)
    """A queue of reads and writes, and what does them.

    Args:
        block_size: bytes that are moved at a time; in whole pages of 4096 bytes.
        queue_depth: blocks under way at a time, for each of the threads that follow; up to 4096. (64 of them with the
            engine "threads".)
        single_submit: give the kernel one block per call, not all there is room for.
        overlap_events: begin another block whenever one has ended, not when all under way have.
        intra_op_parallelism: threads that share the blocks, each with a queue of its own; up to 64.
        engine: "io_uring", "aio" (Linux's native AIO) or "threads"; without it what the variable `DSL_AIO_ENGINE` says,
            or else the first of these that there is.

    Raises:
        OpError: the op async_io or that engine cannot be had, a number is out of range, or (of all methods) the file
            cannot be opened or moved; the message names it.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        engine: str | None = None,
    ) -> None:
        limits = {
            "block_size": (block_size, 1 << 30),
            "queue_depth": (queue_depth, _MOST_DEPTH),
            "intra_op_parallelism": (intra_op_parallelism, _MOST_THREADS),
        }
        for name, (value, most) in limits.items():
            if not 1 <= value <= most:
                raise OpError(f"aio_handle: {name} must be at least 1 and at most {most}, got {value}")
        super().__init__()
        self._settings: dict[str, Any] = {name: value for name, (value, _) in limits.items()}
        self._settings |= {"single_submit": bool(single_submit), "overlap_events": bool(overlap_events)}
        self._handle = _open(*self._settings.values(), engine=engine)
        self._pid = os.getpid()
        self._under_way: list[_Request] = []
        self._end = weakref.finalize(self, _close, self._handle, self._pid)

    def get_engine(self) -> str:
        """What moves the blocks: "io_uring", "aio" or "threads"."""
        self._check_process()
        return str(load("aio_engine")(self._handle))

    def get_counts(self) -> dict[str, int]:
        """What was done so far: `blocks` begun, of them `direct` (past the page cache) and `bounced` (through another
        buffer), `submissions` (calls that began them), `peak_depth` (most under way at once in one queue).
        """
        self._check_process()
        return dict(zip(("blocks", "direct", "bounced", "submissions", "peak_depth"), load("aio_counts")(self._handle)))

    def close(self) -> None:
        """Wait for all requests and end the threads; what `wait` would have raised is lost. Happens to a dropped handle
        too. A closed one raises OpError.
        """
        self._end()
        self._under_way.clear()

    def get_block_size(self) -> int:
        """Bytes that are moved at a time."""
        return int(self._settings["block_size"])

    def get_queue_depth(self) -> int:
        """Blocks under way at a time, for each thread."""
        return int(self._settings["queue_depth"])

    def get_single_submit(self) -> bool:
        """Whether the kernel is given one block per call."""
        return bool(self._settings["single_submit"])

    def get_overlap_events(self) -> bool:
        """Whether another block is begun whenever one has ended."""
        return bool(self._settings["overlap_events"])

    def get_intra_op_parallelism(self) -> int:
        """Threads that share the blocks."""
        return int(self._settings["intra_op_parallelism"])

    def get_alignment(self) -> int:
        """Bytes that a buffer should be a multiple of, for each thread to have whole pages: they go past the page
        cache.
        """
        return ALIGNMENT * self.get_intra_op_parallelism()

    # --- requests; all of `buffer` is read or written, by way of a copy unless it is contiguous and on the CPU --------

    def async_pread(self, buffer: Tensor, filename: File, file_offset: int = 0) -> int:
        """Start filling the buffer from the file at a byte offset; 0. It is filled when `wait` has returned."""
        return self._submit(buffer, filename, file_offset, is_read=True)

    def async_pwrite(self, buffer: Tensor, filename: File, file_offset: int = 0) -> int:
        """Start writing the buffer to the file, which is made (for its owner alone) where it is not there; 0."""
        return self._submit(buffer, filename, file_offset, is_read=False)

    def sync_pread(self, buffer: Tensor, filename: File, file_offset: int = 0) -> int:
        """`async_pread` and `wait`."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Tensor, filename: File, file_offset: int = 0) -> int:
        """`async_pwrite` and `wait`."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def pread(self, buffer: Tensor, filename: File, validate: bool, async_op: bool, file_offset: int = 0) -> int:
        """A read, waited for unless `async_op`; what `wait` returns, or 0. With `validate` the file is read a second
        time, the ordinary way, and compared when the read has ended.
        """
        self._submit(buffer, filename, file_offset, is_read=True, validate=validate)
        return 0 if async_op else self.wait()

    def pwrite(self, buffer: Tensor, filename: File, validate: bool, async_op: bool, file_offset: int = 0) -> int:
        """A write, waited for unless `async_op`; what `wait` returns, or 0. With `validate` the file is read back, the
        ordinary way, and compared when the write has ended.
        """
        self._submit(buffer, filename, file_offset, is_read=False, validate=validate)
        return 0 if async_op else self.wait()

    def read(self, buffer: Tensor, filename: File, validate: bool, file_offset: int = 0) -> int:
        """`pread` that is waited for; 0."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer: Tensor, filename: File, validate: bool, file_offset: int = 0) -> int:
        """`pwrite` that is waited for; 0."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0

    def wait(self) -> int:
        """Wait for all requests; how many there were since the last time.

        Raises:
            OpError: one has failed, with the first failure; all have ended nevertheless. Or a file is not what a
                buffer holds, where `validate` was asked for.
        """
        self._check_process()
        done, self._under_way = self._under_way, []  # what another thread submits meanwhile stays for its own wait
        try:
            count = int(load("aio_wait")(self._handle))
        except RuntimeError as error:
            raise OpError(f"async_io: {_text(error)}") from error
        for request in done:
            request.finish()
        return count

    def _submit(self, buffer: Tensor, file: File, file_offset: int, is_read: bool, validate: bool = False) -> int:
        self._check_process()
        path = f"/proc/self/fd/{file}" if isinstance(file, int) else os.fspath(file)
        if buffer.is_meta or file_offset < 0:
            raise OpError(
                f"async_io of {path}: the buffer must have memory and the offset not be negative; got one of shape "
                f"{tuple(buffer.shape)} on {buffer.device} and {file_offset}"
            )
        memory = buffer.detach()
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            memory = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=on_accelerator(buffer))
            if not is_read:
                memory.copy_(buffer.detach())
        try:
            load("aio_read" if is_read else "aio_write")(self._handle, memory, path, file_offset)
        except RuntimeError as error:
            raise OpError(f"async_io: {_text(error)}") from error
        self._under_way.append(_Request(buffer, memory, is_read, path, file_offset, validate))
        return 0

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise OpError("an aio_handle cannot be used in a forked child, which has none of its threads; make one")
        if not self._end.alive:
            raise OpError("this aio_handle is closed; make another one")


def aio_read(
    buffer: Tensor,
    filename: File,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """One `aio_handle.read` by a handle of its own; 0."""
    with contextlib.closing(aio_handle(block_size, queue_depth, single_submit, overlap_events)) as handle:
        return handle.read(buffer, filename, validate)


def aio_write(
    buffer: Tensor,
    filename: File,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """One `aio_handle.write` by a handle of its own; 0."""
    with contextlib.closing(aio_handle(block_size, queue_depth, single_submit, overlap_events)) as handle:
        return handle.write(buffer, filename, validate)


def deepspeed_memcpy(dest: Tensor, src: Tensor) -> int:
    """Copy a tensor into another of as many elements and the same dtype; 0."""
    dest.view(-1).copy_(src.reshape(-1))
    return 0


def _open(*settings: Any, engine: str | None) -> int:
    """The native handle; says once why it is not the best engine, unless another one was asked for."""
    wanted = engine or os.environ.get(ENGINE_VARIABLE, "")
    if wanted and wanted not in ENGINES:
        source = "engine" if engine else ENGINE_VARIABLE
        raise OpError(f"aio_handle: {source} must be one of {', '.join(ENGINES)}, got {wanted!r}")
    open_engine = load("aio_open")
    try:
        handle = int(open_engine(wanted, *settings))
    except RuntimeError as error:
        remedy = f"; without {ENGINE_VARIABLE} and engine, one that works is taken" if wanted else ""
        raise OpError(f"async_io cannot be had here: {_text(error)}{remedy}") from error
    if refused := load("aio_refused")(handle):
        log_once(f"async_io uses {load('aio_engine')(handle)}, since others cannot be had here: {refused}")
    return handle


def _unlock(locked: dict[int, int], address: int) -> bool:
    nbytes = locked.pop(address, None)
    if nbytes is not None:
        ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    return nbytes is not None


def _close(handle: int, pid: int) -> None:
    if os.getpid() == pid:
        load("aio_close")(handle)


def _text(error: RuntimeError) -> str:
    """The message of torch's error without the place in our sources and the stack that it adds."""
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).split("\nException raised from")[0].strip())
