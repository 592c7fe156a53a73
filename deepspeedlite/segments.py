"""Plug-ins that tell optimizers where parameters lie in runs: LAMB, and those that see each parameter in its shape.

An optimizer names the one it needs in its class's `segments_told_as`.

LAMB's norms are those of whole parameters, wherever their pieces are: in several runs, on several ranks.

The elements of a parameter are in runs of all the ranks that its optimizer states are sharded over and, where
tensor-parallel ranks have split it, in those of its other pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.whole_tensors import Segment, WholeTensors
from deepspeedlite.parallel.replica import is_model_parallel_parameter
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.zero.grad_reducer import GradReducer


def tell_segments(lamb: FusedLamb, reducer: GradReducer, sub_groups: Sequence[int]) -> None:
    """Tell LAMB where each parameter lies in its runs. Collective over tensor-parallel ranks.

    Args:
        lamb: the optimizer, whose runs are the masters of the reducer's units.
        reducer: the units.
        sub_groups: how many runs are stepped together, in order.

    Raises:
        OptimizerError: tensor-parallel ranks would not step the pieces of a parameter together.
    """
    units, tensor = reducer.units, reducer.replica.tensor
    slots = [slot for unit in units for slot in unit.layout.slots]
    numbers = {slot.name: number for number, slot in enumerate(slots)}
    split = [
        numbers[slot.name] for unit in units for slot, param in unit.flat.slots if is_model_parallel_parameter(param)
    ]
    order = ([[slot.name for slot in unit.layout.slots] for unit in units], list(sub_groups), split)
    if any(other != order for other in tensor.all_gather_objects(order)):
        raise OptimizerError(
            "LAMB's norms are those of whole parameters, and the tensor-parallel ranks have split different ones, or "
            "so unequally that they would step them in another order; give every rank pieces of one size, or use Adam"
        )
    segments, numels = {}, {}
    for unit in units:
        for (cut, _, _), master in zip(unit.runs(), unit.masters):
            segments[master] = [(s.start, s.stop, numbers[s.slot.name]) for s in unit.layout.segments(cut)]
            numels[master] = cut.numel
    spread = reducer.plan.shard_optimizer or tensor.size > 1
    lamb.set_segments(segments, len(numbers), partial(_sum, reducer, split) if spread else None, numels)


def tell_parameters(optimizer: WholeTensors, reducer: GradReducer, sub_groups: Sequence[int]) -> None:
    """Tell an optimizer of whole parameters where each lies in its runs, which nothing shards. See `tell_segments`."""
    found = {}
    for unit in reducer.units:
        params = {slot.name: param for slot, param in unit.flat.slots}
        for (cut, _, _), master in zip(unit.runs(), unit.masters):
            held = unit.layout.segments(cut)
            found[master] = [Segment(s.start, s.stop, s.slot.name, params[s.slot.name]) for s in held]
    optimizer.set_segments(found)


def _sum(reducer: GradReducer, split: Sequence[int], squares: torch.Tensor) -> None:
    """Sum what the ranks have of two squared norms per parameter; only those that are split over tensor ranks."""
    device = reducer.units[0].flat.device  # a rank without runs has no tensor to tell it
    there = squares.to(device)
    if reducer.plan.shard_optimizer:
        reducer.group.all_reduce(there)
    if reducer.replica.tensor.size > 1 and split:
        by_parameter = there.view(2, -1)
        pieces = by_parameter[:, list(split)]
        reducer.replica.tensor.all_reduce(pieces)
        by_parameter[:, list(split)] = pieces
    if there is not squares:
        squares.copy_(there)
