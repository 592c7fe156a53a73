"""Where weights lie, read by ranges: safetensors files, torch's own files, checkpoints of `initialize`'s engine.

`open_weights` finds out which it is. A `Weights` knows every tensor's shape and dtype without reading one, and fills
memory with the part of a tensor that a rank keeps (`parallel.tensor.Piece`), in the memory's own dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from deepspeedlite.checkpoint.files import open_regular
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.manifest import DTYPES, MASTER, WEIGHT
from deepspeedlite.checkpoint.reader import Reader, open_tag
from deepspeedlite.checkpoint.tag import find_tag, is_checkpoint
from deepspeedlite.checkpoint.tensors import TensorInfo, read_header, read_into
from deepspeedlite.parallel.tensor.pieces import Piece
from deepspeedlite.runtime.errors import CheckpointError

_SLAB_NBYTES = 8 << 20  # read at a time where bytes cannot go straight to their place
_ROW_NBYTES = 4096  # shorter parts of rows are cut out of whole rows: a page is read anyway
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Stored(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """Tensors by name, read in parts."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """All there are."""

    def read(self, name: str, piece: Piece | None, out: torch.Tensor) -> None:
        """Fill `out` with the part of a tensor, or with all of it, as its shape and dtype are."""

    def close(self) -> None:
        """Close the files."""


def open_weights(checkpoint: Any, base_dir: str, formats: Formats) -> Weights:
    """Weights out of whatever `checkpoint` names.

    Args:
        checkpoint: a folder or file; a list of files; a JSON file or dict with a list of them as `checkpoints`.
        base_dir: where relative paths begin, if not empty.
        formats: other programs' checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a kind that is not read here.
    """
    base = Path(base_dir)
    if isinstance(checkpoint, Mapping):
        return _listed(checkpoint, [base], "checkpoint")
    if isinstance(checkpoint, (list, tuple)):
        return _of_files([base / str(one) for one in checkpoint], "checkpoint")
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(f"checkpoint must be a path, a list of files or a dict; got {type(checkpoint).__name__}")
    path = base / checkpoint
    if not path.exists() and Path(checkpoint).suffix == ".json" and Path(checkpoint).is_file():
        path = Path(checkpoint)  # a script's own description, of files that are in base_dir
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give a folder or file of weights, or a list of files")
    if path.is_file():
        return _of_json(path, base_dir) if path.suffix == ".json" else _of_files([path], str(path))
    if is_checkpoint(path, formats):
        return _OfCheckpoint(open_tag(path, formats))
    for name in _INDEX:
        if (path / name).is_file():
            return _of_json(path / name)
    for ending in ("*.safetensors", "*.bin", "*.pt"):
        if files := sorted(path.glob(ending)):
            return _of_files(files, str(path))
    found = find_tag(path, None, formats)
    if found is None:
        raise CheckpointError(f"{path} has neither safetensors, nor files of torch's, nor a checkpoint of ours in it")
    return _OfCheckpoint(open_tag(found, formats))


def _of_json(path: Path, base_dir: str = "") -> Weights:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("weight_map"), dict):
        return _of_files([path.parent / name for name in sorted(set(found["weight_map"].values()))], str(path))
    return _listed(found, [*([Path(base_dir)] if base_dir else []), path.parent], str(path))


def _listed(found: Any, bases: Sequence[Path], where: str) -> Weights:
    """DeepSpeed's description of a checkpoint: {"type": ..., "checkpoints": [files], "version": ...}.

    Its files are in the first folder that has all of them, or `base_dir`, its own, in one of them.
    """
    files = found.get("checkpoints") if isinstance(found, Mapping) else None
    if not isinstance(files, (list, tuple)) or not all(isinstance(one, (str, os.PathLike)) for one in files):
        raise CheckpointError(
            f"{where} must have a list of files as `checkpoints` (or be a Hugging Face index, with a `weight_map`); "
            "files for each rank of a tensor-parallel training are not put together here"
        )
    folders = [base / str(found.get("base_dir") or "") for base in bases]
    lists = [[folder / one for one in files] for folder in folders]
    return _of_files(next((paths for paths in lists if all(path.is_file() for path in paths)), lists[0]), where)


def _of_files(paths: Sequence[Path], where: str) -> Weights:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise CheckpointError(f"{where}: {len(missing)} files are missing: {', '.join(missing[:6]) or 'it names none'}")
    if all(path.suffix == ".safetensors" for path in paths):
        return _OfSafetensors(paths)
    return _OfTorch(paths)


class _OfSafetensors:
    """Files of the published layout, in any number; a name counts in the last file that has it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._infos: dict[str, tuple[Path, TensorInfo]] = {}
        self._fds: dict[Path, int] = {}
        for path in paths:
            self._infos.update({name: (path, info) for name, info in read_header(path).items()})
        self.tensors: Mapping[str, Stored] = {
            name: Stored(info.shape, info.dtype) for name, (_, info) in self._infos.items()
        }

    def read(self, name: str, piece: Piece | None, out: torch.Tensor) -> None:
        path, info = self._infos[name]
        if path not in self._fds:
            self._fds[path] = open_regular(path)
        fd, where = self._fds[path], f"{path}, tensor {name}"

        def fill(flat: torch.Tensor, first: int) -> None:
            read_into(fd, flat, info.offset + first * info.dtype.itemsize, where)

        _fill(fill, Stored(info.shape, info.dtype), piece, out)

    def close(self) -> None:
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)


class _OfTorch:
    """Files of torch.save, mapped into memory and loaded without any other object in them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._values: dict[str, torch.Tensor] = {}
        for path in paths:
            try:
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:
                raise CheckpointError(f"{path} is no file of tensors that torch.load reads safely: {error}") from error
            found = next((found[key] for key in ("module", "model") if isinstance(found.get(key), dict)), found)
            self._values.update({name: value for name, value in found.items() if isinstance(value, torch.Tensor)})
        self.tensors: Mapping[str, Stored] = {
            name: Stored(tuple(value.shape), value.dtype) for name, value in self._values.items()
        }

    def read(self, name: str, piece: Piece | None, out: torch.Tensor) -> None:
        value = self._values[name]
        out.copy_(value if piece is None else piece.of(value))

    def close(self) -> None:
        self._values = {}


class _OfCheckpoint:
    """A checkpoint of `initialize`'s engine, or another program's that is read as one: the best values it has."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.tensors: Mapping[str, Stored] = {
            name: Stored(parameter.shape, DTYPES[parameter.dtype]) for name, parameter in reader.by_any_name.items()
        }

    def read(self, name: str, piece: Piece | None, out: torch.Tensor) -> None:
        parameter = self._reader.by_any_name[name]
        kind = MASTER if MASTER in parameter.pieces else WEIGHT

        def fill(flat: torch.Tensor, first: int) -> None:
            self._reader.read_into(parameter, kind, flat, first)

        _fill(fill, self.tensors[name], piece, out)

    def close(self) -> None:
        self._reader.close()


def _fill(fill: Any, stored: Stored, piece: Piece | None, out: torch.Tensor) -> None:
    """Fill `out` by ranges of a tensor that lies in rows; `fill(flat, first)` reads its elements from `first` on."""
    if piece is not None and piece.transposed:
        turned = torch.empty(out.shape[::-1], dtype=out.dtype)
        _fill(fill, stored, piece._replace(transposed=False), turned)
        out.copy_(turned.t())
        return
    if not stored.shape:
        _copy(fill, stored, 0, out.view(1))
        return
    dim, ranges = (0, ((0, stored.shape[0]),)) if piece is None else (piece.dim, piece.ranges)
    rows, length, inner = prod(stored.shape[:dim]), stored.shape[dim], prod(stored.shape[dim + 1 :])
    at = 0
    for start, stop in ranges:
        part = out.narrow(dim, at, stop - start)
        at += stop - start
        if rows == 1:
            _copy(fill, stored, start * inner, part.view(-1))
        else:
            _copy_rows(fill, stored, (rows, length * inner), (start * inner, stop * inner), part)


def _copy(fill: Any, stored: Stored, first: int, out: torch.Tensor) -> None:
    """Fill a 1-D tensor from one place on."""
    if out.dtype == stored.dtype and out.device.type == "cpu":
        fill(out, first)
        return
    buffer = torch.empty(min(out.numel(), _SLAB_NBYTES // stored.dtype.itemsize), dtype=stored.dtype)
    for begin in range(0, out.numel(), buffer.numel() or 1):
        part = out[begin : begin + buffer.numel()]
        fill(buffer[: part.numel()], first + begin)
        part.copy_(buffer[: part.numel()])


def _copy_rows(fill: Any, stored: Stored, shape: tuple[int, int], own: tuple[int, int], out: torch.Tensor) -> None:
    """Fill `out` with the columns `own` of rows of `shape`."""
    rows, width = shape
    kept = own[1] - own[0]
    whole_rows = kept * stored.dtype.itemsize < _ROW_NBYTES
    read = width if whole_rows else kept
    step = max(1, _SLAB_NBYTES // (read * stored.dtype.itemsize))
    buffer = torch.empty(min(step, rows), read, dtype=stored.dtype)
    target = out.view(rows, kept)
    for first in range(0, rows, step):
        some = buffer[: min(step, rows - first)]
        if whole_rows:
            fill(some.view(-1), first * width)
        else:
            for index, row in enumerate(some):
                fill(row, (first + index) * width + own[0])
        target[first : first + len(some)].copy_(some[:, own[0] : own[1]] if whole_rows else some)
