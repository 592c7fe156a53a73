"""Reads checkpoints: any range of any parameter, lazily, from whichever files hold it.

Opening a tag reads its manifest and the files' headers and checks them against each other and against the files'
sizes; so a range that is asked for exists, and nothing is allocated for sizes that are not there. `verify` reads the
files through and compares their checksums.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.files import open_regular, read_regular
from deepspeedlite.checkpoint.foreign import Formats, Groups
from deepspeedlite.checkpoint.manifest import (
    DTYPES,
    FILE_NAME,
    MASTER,
    MOST_NBYTES,
    WEIGHT,
    Manifest,
    Parameter,
    Piece,
    decode,
)
from deepspeedlite.checkpoint.tag import find_tag_dir, is_ours
from deepspeedlite.checkpoint.tensors import MALFORMED, TensorInfo, checksum, read_header, read_into
from deepspeedlite.runtime.errors import CheckpointError

_CAST_NUMEL = 1 << 20  # elements read at a time where they must be cast


def open_tag(path: Path, formats: Formats, groups: Groups | None = None) -> Reader:
    """A reader of a tag, ours or another program's. `groups`: as in `ForeignFormat.open`."""
    path = find_tag_dir(path)
    foreign = None if is_ours(path) else formats.of(path)
    return Reader(path) if foreign is None else foreign.open(path, groups)


class Reader:
    """An open checkpoint.

    Args:
        path: the tag's directory.

    Raises:
        CheckpointError: something is missing, cut short, altered or impossible.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_tag_dir(Path(path))
        self._fds: dict[str, int] = {}  # of files that something was read of: most ranks need few of them
        file = self.path / FILE_NAME
        try:
            raw = read_regular(file, MOST_NBYTES)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}; this is not a whole checkpoint") from error
        self.manifest = Manifest.from_bytes(raw, str(file))
        self._tensors = {name: self._check_file(name) for name in self.manifest.files}
        self._index()

    def _index(self) -> None:
        """Look parameters up by name, and check that each lies where the manifest says."""
        self.parameters: dict[str, Parameter] = {p.name: p for p in self.manifest.parameters}
        self.by_any_name = {name: p for p in self.manifest.parameters for name in (p.name, *p.tied)}
        claimed: Counter[tuple[str, str]] = Counter()
        for parameter in self.manifest.parameters:
            for kind, pieces in parameter.pieces.items():
                self._check_pieces(parameter.name, kind, pieces, claimed)
        self._check_claims(claimed)

    def _check_file(self, name: str) -> dict[str, TensorInfo]:
        path, expected = self.path / name, self.manifest.files[name].nbytes
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link, which leads outside the checkpoint")
        found = read_header(path)
        size = path.stat().st_size
        if size != expected:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes and should have {expected}")
        return found

    def _check_pieces(self, name: str, kind: str, pieces: list[Piece], claimed: Counter[tuple[str, str]]) -> None:
        dtypes = set()
        for piece in pieces:
            info = self._tensors[piece.file].get(piece.tensor)
            if info is None or len(info.shape) != 1 or piece.offset + piece.numel > info.shape[0]:
                raise CheckpointError(
                    f"{self.path}: the {kind} of parameter {name} does not lie in tensor {piece.tensor} of {piece.file}"
                )
            dtypes.add(info.dtype)
            claimed[piece.file, piece.tensor] += piece.numel
        if len(dtypes) > 1:
            raise CheckpointError(f"{self.path}: the {kind} of {name} is of several dtypes: {dtypes}")

    def _check_claims(self, claimed: Counter[tuple[str, str]]) -> None:
        """Check that no tensor is claimed beyond its size: what is asked for is then never larger than the files."""
        for (file, tensor), numel in claimed.items():
            if numel > self._tensors[file][tensor].shape[0]:
                raise CheckpointError(
                    f"{self.path / file}: {numel} elements of tensor {tensor} are claimed, more than it has"
                )

    # --- reading --------------------------------------------------------------------------------------------------

    def stored_dtype(self, parameter: Parameter, kind: str) -> torch.dtype:
        """The dtype that a stored kind has in its files (a parameter without elements: the parameter's own)."""
        pieces = parameter.pieces[kind]
        return self._tensors[pieces[0].file][pieces[0].tensor].dtype if pieces else DTYPES[parameter.dtype]

    def source(self, parameter: Parameter, kind: str) -> str:
        """The kind that is stored for `kind`: a weight may be there as its master only, and the reverse."""
        if kind in parameter.pieces:
            return kind
        other = {WEIGHT: MASTER, MASTER: WEIGHT}.get(kind)
        if other is None or other not in parameter.pieces:
            raise CheckpointError(f"{self.path} holds no {kind} of parameter {parameter.name}")
        return other

    def read_into(self, parameter: Parameter, kind: str, out: torch.Tensor, start: int = 0) -> None:
        """Fill the 1-D tensor `out`, on any device and of any dtype, with elements from `start` on; cast as `copy_`."""
        kind = self.source(parameter, kind)
        stop = start + out.numel()
        if start < 0 or stop > parameter.numel:
            raise CheckpointError(f"{parameter.name} has {parameter.numel} elements, not [{start}, {stop})")
        for piece in parameter.pieces[kind]:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                at = piece.offset + first - piece.start
                self._fill(piece.file, piece.tensor, at, out[first - start : last - start])

    def read(self, parameter: Parameter, kind: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `[start, stop)` as a new 1-D CPU tensor: a weight in the model's dtype, else in the stored one."""
        dtype = self.stored_dtype(parameter, self.source(parameter, kind))
        if kind == WEIGHT:
            dtype = DTYPES[parameter.dtype]
        elif kind == MASTER and dtype.itemsize < 4:
            dtype = torch.float32
        out = torch.empty((parameter.numel if stop is None else stop) - start, dtype=dtype)
        self.read_into(parameter, kind, out, start)
        return out

    def _fill(self, file: str, tensor: str, first: int, out: torch.Tensor) -> None:
        """Fill the 1-D `out` with elements of a tensor of a file, from `first` on."""
        info, fd, where = self._tensors[file][tensor], self._fd(file), str(self.path / file)
        dtype, at = info.dtype, info.offset + first * info.dtype.itemsize
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            read_into(fd, out, at, where)
            return
        buffer = torch.empty(min(_CAST_NUMEL, out.numel()), dtype=dtype)
        for begin in range(0, out.numel(), _CAST_NUMEL):
            part = out[begin : begin + _CAST_NUMEL]
            read_into(fd, buffer[: part.numel()], at + begin * dtype.itemsize, where)
            part.copy_(buffer[: part.numel()])

    def _fd(self, file: str) -> int:
        if file not in self._fds:
            self._fds[file] = open_regular(self.path / file)
        return self._fds[file]

    def value(self, encoded: Any) -> Any:
        """What `manifest.encode` was given."""
        try:
            return decode(encoded, self._tensor)
        except MALFORMED as error:
            raise CheckpointError(f"{self.path} holds a value that none was saved as: {error!r}") from error

    def state(self, name: str) -> Any:
        """A decoded part of `manifest.state`; None where there is none."""
        return self.value(self.manifest.state.get(name))

    def _tensor(self, reference: Sequence[str]) -> torch.Tensor:
        file, name = reference
        info = self._tensors.get(file, {}).get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name} of {file} is not there")
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(file, name, 0, out.view(-1))
        return out

    # --- checking -------------------------------------------------------------------------------------------------

    def verify(self, files: Sequence[str] | None = None) -> None:
        """Read files (all if None) through and compare their checksums.

        Raises:
            CheckpointError: naming every file that differs.
        """
        wrong = []
        for name in self.manifest.files if files is None else files:
            try:
                if checksum(self.path / name) != self.manifest.files[name]:
                    wrong.append(f"{self.path / name} is damaged: its checksum does not match")
            except OSError as error:
                wrong.append(f"{self.path / name} cannot be read: {error.strerror}")
        if wrong:
            raise CheckpointError("; ".join(wrong))

    def close(self) -> None:
        """Close the files."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
