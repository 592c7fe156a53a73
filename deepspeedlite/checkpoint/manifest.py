"""The manifest: what a checkpoint holds and where, as dataclasses, as JSON, and validated before anything is believed.

    {"crc32": "9ab3f011",            of all bytes after this line
     "format": "deepspeedlite", "version": 1, "parameters": [...], "files": {...}, ...}

A *piece* `[file, tensor, offset, start, numel]` says that elements `[start, start + numel)` of a parameter, in
row-major order, are elements `[offset, offset + numel)` of a 1-D tensor of a file. Pieces of a kind are sorted and
cover the parameter exactly. Kinds: `weight`, `master` (fp32; the 16-bit weight is its cast, and is not stored)
and the optimizer's state names.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np
import torch

from deepspeedlite.checkpoint.files import parse_json
from deepspeedlite.checkpoint.tensors import CODES, MALFORMED, FileRecord
from deepspeedlite.runtime.errors import CheckpointError

FILE_NAME = "manifest.json"
FORMAT, VERSION = "deepspeedlite", 1
MOST_NBYTES = 1 << 28  # of a manifest: far more than a model of half a million parameters needs
WEIGHT, MASTER = "weight", "master"
EXTRA_STATE = "_extra_state"  # what torch calls a module's extra state in a state dict
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES.values()}


class Piece(NamedTuple):
    """A range of a parameter and where it lies; all but the names in elements."""

    file: str
    tensor: str
    offset: int
    start: int
    numel: int


@dataclass
class Parameter:
    """One parameter or buffer. Tied parameters are one entry under the first name, the others in `tied`."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # that the model computes in, as in `torch.float32` without "torch."
    trainable: bool = True
    buffer: bool = False
    group: int | None = None  # optimizer group
    position: int | None = None  # in that group, as the optimizer was given it
    tied: list[str] = field(default_factory=list)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)  # optimizer state that is one value, such as `step`

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass
class Manifest:
    """All of a checkpoint but the tensors. Values in `param_groups` and `state` are as `encode` made them."""

    parameters: list[Parameter]
    files: dict[str, FileRecord]
    tag: str = ""
    world_size: int = 1
    stage: int = 0
    global_steps: int = 0
    frozen_excluded: bool = False
    model_parallel: int = 1  # ranks that each have parameters of their own, named mp_rank_00.* and so on if several
    optimizer: str | None = None  # class name
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    # engine (counters), config, lr_scheduler, loss_scaler, dataloader, rng (a list, one per rank), client_state,
    # extra_state (of modules, by name)
    state: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = asdict(self)
        body["parameters"] = [{**vars(p), "shape": list(p.shape)} for p in self.parameters]
        body["files"] = {name: {"nbytes": r.nbytes, "crc32": f"{r.crc32:08x}"} for name, r in self.files.items()}
        text = json.dumps({"format": FORMAT, "version": VERSION, **body}, allow_nan=False, separators=(",", ":"))
        rest = text[1:].encode() + b"\n"
        if len(rest) > MOST_NBYTES - 100:
            raise CheckpointError(f"the manifest would have {len(rest):,} bytes, which no reader takes")
        return _first_line(rest) + rest

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Parse and check everything that can be checked without the other files; `where` names it in errors.

        Raises:
            CheckpointError: it is cut short, altered, of a newer version, or contradicts itself.
        """
        line, _, rest = raw.partition(b"\n")
        if line + b"\n" != _first_line(rest):
            raise CheckpointError(f"{where} is damaged: it is cut short or altered (its checksum does not match)")
        try:
            body = parse_json(raw)
            if body.pop("format") != FORMAT:
                raise CheckpointError(f"{where} is not a deepspeedlite checkpoint")
            version = body.pop("version")
            if version != VERSION:
                raise CheckpointError(f"{where} has version {version}, and this release reads version {VERSION}")
            del body["crc32"]
            files = {n: FileRecord(int(r["nbytes"]), int(r["crc32"], 16)) for n, r in body.pop("files").items()}
            parameters = [_parameter(entry, files) for entry in body.pop("parameters")]
            manifest = cls(parameters=parameters, files=files, **body)
            _check(manifest)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        except MALFORMED as error:
            raise CheckpointError(f"{where} is damaged: {error!r}") from error
        return manifest


def _first_line(rest: bytes) -> bytes:
    return b'{"crc32": "%08x",\n' % zlib.crc32(rest)


def _parameter(entry: dict[str, Any], files: dict[str, FileRecord]) -> Parameter:
    pieces = {kind: [Piece(*piece) for piece in found] for kind, found in entry.pop("pieces").items()}
    parameter = Parameter(pieces=pieces, **{**entry, "shape": tuple(entry["shape"])})
    name = parameter.name
    _check_types(f"parameter {name}", parameter, _TYPES_OF_PARAMETER)
    if not all(isinstance(other, str) for other in parameter.tied):
        raise CheckpointError(f"parameter {name} has impossible other names")
    if parameter.dtype not in DTYPES:
        raise CheckpointError(f"parameter {name} has the unknown dtype {parameter.dtype}")
    if not all(type(extent) is int and extent >= 0 for extent in parameter.shape):
        raise CheckpointError(f"parameter {name} has the impossible shape {parameter.shape}")
    if WEIGHT not in pieces and MASTER not in pieces:
        raise CheckpointError(f"parameter {name} has neither a weight nor a master")
    for kind, found in pieces.items():
        cursor = 0
        for piece in found:
            numbers = (piece.offset, piece.start, piece.numel)
            if not isinstance(piece.file, str) or not isinstance(piece.tensor, str):
                raise CheckpointError(f"parameter {name}: its {kind} lies in no file ({piece})")
            if piece.file not in files or not all(type(n) is int and n >= 0 for n in numbers) or piece.start != cursor:
                raise CheckpointError(f"parameter {name}: its {kind} does not lie in the checkpoint ({piece})")
            cursor += piece.numel
        if cursor != parameter.numel:
            raise CheckpointError(f"parameter {name}: {cursor} of {parameter.numel} elements of its {kind} are here")
    return parameter


# What each field may be, besides what the dataclass says. (bool is no int here.)
_TYPES_OF_PARAMETER: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "shape": (tuple,),
    "dtype": (str,),
    "trainable": (bool,),
    "buffer": (bool,),
    "group": (int, type(None)),
    "position": (int, type(None)),
    "tied": (list,),
    "scalars": (dict,),
}
_TYPES_OF_MANIFEST: dict[str, tuple[type, ...]] = {
    "tag": (str,),
    "world_size": (int,),
    "stage": (int,),
    "global_steps": (int,),
    "frozen_excluded": (bool,),
    "model_parallel": (int,),
    "optimizer": (str, type(None)),
    "param_groups": (list,),
    "state": (dict,),
}
_TYPES_OF_STATE: dict[str, tuple[type, ...]] = {"engine": (dict, type(None)), "rng": (list, type(None))}


def _check_types(what: str, found: Any, types: dict[str, tuple[type, ...]]) -> None:
    for name, allowed in types.items():
        value = found.get(name) if isinstance(found, dict) else getattr(found, name)
        if type(value) not in allowed or (type(value) is int and value < 0):
            raise CheckpointError(f"{what} has the impossible {name} {repr(value)[:80]}")


def _check(manifest: Manifest) -> None:
    _check_types("the checkpoint", manifest, _TYPES_OF_MANIFEST)
    _check_types("its state", manifest.state, _TYPES_OF_STATE)
    if not all(isinstance(group, dict) for group in manifest.param_groups):
        raise CheckpointError("its param_groups are no options")
    if any(record.nbytes < 0 for record in manifest.files.values()):
        raise CheckpointError("a file has a negative size")
    for name in manifest.files:
        if not is_plain_name(name):
            raise CheckpointError(f"the file name {name!r} leads outside the checkpoint")
    seen = Counter(name for p in manifest.parameters for name in (p.name, *p.tied))
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        raise CheckpointError(f"parameters are listed twice: {', '.join(twice[:8])}")


def is_plain_name(name: str) -> bool:
    """Whether `name` is one that stays inside its directory and is no leftover's."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0") and name[0] != "."


def merge_pieces(parts: Sequence[Sequence[Piece]]) -> list[Piece]:
    """Pieces of one kind from all writers, in order."""
    return sorted((piece for part in parts for piece in part if piece.numel), key=lambda piece: piece.start)


# --- values: JSON-able data and tensors ---------------------------------------------------------------------------


def encode(value: Any, where: str, add_tensor: Callable[[torch.Tensor], list[str]]) -> Any:
    """JSON for `value`: numbers, strings, None, lists, tuples, dicts with such keys, tensors, NumPy numbers and arrays.

    Args:
        value: what to encode.
        where: its name in an error.
        add_tensor: puts a tensor into a file and gives [file, tensor].

    Raises:
        CheckpointError: anything else, named by its path.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        array = value.astype(np.int64) if value.dtype in (np.uint16, np.uint32) else value
        return {"$array": add_tensor(torch.from_numpy(np.array(array))), "dtype": str(value.dtype)}
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        return {"$scalar": encode(value.item(), where, add_tensor), "dtype": dtype}
    if isinstance(value, torch.Tensor):
        return {"$tensor": add_tensor(value)}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [encode(item, f"{where}[{i}]", add_tensor) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        items = [
            [encode(key, f"a key of {where}", add_tensor), encode(item, f"{where}[{key!r}]", add_tensor)]
            for key, item in value.items()
        ]
        if isinstance(value, Counter):  # torch's MultiStepLR keeps its milestones so
            return {"$counter": items}
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$dict": items}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{where} is a {kind}: a checkpoint holds numbers, strings, lists, tuples, dicts and tensors, never pickled "
        "objects; save its plain values instead"
    )


def decode(value: Any, read_tensor: Callable[[list[str]], torch.Tensor]) -> Any:
    """What `encode` was given; `read_tensor` takes [file, tensor]."""
    if isinstance(value, list):
        return [decode(item, read_tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$scalar" in value:
        return torch.tensor(decode(value["$scalar"], read_tensor), dtype=DTYPES[value["dtype"]])
    if "$tensor" in value:
        return read_tensor(value["$tensor"])
    if "$array" in value:
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf" or dtype.itemsize > 8:  # "U1000000" takes megabytes an element
            raise ValueError(f"an array has the impossible dtype {dtype}")
        return read_tensor(value["$array"]).numpy().astype(dtype)
    if "$tuple" in value:
        return tuple(decode(value["$tuple"], read_tensor))
    for name, make in (("$dict", dict), ("$counter", lambda pairs: Counter(dict(pairs)))):
        if name in value:
            return make((decode(k, read_tensor), decode(v, read_tensor)) for k, v in value[name])
    return {key: decode(item, read_tensor) for key, item in value.items()}
