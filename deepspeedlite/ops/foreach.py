"""What optimizers written with torch's foreach functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite.runtime.errors import UnsupportedError


def check_dense(optimizer: Optimizer, param: Tensor, grad: Tensor) -> None:
    """`UnsupportedError` for a sparse gradient."""
    if grad.is_sparse:
        raise UnsupportedError(
            f"{type(optimizer).__name__} needs dense gradients and a parameter of shape {tuple(param.shape)} has a "
            "sparse one: build the embedding with sparse=False, or use torch.optim.SGD or Adagrad"
        )


def dense_gradients(optimizer: Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and those gradients; `UnsupportedError` for a sparse one."""
    params = [p for p in group["params"] if p.grad is not None]
    for param in params:
        check_dense(optimizer, param, param.grad)
    return params, [p.grad for p in params]


def moment(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """One running average per parameter, of its shape and dtype; zeros the first time."""
    for param in params:
        if name not in optimizer.state[param]:
            optimizer.state[param][name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [optimizer.state[param][name] for param in params]
