"""What configurations call dtypes, and tensors in what models take and return: lists, tuples and dicts of them."""

from __future__ import annotations

from collections.abc import Callable
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


def move_to_device(item: Any, device: Any, criterion_func: Callable[[torch.Tensor], bool] | None = None) -> Any:
    """`item` with its tensors on `device`; those alone that `criterion_func` says yes to."""
    return map_tensors(
        item, lambda tensor: tensor.to(device) if criterion_func is None or criterion_func(tensor) else tensor
    )
