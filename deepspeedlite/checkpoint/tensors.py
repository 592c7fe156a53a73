"""Safetensors files, written and read in one pass with their checksum.

The layout is the published one (github.com/huggingface/safetensors, "Format"): eight bytes of header length, a JSON
header, the data. The safetensors library wants all tensors in one buffer and tells neither checksum nor file
descriptor, so the few lines that lay the file out are here: tensors are written from where they lie, a checksum is
taken of what is written, the file is fsynced, and ranges are read straight into the memory that they are for.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.files import open_regular, parse_json
from deepspeedlite.offload.swap_file import DiskTensor
from deepspeedlite.runtime.errors import CheckpointError

try:
    from zlib_ng.zlib_ng import crc32  # the same sum, by carry-less multiplication: six times as fast
except ImportError:
    from zlib import crc32

CODES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_CODE_OF = {dtype: code for code, dtype in CODES.items()}
_CHUNK_NBYTES = 1 << 23  # copied from a device at a time
_PIECE_NBYTES = 1 << 20  # written or read at a time: what the checksum has read, the copy finds in the cache
_BEHIND_NBYTES = 1 << 24  # written before the disk is told to begin
_MOST_HEADER_NBYTES = 100_000_000  # the format's own limit


# What comes of data that are not what they should be.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class FileRecord(NamedTuple):
    """Size in bytes and CRC-32 (as in zlib and gzip) of a whole file."""

    nbytes: int
    crc32: int


class TensorInfo(NamedTuple):
    """Where a tensor's data begins in its file, in bytes, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(tensors: Mapping[str, torch.Tensor | DiskTensor]) -> bytes:
    entries: dict[str, Any] = {}
    cursor = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODE_OF:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        end = cursor + tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": _CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | DiskTensor], fsync: bool = True) -> FileRecord:
    """Write a new safetensors file. Tensors on a device or a disk are brought to memory a chunk at a time.

    Raises:
        CheckpointError: a dtype that the format does not know.
        OSError: what the system says.
    """
    header = _header(tensors)
    file = _Out(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), fsync)
    try:
        file.write(memoryview(header))
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(bytes_of(piece))
        if fsync:
            os.fsync(file.fd)
    finally:
        os.close(file.fd)
    return FileRecord(file.nbytes, file.crc)


def _pieces(tensor: torch.Tensor | DiskTensor) -> Iterator[torch.Tensor]:
    """What a tensor holds, from its beginning on, in pieces in memory."""
    if isinstance(tensor, DiskTensor):
        yield from tensor.pieces(_CHUNK_NBYTES)
        return
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK_NBYTES // flat.itemsize)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu()


class _Out:
    """A file that is written from its beginning on, with its checksum.

    [Note: write-behind] The kernel would keep what is written until fsync asks for it, and the disk would stand still
    until then. Where there will be an fsync, `sync_file_range` has the disk begin with each range while the next one
    is summed and copied; it promises nothing, and the fsync stays.
    """

    def __init__(self, fd: int, to_disk: bool) -> None:
        self.fd, self.nbytes, self.crc = fd, 0, 0
        self._begun_nbytes = 0 if to_disk and _sync_file_range is not None else sys.maxsize

    def write(self, data: memoryview) -> None:
        while data:
            piece = data[:_PIECE_NBYTES]
            self.crc = crc32(piece, self.crc)
            while piece:
                written = os.write(self.fd, piece)
                piece, data, self.nbytes = piece[written:], data[written:], self.nbytes + written
            if self.nbytes - self._begun_nbytes >= _BEHIND_NBYTES and _sync_file_range is not None:
                _sync_file_range(self.fd, self._begun_nbytes, self.nbytes - self._begun_nbytes, _SYNC_FILE_RANGE_WRITE)
                self._begun_nbytes = self.nbytes


def _find_sync_file_range() -> Any:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux's alone
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _find_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2  # start writing what is not being written yet, and do not wait


def checksum(path: Path) -> FileRecord:
    """Size and CRC-32 of a file as it is now."""
    buffer = bytearray(_PIECE_NBYTES)
    view = memoryview(buffer)
    crc = nbytes = 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            crc, nbytes = crc32(view[:read], crc), nbytes + read
    return FileRecord(nbytes, crc)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file, checked against the file's size; no data is read.

    Raises:
        CheckpointError: the file is not there, is cut short, or its header is not one.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MOST_HEADER_NBYTES):
                raise CheckpointError(f"{path} is damaged: its header claims {length} bytes of {size}")
            header = parse_json(file.read(length))
        begin = 8 + length
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = CODES[entry["dtype"]], tuple(int(extent) for extent in entry["shape"])
            start, end = (int(edge) for edge in entry["data_offsets"])
            if min((0, *shape)) < 0 or not 0 <= start <= end <= size - begin:
                raise CheckpointError(f"{path} is damaged: {name} lies outside the file")
            if prod(shape) * dtype.itemsize != end - start:
                raise CheckpointError(f"{path} is damaged: {name} is {end - start} bytes for shape {shape}")
            found[name] = TensorInfo(begin + start, dtype, shape)
        return found
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; the checkpoint is not whole") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be read ({error!r})") from error


def read_into(fd: int, out: torch.Tensor, offset: int, where: str) -> None:
    """Fill a contiguous CPU tensor from byte `offset` of an open file; `where` names it in an error."""
    data = bytes_of(out)
    while data:
        read = os.preadv(fd, [data[: 1 << 30]], offset)
        if read == 0:
            raise CheckpointError(f"{where} ends before byte {offset}: the file was cut short")
        data, offset = data[read:], offset + read
