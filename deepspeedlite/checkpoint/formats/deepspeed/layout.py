"""Where parameters lie in the partitions of DeepSpeed's ZeRO stages, for reading its checkpoints and writing them.

Stages 1 and 2: a group's parameters, one behind the other, are cut into one partition of equal size per rank.
Stage 3: each parameter is cut into one piece of equal size per rank; a rank's partition of a group is its pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

MODEL_STATES = "mp_rank_00_model_states.pt"
ALIGNMENT_NUMEL = 2  # a partition's size at stages 1 and 2 is a multiple of it


class Span(NamedTuple):
    """Elements `[start, start + numel)` of a parameter: those from `offset` on of a rank's partition of its group."""

    name: str
    rank: int
    offset: int
    start: int
    numel: int


def model_file(rank: int, stage: int) -> str:
    """The file of weights, buffers and counters; below stage 3 there is one for all ranks."""
    return f"zero_pp_rank_{rank}_{MODEL_STATES}" if stage == 3 else MODEL_STATES


def optimizer_file(rank: int, bf16: bool) -> str:
    """The file of a rank's partitions at stages 1 to 3."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def is_deepspeed(tag_dir: Path) -> bool:
    """Whether a directory is a tag that DeepSpeed wrote."""
    return any((tag_dir / model_file(0, stage)).is_file() for stage in (0, 3))


def dealt(count: int, hands: int) -> list[int]:
    """The order in which `round_robin_gradients` takes parameters: to as many ranks as there are `hands`, in turn."""
    return [index for hand in range(hands) for index in range(hand, count, hands)]


def joined_numel(shapes: Shapes, world: int) -> int:
    """A rank's partition at stages 1 and 2, in elements."""
    total, step = sum(prod(shape) for shape in shapes.values()), ALIGNMENT_NUMEL * world
    return -(-total // step) * ALIGNMENT_NUMEL


def joined_spans(shapes: Shapes, partition_numel: int, gaps: Sequence[int] = ()) -> Iterator[Span]:
    """Stages 1 and 2. `gaps` are the elements left free behind each parameter, none if it is empty."""
    cursor = 0
    for number, (name, shape) in enumerate(shapes.items()):
        begin, end = cursor, cursor + prod(shape)
        while cursor < end:
            rank, offset = divmod(cursor, partition_numel)
            numel = min(end - cursor, partition_numel - offset)
            yield Span(name, rank, offset, cursor - begin, numel)
            cursor += numel
        cursor += gaps[number] if gaps else 0


def piece_numel(shape: Sequence[int], world: int) -> int:
    """A rank's piece of a parameter at stage 3, in elements; the last ones are padded."""
    return -(-prod(shape) // world)


def split_spans(shapes: Shapes, world: int) -> Iterator[Span]:
    """Stage 3."""
    offset = 0
    for name, shape in shapes.items():
        numel, whole = piece_numel(shape, world), prod(shape)
        for rank in range(world):
            start = rank * numel
            if start < whole:
                yield Span(name, rank, offset, start, min(numel, whole - start))
        offset += numel
