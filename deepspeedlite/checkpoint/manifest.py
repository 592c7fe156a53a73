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
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cache
from math import isfinite, prod
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from deepspeedlite.checkpoint.files import PlainName, parse_json
from deepspeedlite.checkpoint.tensors import CODES, MALFORMED, FileRecord
from deepspeedlite.runtime.errors import CheckpointError

FILE_NAME = "manifest.json"
FORMAT, VERSION = "deepspeedlite", 1
MOST_NBYTES = 1 << 28  # of a manifest: far more than a model of half a million parameters needs
WEIGHT, MASTER = "weight", "master"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES.values()}


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"has the unknown dtype {name}")
    return name


def _file_record(found: Any) -> FileRecord:
    return FileRecord(int(found["nbytes"]), int(found["crc32"], 16))


# What the fields of a manifest may be: nothing is converted but JSON's lists. (True is no number here.)
_STRICT = ConfigDict(extra="forbid")
Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Size = Annotated[int, Strict(), Field(ge=0)]
Dtype = Annotated[str, Strict(), AfterValidator(_known_dtype)]
Record = Annotated[FileRecord, BeforeValidator(_file_record)]


class Piece(NamedTuple):
    """A range of a parameter and where it lies; all but the names in elements."""

    file: Text
    tensor: Text
    offset: Size
    start: Size
    numel: Size


@dataclass(frozen=True)
class Parameter:
    """One parameter or buffer. Tied parameters are one entry under the first name, the others in `tied`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: Text
    shape: tuple[Size, ...]
    dtype: Dtype  # that the model computes in, as in `torch.float32` without "torch."
    trainable: Flag = True
    buffer: Flag = False
    group: Size | None = None  # optimizer group
    position: Size | None = None  # in that group, as the optimizer was given it
    tied: list[Text] = field(default_factory=list)
    pieces: dict[Text, list[Piece]] = field(default_factory=dict)
    scalars: dict[Text, Any] = field(default_factory=dict)  # optimizer state that is one value, such as `step`

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


def _check_state(state: Any) -> Any:
    """What is asked of `Manifest.state` before it is decoded."""
    for name, kind in (("engine", dict), ("rng", list)) if isinstance(state, dict) else ():
        if not isinstance(state.get(name), (kind, type(None))):
            raise ValueError(f"its {name} is no {kind.__name__}")
    return state


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but the tensors. Values in `param_groups` and `state` are as `encode` made them."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    parameters: list[Parameter]
    files: dict[PlainName, Record]
    tag: Text = ""
    world_size: Size = 1
    stage: Size = 0
    global_steps: Size = 0
    frozen_excluded: Flag = False
    model_parallel: Size = 1  # ranks that each have parameters of their own, named mp_rank_00.* and so on if several
    optimizer: Text | None = None  # class name
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    # engine (counters), config, lr_scheduler, loss_scaler, dataloader, rng (a list, one per rank), client_state,
    # extra_state (of modules, by name)
    state: Annotated[dict[str, Any], BeforeValidator(_check_state)] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = dict(vars(self))
        body["parameters"] = [vars(parameter) for parameter in self.parameters]
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
            manifest = _validator().validate_python(body)
            _check(manifest)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {_first_fault(error, body)}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        except MALFORMED as error:
            raise CheckpointError(f"{where} is damaged: {error!r}") from error
        return manifest


@cache
def _validator() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _first_line(rest: bytes) -> bytes:
    return b'{"crc32": "%08x",\n' % zlib.crc32(rest)


def _first_fault(error: ValidationError, body: dict[str, Any]) -> str:
    """What pydantic found first, with the parameter that it is in by name."""
    fault = error.errors(include_url=False)[0]
    path, said = [*fault["loc"]], fault["msg"].removeprefix("Value error, ")
    what = "the checkpoint"
    if path[:1] == ["parameters"] and len(path) > 2:
        what, path = f"parameter {body['parameters'][path[1]].get('name')}", path[2:]
    return f"{what} has an impossible {'.'.join(map(str, path))}, {repr(fault['input'])[:80]}: {said}"


def _check(manifest: Manifest) -> None:
    """What no field shows alone."""
    seen = Counter(name for p in manifest.parameters for name in (p.name, *p.tied))
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        raise CheckpointError(f"parameters are listed twice: {', '.join(twice[:8])}")
    for parameter in manifest.parameters:
        if WEIGHT not in parameter.pieces and MASTER not in parameter.pieces:
            raise CheckpointError(f"parameter {parameter.name} has neither a weight nor a master")
        for kind, pieces in parameter.pieces.items():
            _check_pieces(f"parameter {parameter.name}", kind, pieces, parameter.numel, manifest.files)


def _check_pieces(what: str, kind: str, pieces: list[Piece], numel: int, files: Container[str]) -> None:
    cursor = 0
    for piece in pieces:
        if piece.file not in files or piece.start != cursor:
            raise CheckpointError(f"{what}: its {kind} does not lie in the checkpoint ({piece})")
        cursor += piece.numel
    if cursor != numel:
        raise CheckpointError(f"{what}: {cursor} of {numel} elements of its {kind} are here")


def dtype_name(tensor: torch.Tensor) -> str:
    """What a manifest calls a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


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
        return {"$scalar": encode(value.item(), where, add_tensor), "dtype": dtype_name(value)}
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
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
    kind += f" of layout {value.layout}" if isinstance(value, torch.Tensor) else ""
    raise CheckpointError(
        f"{where} is a {kind}: a checkpoint holds numbers, strings, lists, tuples, dicts and dense tensors, never "
        "pickled objects; save its plain values (a sparse tensor's to_dense()) instead"
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
