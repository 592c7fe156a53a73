"""What the ranks that hold one model together write, as one list of parameters; see `parallel.replica`.

Each data-parallel group tells by its first rank what it holds. Where two hold something under one name (layers tied
over pipeline stages), or under names that one of them has tied, it is one parameter, and the first alone writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepspeedlite.checkpoint.manifest import Parameter
from deepspeedlite.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Holding:
    """What one data-parallel group holds of the model; its ranks hold the same, or shards of it."""

    first_rank: int  # of the world
    entries: list[Parameter]  # buffers too
    checksums: dict[str, int]  # of buffers


class Merged(NamedTuple):
    """What the holdings are together."""

    entries: list[Parameter]
    checksums: dict[str, int]
    left_out: dict[int, set[str]]  # names that a holding, by its first rank, leaves to an earlier one


def merge(holdings: Sequence[Holding]) -> Merged:
    """Every parameter and buffer once.

    Raises:
        CheckpointError: two holdings have different things under one name.
    """
    entries: list[Parameter] = []
    holders: dict[str, tuple[Parameter, int]] = {}
    left_out: dict[int, set[str]] = {}
    checksums: dict[str, int] = {}
    taken: Counter[int | None] = Counter()  # places in the optimizer's groups, so that those of all ranks are distinct
    for holding in holdings:
        before = dict(taken)
        checksums = {**holding.checksums, **checksums}
        for entry in holding.entries:
            names = (entry.name, *entry.tied)
            known = next((holders[name] for name in names if name in holders), None)
            if known is None:
                position = entry.position
                if position is not None:
                    position += before.get(entry.group, 0)
                    taken[entry.group] = max(taken[entry.group], position + 1)
                first, rank = replace(entry, position=position, tied=list(entry.tied)), holding.first_rank
                entries.append(first)
            else:
                first, rank = known
                _check_alike(first, rank, entry, holding.first_rank)
                first.tied.extend(name for name in names if name not in (first.name, *first.tied))
                left_out.setdefault(holding.first_rank, set()).add(entry.name)
            holders.update(dict.fromkeys(names, (first, rank)))
    return Merged(entries, checksums, left_out)


def _check_alike(first: Parameter, first_rank: int, second: Parameter, second_rank: int) -> None:
    if (first.shape, first.dtype, first.buffer) != (second.shape, second.dtype, second.buffer):
        raise CheckpointError(
            f"{second.name} has shape {second.shape} and dtype {second.dtype} on rank {second_rank}, and {first.name} "
            f"shape {first.shape} and dtype {first.dtype} on rank {first_rank}: ranks that hold a model together must "
            "give different parameters different names"
        )
