"""A tensor-parallel MLP as Megatron would build it, its unsharded twin, and mpu objects over the test's ranks.

Of four ranks 0 and 1 hold one copy of the model, 2 and 3 the other; 0 and 2 average their gradients, and 1 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, BATCH = 7, 18, 4


class Grid:
    """Groups of `parallel` ranks that hold a model, neighbours unless `apart`, and those across them."""

    def __init__(self, parallel: int = 2, apart: bool = False) -> None:
        world = dist.get_world_size()
        near = [list(range(first, first + parallel)) for first in range(0, world, parallel)]
        far = [list(range(first, world, world // parallel)) for first in range(world // parallel)]
        models = far if apart else near
        self.model, _ = dist.new_subgroups_by_enumeration(models)
        self.data, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in zip(*models)])
        self.size, self.rank = parallel, dist.get_rank(self.model)


class OldMpu:
    """As Megatron-LM's `mpu` module was up to version 2."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def get_model_parallel_group(self) -> Any:
        return self.grid.model

    def get_model_parallel_rank(self) -> int:
        return self.grid.rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.size

    def get_data_parallel_group(self) -> Any:
        return self.grid.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.grid.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.grid.data)


class NewMpu:
    """As Megatron core's `parallel_state`, as far as there is no pipeline."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def get_tensor_model_parallel_group(self, check_initialized: bool = True) -> Any:
        return self.grid.model

    def get_tensor_model_parallel_rank(self) -> int:
        return self.grid.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.grid.size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self, with_context_parallel: bool = False) -> Any:
        return self.grid.data

    def get_data_parallel_rank(self, with_context_parallel: bool = False) -> int:
        return dist.get_rank(self.grid.data)

    def get_data_parallel_world_size(self, with_context_parallel: bool = False) -> int:
        return dist.get_world_size(self.grid.data)


class _Enter(torch.autograd.Function):
    """The identity; its gradient is the sum of what all pieces give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    """The sum of what all pieces give; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.float()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


class Mlp(nn.Module):
    """A residual block with a norm, and a linear head; its mean square error. `group` holds it together, or None."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        parts = 1 if group is None else dist.get_world_size(group)
        self.group = group
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN // parts)
        self.down = nn.Linear(HIDDEN // parts, WIDTH, bias=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen += x.detach().float().mean()
        entered = self.norm(x)
        if self.group is not None:
            entered = _Enter.apply(entered, self.group)
        left = self.down(F.gelu(self.up(entered)))
        if self.group is not None:
            left = _Leave.apply(left, self.group)
        out = self.head(x + left + self.bias)
        return (out.float() - y.float()).square().mean()


SPLIT = {"up.weight": 0, "up.bias": 0, "down.weight": 1}  # by dimension


def whole_model(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    model = Mlp()
    nn.init.normal_(model.bias)
    return model


def piece_of(name: str, whole: Tensor, rank: int, parts: int) -> Tensor:
    """What a rank holds of a parameter of the whole model."""
    return whole.chunk(parts, SPLIT[name])[rank] if name in SPLIT else whole


def parallel_model(grid: Grid, seed: int = 0) -> Mlp:
    """This rank's part of `whole_model`."""
    model = Mlp(grid.model)
    whole = dict(whole_model(seed).named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(piece_of(name, whole[name], grid.rank, grid.size))
    return marked(model)


def marked(model: Mlp) -> Mlp:
    """The model, its parameters marked by Megatron's older and newer attribute."""
    model.up.weight.model_parallel = model.up.bias.model_parallel = True
    model.down.weight.tensor_model_parallel = True
    model.head.weight.tensor_model_parallel = False  # Megatron marks every parameter, one way or the other
    return model


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a data-parallel rank, shape (BATCH, WIDTH)."""
    generator = torch.Generator().manual_seed(1009 * step + 101 * micro + rank)
    return torch.randn(2, BATCH, WIDTH, generator=generator).unbind()
