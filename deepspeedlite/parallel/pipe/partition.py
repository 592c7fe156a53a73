"""Where a list of layers is cut into stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from deepspeedlite.runtime.errors import ConfigError

_PRECISION = 1 << 30  # of weights that are fractions


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Edges of parts with equally many items, what is left over in the first: part p is [edges[p], edges[p + 1])."""
    each, more = divmod(num_items, num_parts)
    return [part * each + min(part, more) for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Edges of contiguous parts whose heaviest is as light as can be; none is empty where there are enough items.

    The least bound that `num_parts` parts can keep is found by bisection, and the first parts are filled up to it.
    """
    if any(weight != int(weight) for weight in weights):
        weights = [round(weight / max(weights) * _PRECISION) for weight in weights]
    sums = [0, *accumulate(int(weight) for weight in weights)]
    if len(weights) <= num_parts:
        return [min(part, len(weights)) for part in range(num_parts + 1)]
    low, high = int(max(weights)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _fill(sums, num_parts, middle)[-1] == len(weights):
            high = middle
        else:
            low = middle + 1
    return _fill(sums, num_parts, low)


def _fill(sums: Sequence[int], num_parts: int, bound: int) -> list[int]:
    """Fill part after part up to `bound`, leaving at least one item to each later one."""
    items = len(sums) - 1
    edges = [0]
    for part in range(1, num_parts + 1):
        end = edges[-1]
        while end < items - (num_parts - part) and sums[end + 1] - sums[edges[-1]] <= bound:
            end += 1
        edges.append(end)
    return edges


def check_no_empty_stage(edges: Sequence[int]) -> None:
    """Raise `ConfigError` for more stages than layers."""
    if any(start == stop for start, stop in pairwise(edges)):
        raise ConfigError(
            f"{edges[-1]} layers cannot fill {len(edges) - 1} pipeline stages; use fewer stages, or split layers"
        )
