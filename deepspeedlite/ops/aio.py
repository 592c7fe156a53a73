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

import ctypes
import os
import re
import weakref
from typing import Any

import torch
from torch import Tensor

from deepspeedlite.ops import load
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.runtime.log import log_once

ALIGNMENT = 4096
ENGINES = ("io_uring", "aio", "threads")  # the best first
ENGINE_VARIABLE = "DSL_AIO_ENGINE"
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # x86-64's and most others'; Linux's number
_MOST_DEPTH, _MOST_THREADS = 4096, 64


class aio_handle:  # noqa: N801  (DeepSpeed's name)
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
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
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
        self._settings: dict[str, Any] = {name: value for name, (value, _) in limits.items()}
        self._settings |= {"single_submit": bool(single_submit), "overlap_events": bool(overlap_events)}
        self._handle = _open(*self._settings.values(), engine=engine)
        self._pid = os.getpid()
        self._kept: list[Tensor] = []  # buffers of requests under way
        self._locked: dict[int, int] = {}  # bytes by address
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
        self._kept.clear()

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
        """Bytes; what lies between two multiples in a file goes past the page cache."""
        return ALIGNMENT

    # --- requests; `buffer` is a contiguous CPU tensor, all of which is read or written ------------------------------

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Start filling the buffer from the file at a byte offset; 0."""
        return self._submit("aio_read", buffer, filename, file_offset)

    def async_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Start writing the buffer to the file, which is made (for its owner alone) where it is not there; 0."""
        return self._submit("aio_write", buffer, filename, file_offset)

    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """`async_pread` and `wait`."""
        self.async_pread(buffer, filename, file_offset)
        return self.wait()

    def sync_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """`async_pwrite` and `wait`."""
        self.async_pwrite(buffer, filename, file_offset)
        return self.wait()

    def pread(self, buffer: Tensor, filename: str, validate: bool, async_op: bool, file_offset: int = 0) -> int:
        """A read, waited for unless `async_op`; `validate` reads a second time, the ordinary way, and compares."""
        self.async_pread(buffer, filename, file_offset)
        return 0 if async_op else self._finish(buffer, filename, validate, file_offset)

    def pwrite(self, buffer: Tensor, filename: str, validate: bool, async_op: bool, file_offset: int = 0) -> int:
        """A write, waited for unless `async_op`; `validate` reads it back, the ordinary way, and compares."""
        self.async_pwrite(buffer, filename, file_offset)
        return 0 if async_op else self._finish(buffer, filename, validate, file_offset)

    def read(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """`pread` that is waited for."""
        return self.pread(buffer, filename, validate, False, file_offset)

    def write(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """`pwrite` that is waited for."""
        return self.pwrite(buffer, filename, validate, False, file_offset)

    def wait(self) -> int:
        """Wait for all requests; how many there were since the last time.

        Raises:
            OpError: one has failed, with the first failure; all have ended nevertheless.
        """
        self._check_process()
        kept, self._kept = self._kept, []  # what another thread submits meanwhile stays for its own wait
        try:
            return int(load("aio_wait")(self._handle))
        except RuntimeError as error:
            raise OpError(f"async_io: {_text(error)}") from error
        finally:
            kept.clear()

    def _submit(self, op: str, buffer: Tensor, filename: str, file_offset: int) -> int:
        self._check_process()
        if buffer.device.type != "cpu" or not buffer.is_contiguous() or file_offset < 0:
            raise OpError(
                f"async_io of {filename}: the buffer must be a contiguous tensor on the CPU and the offset not "
                f"negative; got one of shape {tuple(buffer.shape)} on {buffer.device} and {file_offset}"
            )
        try:
            load(op)(self._handle, buffer.detach(), os.fspath(filename), file_offset)
        except RuntimeError as error:
            raise OpError(f"async_io: {_text(error)}") from error
        self._kept.append(buffer)
        return 0

    def _finish(self, buffer: Tensor, filename: str, validate: bool, file_offset: int) -> int:
        done = self.wait()
        if validate:
            memory = buffer.detach().view(-1).view(torch.uint8)
            with open(filename, "rb") as file:
                file.seek(file_offset)
                found = file.read(memory.numel())
            if len(found) != memory.numel() or bytes(memory.numpy()) != found:
                raise OpError(f"async_io: {filename} from byte {file_offset} on is not what the buffer holds")
        return done

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise OpError("an aio_handle cannot be used in a forked child, which has none of its threads; make one")
        if not self._end.alive:
            raise OpError("this aio_handle is closed; make another one")

    # --- memory that stays where it is ----------------------------------------------------------------------------

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
