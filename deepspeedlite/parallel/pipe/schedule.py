"""In which order a stage runs the forward and backward passes of the micro-batches of one batch.

Stages agree without talking: each follows its own list, and what one sends, the next receives in the same order.

GPipe (Huang et al. 2019, arXiv:1811.06965) runs all forward passes first, and holds the activations of all
micro-batches. 1F1B (Narayanan et al. 2019, doi:10.1145/3341301.3359646, without its stale weights) lets a stage begin
with backward passes as soon as it can: equally fast, but a stage holds at most as many micro-batches as there are
stages from it on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Pass(NamedTuple):
    """One pass of one micro-batch through a stage."""

    kind: Kind
    micro_batch: int


def gpipe(stages: int, stage: int, micro_batches: int) -> list[Pass]:
    """All forward passes, then all backward passes."""
    return [
        *(Pass("forward", index) for index in range(micro_batches)),
        *(Pass("backward", index) for index in range(micro_batches)),
    ]


def one_forward_one_backward(stages: int, stage: int, micro_batches: int) -> list[Pass]:
    """A forward pass for each stage behind this one, then forward and backward passes in turn, then backward ones."""
    ahead = min(stages - stage - 1, micro_batches)
    passes = [Pass("forward", index) for index in range(ahead)]
    for index in range(micro_batches):
        if index + ahead < micro_batches:
            passes.append(Pass("forward", index + ahead))
        passes.append(Pass("backward", index))
    return passes


Schedule = Callable[[int, int, int], list[Pass]]
SCHEDULES: Mapping[str, Schedule] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}


def before(order: Sequence[Pass], kind: Kind, other: Kind) -> list[int]:
    """Per pass of `kind`, how many passes of the `other` kind come before it in a stage's order."""
    count, found = 0, []
    for one in order:
        count += one.kind == other
        if one.kind == kind:
            found.append(count)
    return found
