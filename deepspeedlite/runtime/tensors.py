"""What configurations call dtypes, and tensors in what models take and return: lists, tuples and dicts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of a configuration's name; None where it names none."""
    return None if name is None else DTYPES[name]


def map_tensors(item: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`item` with `change(tensor)` in every tensor's place."""
    if isinstance(item, torch.Tensor):
        return change(item)
    if isinstance(item, dict):
        changed = {key: map_tensors(value, change) for key, value in item.items()}
        return changed if type(item) is dict else type(item)(changed)
    if isinstance(item, (list, tuple)):
        values = [map_tensors(value, change) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item


def tensors_in(value: Any, inside_objects: int = 2) -> Iterator[torch.Tensor]:
    """Every tensor in what models take and return: tensors, lists, tuples, mappings, dataclasses of them at any depth.

    Attributes of other objects (a cache, say) are followed too, but only `inside_objects` objects deep.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, inside_objects)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, inside_objects)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name), inside_objects)
    elif inside_objects and hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        for item in list(vars(value).values()):
            yield from tensors_in(item, inside_objects - 1)
