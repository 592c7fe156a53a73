"""Linear layers in tiles, so that stage 3 holds one tile whole at a time instead of the layer.

A weight of shape [out, in] is cut into a grid of `out_splits` by `in_splits` layers, each a module, and therefore a
unit of stage 3, of its own. The input's last dimension is cut like the columns; what the tiles of a row give is added
up, and the rows are put one after the other. Names and arguments are DeepSpeed's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeedlite.parallel.pipe.partition import partition_uniform
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.sharded_params.gathered import GatheredParameters
from deepspeedlite.zero.flat_params import owner_of


class TiledLinear(nn.Module):
    """A linear layer in tiles.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether it has one; then the last tile of each row has its part.
        in_splits, out_splits: how often the columns and the rows of the weight are cut; sizes differ by 1 at most.
        input_is_already_split: `forward` takes a list of the input's parts instead of the input.
        combine_out_splits: `forward` returns one tensor; else the list of what the rows give.
        linear_cls: the class of the tiles, called as `linear_cls(in_features, out_features, bias=..., **kwargs)`.
        init_linear: a layer whose weight and bias are copied; see `copy_params_from`.
        kwargs: what `linear_cls` takes beside.

    Raises:
        EngineStateError: the weight cannot be cut so; (of `forward`) the input does not fit; (of `copy_params_from`)
            the layer has other shapes, or one has a bias and the other has none.
    """

    unsharded_in_parts = True  # whatever block of the model it is in

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: type[nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (("in", in_splits, in_features), ("out", out_splits, out_features)):
            if not 1 <= splits <= features:
                raise EngineStateError(
                    f"TiledLinear: {name}_splits must be at least 1 and at most {features}, got {splits}"
                )
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split, self.combine_out_splits = input_is_already_split, combine_out_splits
        self.in_parts = partition_uniform(in_features, in_splits)
        self.out_parts = partition_uniform(out_features, out_splits)
        last = in_splits - 1
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(columns, rows, bias=bias and column == last, **kwargs)
                for column, columns in enumerate(_sizes(self.in_parts))
            )
            for rows in _sizes(self.out_parts)
        )
        for row in self.linears:
            row.unsharded_in_parts = True  # type: ignore[assignment]
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """[..., in_features], or a list of its parts -> [..., out_features], or a list of its parts."""
        parts = self._parts(input_)
        outputs = []
        for row in self.tiles():
            total: Any = None
            for tile, part in zip(row, parts):
                total = self._reduce(total, tile(part))
            outputs.append(total)
        return self._combine(outputs) if self.combine_out_splits else outputs

    def tiles(self) -> list[list[Any]]:
        """Row by row, the tiles from left to right."""
        return [list(row.children()) for row in self.linears]

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the weight and the bias of a layer that is not tiled. Collective where either is sharded."""
        weight: Any = other.weight
        bias: Any = getattr(other, "bias", None)
        with GatheredParameters([weight, bias]):
            if tuple(weight.shape) != (self.out_features, self.in_features) or (bias is not None) != self.use_bias:
                raise EngineStateError(
                    f"TiledLinear of {self.out_features} x {self.in_features} with bias={self.use_bias} cannot copy a "
                    f"weight of shape {tuple(weight.shape)} with bias={bias is not None}"
                )
            for row, (top, bottom) in zip(self.tiles(), itertools.pairwise(self.out_parts)):
                for tile, (left, right) in zip(row, itertools.pairwise(self.in_parts)):
                    _set(tile.weight, weight[top:bottom, left:right])
                if bias is not None:
                    _set(row[-1].bias, bias[top:bottom])

    def _parts(self, input_: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        wanted = _sizes(self.in_parts)
        if not self.input_is_already_split:
            if not isinstance(input_, Tensor) or input_.shape[-1] != self.in_features:
                given = tuple(input_.shape) if isinstance(input_, Tensor) else type(input_).__name__
                raise EngineStateError(f"TiledLinear takes a tensor of {self.in_features} features, got {given}")
            return input_.split(wanted, dim=-1)
        found = [part.shape[-1] for part in input_]
        if found != wanted:
            raise EngineStateError(f"TiledLinear takes {len(wanted)} parts of {wanted} features, got {found}")
        return list(input_)

    def _reduce(self, total: Any, output: Any) -> Any:
        return output if total is None else total + output

    def _combine(self, outputs: list[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class TiledLinearReturnBias(TiledLinear):
    """Of tiles that return (output, bias or None) instead of adding the bias, as Megatron's do; returns such a pair."""

    def _reduce(self, total: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) != 2:
            raise EngineStateError(
                f"TiledLinearReturnBias: the tiles must return (output, bias), got {type(output).__name__}"
            )
        if total is None:
            return output
        biases = [bias for bias in (total[1], output[1]) if bias is not None]
        return total[0] + output[0], sum(biases[1:], biases[0]) if biases else None

    def _combine(self, outputs: list[Any]) -> Any:
        tensors, biases = zip(*outputs)
        return super()._combine(list(tensors)), None if biases[0] is None else super()._combine(list(biases))


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(bounds)]


def _set(param: nn.Parameter, values: Tensor) -> None:
    owner = owner_of(param)
    with GatheredParameters(param, modifier_rank=0 if owner is None else owner.group.ranks[0]):
        param.copy_(values)
