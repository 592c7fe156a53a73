"""Small objects between ranks, as JSON with tensors as bytes behind it: reading one runs no code of whoever sent it.

What may travel: None, bool, int, float, str, bytes, list, tuple, set, dict, tensors, torch dtypes, and records
(dataclasses and named tuples) of those classes that the receiver names. Anything else is an error of the sender.

    8 bytes, little-endian   the length of the JSON
    JSON                     [the object, [[dtype, shape, bytes] of each tensor]]
    the tensors' bytes       each begins at a multiple of `_ALIGNMENT`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.runtime.errors import DistributedError

_ALIGNMENT = 16
_PLAIN = (bool, int, float, str)


def to_bytes(obj: Any) -> bytes:
    """An object as bytes.

    Raises:
        DistributedError: it holds something that does not travel, named by its type.
    """
    tensors: list[torch.Tensor] = []
    tree = _pack(obj, tensors)
    facts = [[str(t.dtype).removeprefix("torch."), list(t.shape), t.nbytes] for t in tensors]
    text = json.dumps([tree, facts], separators=(",", ":")).encode()
    whole = bytearray(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        whole += bytes(-len(whole) % _ALIGNMENT)
        whole += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return bytes(whole)


def from_bytes(data: bytes | bytearray, records: Collection[type] = ()) -> Any:
    """The object; of `records`' classes or plain.

    Raises:
        DistributedError: these bytes are no object of ours.
    """
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        tree, facts = json.loads(bytes(data[8:end]))
        tensors, memory = [], bytearray(data)
        for name, shape, nbytes in facts:
            end += -end % _ALIGNMENT
            tensors.append(_tensor(memory[end : end + nbytes], name, shape))
            end += nbytes
        return _unpack(tree, tensors, {record.__qualname__: record for record in records})
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, RecursionError) as error:
        raise DistributedError(f"a rank sent what is no object of ours ({type(error).__name__}: {error})") from error


def _tensor(memory: bytearray, name: str, shape: Sequence[int]) -> torch.Tensor:
    dtype = _dtype(name)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape) if memory else torch.empty(shape, dtype=dtype)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _pack(obj: Any, tensors: list[torch.Tensor]) -> Any:
    if obj is None or isinstance(obj, _PLAIN):
        return obj
    if type(obj) is list:
        return [_pack(item, tensors) for item in obj]
    if isinstance(obj, torch.Tensor):
        tensors.append(obj.detach().cpu().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(obj, dict):
        return {"dict": [[_pack(key, tensors), _pack(value, tensors)] for key, value in obj.items()]}
    if isinstance(obj, (tuple, set)) and not hasattr(obj, "_fields"):
        return {"set" if isinstance(obj, set) else "tuple": [_pack(item, tensors) for item in obj]}
    if isinstance(obj, bytes):
        return {"bytes": obj.hex()}
    if isinstance(obj, torch.dtype):
        return {"dtype": str(obj).removeprefix("torch.")}
    names = getattr(obj, "_fields", None)
    if names is None and dataclasses.is_dataclass(obj):
        names = [field.name for field in dataclasses.fields(obj)]
    if names is None:
        raise DistributedError(f"a {type(obj).__module__}.{type(obj).__qualname__} is not sent between ranks")
    return {"record": [type(obj).__qualname__, [_pack(getattr(obj, name), tensors) for name in names]]}


def _unpack(tree: Any, tensors: Sequence[torch.Tensor], records: dict[str, type]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors, records) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {_unpack(key, tensors, records): _unpack(item, tensors, records) for key, item in value}
    if kind == "record":
        name, values = value
        return records[name](*(_unpack(item, tensors, records) for item in values))
    if kind in ("bytes", "dtype"):
        return bytes.fromhex(value) if kind == "bytes" else _dtype(value)
    return {"tuple": tuple, "set": set}[kind](_unpack(item, tensors, records) for item in value)


# --- between ranks: ranks in arguments count within the group, None is the world --------------------------------------


def all_gather(obj: Any, group: dist.ProcessGroup | None, device: torch.device) -> list[Any]:
    """Every rank's object, in rank order. `device` is one that the group's backend moves tensors of."""
    mine, sizes = _sized(obj, group, device)
    parts = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, mine, group)
    return [_object(part, size) for part, size in zip(parts, sizes)]


def gather(obj: Any, dst: int, group: dist.ProcessGroup | None, device: torch.device) -> list[Any]:
    """Every rank's object on rank `dst`; an empty list elsewhere."""
    mine, sizes = _sized(obj, group, device)
    parts = None
    if dist.get_rank(group) == dst:
        parts = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in sizes]
    dist.gather(mine, parts, group=group, group_dst=dst)
    return [_object(part, size) for part, size in zip(parts or [], sizes)]


def _sized(obj: Any, group: dist.ProcessGroup | None, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """The object's bytes, filled up to those of the longest, and how many each rank has."""
    data = to_bytes(obj)
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group)
    counts = [int(size) for size in sizes]
    return _bytes(data + bytes(max(counts) - len(data)), device), counts


def send_bytes(data: bytes, dst: int, group: dist.ProcessGroup | None) -> None:
    """Send an object, as bytes by now, to a rank, over a group of CPU ranks."""
    dist.send(torch.tensor([len(data)]), group=group, group_dst=dst)
    dist.send(_bytes(data, torch.device("cpu")), group=group, group_dst=dst)


def receive_bytes(src: int, group: dist.ProcessGroup | None) -> bytes:
    """What a rank sends likewise."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, group=group, group_src=src)
    body = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(body, group=group, group_src=src)
    return body.numpy().tobytes()


def _bytes(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _object(part: torch.Tensor, size: int) -> Any:
    return from_bytes(part[:size].cpu().numpy().tobytes())
