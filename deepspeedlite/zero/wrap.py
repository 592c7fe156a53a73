"""The policy that groups parameters into units.

Without parameter sharding a unit is a bucket: parameters in reverse order of registration, because the gradients of
the last layers are ready first, cut whenever a bucket has reached its size.

With parameter sharding a unit is what is unsharded together: a block, which is an element of a ModuleList or Sequential
(the outermost one whose parameters are not too many at once), and outside blocks the parameters of one module. Small
parameters stay whole on every rank, since gathering them would cost more than they weigh, and so do those that no
module holds; they are bucketed as above. Units mix neither dtypes nor frozen with trained parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from deepspeedlite.comm import Group

# Large enough to reach the wire's full bandwidth, small enough that the last bucket, whose reduction nothing hides,
# is short. Used where the configuration leaves `reduce_bucket_size` out.
DEFAULT_BUCKET_NUMEL = 8 * 1024 * 1024

# A block with more elements than this is split where it has blocks of its own, and a huge one into its modules: several
# blocks are whole at once, and one must fit twice under the default of stage3_max_live_parameters to be prefetched.
LARGE_BLOCK_NUMEL = 64 * 1024 * 1024
HUGE_BLOCK_NUMEL = 256 * 1024 * 1024

FROZEN = -1


class NamedParameter(NamedTuple):
    """A parameter, its full name, and the optimizer group that updates it (-1: none, it is frozen)."""

    name: str
    param: torch.nn.Parameter
    group: int


class Bucket(NamedTuple):
    """The parameters of one unit, and what is particular about it."""

    members: Sequence[NamedParameter]
    sharded: bool = False  # whether the values are
    # Ranks that hold the same parameters for another part of the model, and have a gradient of their own for them.
    tied_group: Group | None = None


def name_parameters(
    module: torch.nn.Module, param_groups: Sequence[Sequence[torch.nn.Parameter]]
) -> list[NamedParameter]:
    """Join the optimizer's groups with the module's names, in the module's order: also what is frozen at the moment.

    A parameter that the module does not hold (a learnt temperature beside the model, say) comes last and is named by
    its place in the optimizer.
    """
    place = {id(p): (g, i) for g, group in enumerate(param_groups) for i, p in enumerate(group)}
    everyone = {id(p): p for group in param_groups for p in group}
    named = []
    for name, param in module.named_parameters():
        if id(param) in place:
            named.append(NamedParameter(name, param, place.pop(id(param))[0]))
    for key, (group, index) in place.items():
        named.append(NamedParameter(f"optimizer.param_groups[{group}].params[{index}]", everyone[key], group))
    return named


def reverse_buckets(trained: Iterable[NamedParameter], bucket_numel: int | None) -> list[list[NamedParameter]]:
    """Cut parameters into buckets of one dtype and at most `bucket_numel` elements, last parameters first.

    A parameter that fills a bucket has one to itself, and small ones go on collecting behind it.
    """
    limit = bucket_numel or DEFAULT_BUCKET_NUMEL
    buckets: list[list[NamedParameter]] = []
    filling: dict[torch.dtype, tuple[list[NamedParameter], int]] = {}
    for entry in reversed(list(trained)):
        more = _numel(entry.param)
        if more >= limit:
            buckets.append([entry])
            continue
        bucket, numel = filling.pop(entry.param.dtype, ([], 0))
        if numel + more > limit:
            buckets.append(bucket)
            bucket, numel = [], 0
        bucket.append(entry)
        filling[entry.param.dtype] = (bucket, numel + more)
    return buckets + [bucket for bucket, _ in filling.values()]


def frozen_parameters(module: torch.nn.Module, trained: Iterable[NamedParameter]) -> list[NamedParameter]:
    """The module's floating-point parameters that are not trained."""
    known = {id(entry.param) for entry in trained}
    return [
        NamedParameter(name, param, FROZEN)
        for name, param in module.named_parameters()
        if id(param) not in known and param.is_floating_point()
    ]


def split_persistent(
    entries: Sequence[NamedParameter], held: Collection[int], threshold_numel: int, total_numel: int
) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """`(persistent, sharded)`: parameters that stay whole, and the others.

    Args:
        entries: parameters in the module's order.
        held: ids of the parameters that modules hold; any other is persistent.
        threshold_numel: parameters with fewer elements are persistent,
        total_numel: until they have this many elements together.
    """
    persistent, sharded = [], []
    room = total_numel
    for entry in entries:
        numel = _numel(entry.param)
        if id(entry.param) not in held or (numel < threshold_numel and numel <= room):
            persistent.append(entry)
            room -= numel
        else:
            sharded.append(entry)
    return persistent, sharded


def module_buckets(
    root: torch.nn.Module, entries: Sequence[NamedParameter], leaves: Collection[torch.nn.Module] = ()
) -> list[list[NamedParameter]]:
    """Group parameters by the module they are unsharded with, in reverse order of registration.

    Args:
        root: the model.
        entries: the parameters to group, frozen ones with group `FROZEN`.
        leaves: modules that are unsharded as one.
    """
    home: dict[int, int] = {}
    for number, (module, deep) in enumerate(_homes(root, set(leaves))):
        for param in module.parameters(recurse=deep):
            home.setdefault(id(param), number)
    buckets: dict[tuple[int, torch.dtype, bool], list[NamedParameter]] = {}
    for entry in reversed(entries):
        key = (home[id(entry.param)], entry.param.dtype, entry.group == FROZEN)
        buckets.setdefault(key, []).append(entry)
    return list(buckets.values())


def _homes(module: torch.nn.Module, leaves: set[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, bool]]:
    """Modules whose parameters belong together, outermost first; whether those of their descendants do too."""
    if module in leaves:
        yield module, True
        return
    yield module, False
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    in_blocks = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(children) > 1
    for child in children:
        if in_blocks and child not in leaves and not _is_to_be_split(child):
            yield child, True
        else:
            yield from _homes(child, leaves)


def _is_to_be_split(block: torch.nn.Module) -> bool:
    if any(getattr(part, "unsharded_in_parts", False) for part in block.modules()):
        return True  # a module that says so, wherever in the block
    numel = sum(_numel(param) for param in block.parameters())
    return numel > HUGE_BLOCK_NUMEL or (numel > LARGE_BLOCK_NUMEL and any(map(_holds_blocks, block.modules())))


def _holds_blocks(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1


def _numel(param: torch.Tensor) -> int:
    """Elements of a parameter, one that `zero.Init` has sharded included."""
    return int(getattr(param, "ds_numel", param.numel()))
