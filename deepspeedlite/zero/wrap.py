"""The policy that groups parameters into units.

Without parameter sharding a unit is a bucket: parameters in reverse order of registration, because the gradients of
the last layers are ready first, cut whenever a bucket has reached its size. Buckets never mix dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from deepspeedlite.errors import UnsupportedError

# Large enough to reach the wire's full bandwidth, small enough that the last bucket, whose reduction nothing hides,
# is short. Used where the configuration leaves `reduce_bucket_size` out.
DEFAULT_BUCKET_NUMEL = 8 * 1024 * 1024


class TrainedParameter(NamedTuple):
    """A parameter that an optimizer group updates."""

    name: str
    param: torch.nn.Parameter
    group: int


def name_parameters(
    module: torch.nn.Module, param_groups: Sequence[Sequence[torch.nn.Parameter]]
) -> list[TrainedParameter]:
    """Join the optimizer's groups with the module's names, in the module's order.

    A parameter that the module does not hold (a learnt temperature beside the model, say) comes last and is named by
    its place in the optimizer.

    Raises:
        UnsupportedError: two parameters share memory without being the same parameter, or one is complex.
    """
    place = {id(p): (g, i) for g, group in enumerate(param_groups) for i, p in enumerate(group)}
    everyone = {id(p): p for group in param_groups for p in group}
    trained = []
    for name, param in module.named_parameters():
        if id(param) in place:
            trained.append(TrainedParameter(name, param, place.pop(id(param))[0]))
    for key, (group, index) in place.items():
        trained.append(TrainedParameter(f"optimizer.param_groups[{group}].params[{index}]", everyone[key], group))
    _refuse_unusable(trained)
    return [entry for entry in trained if entry.param.requires_grad]


def _refuse_unusable(trained: Sequence[TrainedParameter]) -> None:
    owner: dict[int, str] = {}
    for name, param, _ in trained:
        if param.is_complex():
            raise UnsupportedError(
                f"parameter {name} is {param.dtype}; only real numbers can be trained: hold it as torch.view_as_real"
            )
        if param.layout is not torch.strided:
            raise UnsupportedError(f"parameter {name} has layout {param.layout}; only dense parameters can be trained")
        if param.numel() == 0:
            continue
        address = param.data_ptr()
        if address in owner:
            raise UnsupportedError(
                f"parameters {owner[address]} and {name} share memory without being the same Parameter; tie them by "
                "assigning one Parameter to both modules"
            )
        owner[address] = name


def reverse_buckets(trained: Iterable[TrainedParameter], bucket_numel: int | None) -> list[list[TrainedParameter]]:
    """Cut parameters into buckets of one dtype and about `bucket_numel` elements, last parameters first."""
    limit = bucket_numel or DEFAULT_BUCKET_NUMEL
    buckets: list[list[TrainedParameter]] = []
    open_buckets: dict[torch.dtype, tuple[list[TrainedParameter], int]] = {}
    for entry in reversed(list(trained)):
        bucket, numel = open_buckets.pop(entry.param.dtype, ([], 0))
        if bucket and numel + entry.param.numel() > limit:
            bucket, numel = [], 0
        if not bucket:
            buckets.append(bucket)
        bucket.append(entry)
        open_buckets[entry.param.dtype] = (bucket, numel + entry.param.numel())
    return buckets
