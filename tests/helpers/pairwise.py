"""Matrices of cases that are too large to be tested in full: every pair of values, or every three, is met by a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def covering(
    parameters: dict[str, Iterable[Any]], strength: int = 2, always: Iterable[tuple[Any, ...]] = ()
) -> list[tuple[Any, ...]]:
    """Cases, values in the order of `parameters`, in which any `strength` parameters take all their combinations.

    Greedy: each case is, of the whole product, one that meets most combinations that no case before it has met; the
    first such, so that the same cases come out on every machine. The cases of `always` come before all.
    """
    product = list(itertools.product(*parameters.values()))
    places = list(itertools.combinations(range(len(parameters)), strength))
    met_by = {case: {(at, tuple(case[i] for i in at)) for at in places} for case in product}
    chosen = list(always)
    left = set().union(*met_by.values()).difference(*(met_by[case] for case in chosen))
    while left:
        best = max(product, key=lambda case: len(met_by[case] & left))
        left -= met_by[best]
        chosen.append(best)
    return [case for case in product if case in set(chosen)]


def each_pair(
    strength: int = 2, always: Iterable[tuple[Any, ...]] = (), **parameters: Iterable[Any]
) -> pytest.MarkDecorator:
    """Like a `parametrize` per parameter, of fewer cases. A world's sizes go here too, with `@distributed(None)`."""
    return pytest.mark.parametrize(",".join(parameters), covering(parameters, strength, always))
