"""The batch triangle: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x world size.

Any missing number is derived from the others as DeepSpeed does; what cannot be solved in whole numbers is an error.
"""

from __future__ import annotations

from typing import NamedTuple

from deepspeedlite.runtime.errors import ConfigError

NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class BatchSizes(NamedTuple):
    """Samples per optimizer step, samples per forward pass on one rank, forward passes per step."""

    train: int
    micro: int
    accumulation: int


def solve_batch(train: int | None, micro: int | None, accumulation: int | None, world_size: int) -> BatchSizes:
    """Complete the three batch sizes for `world_size` data-parallel ranks.

    Accumulation is 1 when it is not given and not determined by the other two.

    Raises:
        ConfigError: neither train nor micro is given, a number is below 1, or the product does not come out.
    """
    problem = batch_problem(train, micro, accumulation, world_size)
    if problem is not None:
        raise ConfigError(problem)
    if micro is None:
        accumulation = accumulation or 1
        micro = (train or 0) // (world_size * accumulation)
    elif accumulation is None:
        accumulation = 1 if train is None else train // (micro * world_size)
    return BatchSizes(micro * accumulation * world_size, micro, accumulation)


def batch_problem(train: int | None, micro: int | None, accumulation: int | None, world_size: int) -> str | None:
    """Why `solve_batch` cannot solve these, in one line with all the numbers and the remedy; None if it can."""
    given = dict(zip(NAMES, (train, micro, accumulation)))
    for name, number in {**given, "world size": world_size}.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            return f"{name} = {number!r}: must be a whole number >= 1"
    if train is None and micro is None:
        return (
            "train_batch_size and train_micro_batch_size_per_gpu: neither is given; give one of them "
            "(samples per optimizer step over all ranks, or samples per forward pass on one rank)"
        )
    if train is None:
        return None
    factors = (micro or 1) * (accumulation or 1) * world_size
    numbers = " x ".join(f"{n} {v}" for n, v in zip(("micro-batch", "accumulation"), (micro, accumulation)) if v)
    product = f"{numbers} x world size {world_size}" if numbers else f"world size {world_size}"
    if micro is not None and accumulation is not None:
        if train == factors:
            return None
        remedy = f"set train_batch_size to {factors}, or leave one of the three out"
        return f"train_batch_size = {train}: is not {product} = {factors}; {remedy}"
    if train % factors == 0:
        return None
    below, above = train // factors * factors, (train // factors + 1) * factors
    choice = f"{below} or {above}" if below else str(above)
    return (
        f"train_batch_size = {train}: is not divisible by {product}"
        f"{f' = {factors}' if numbers else ''}; set train_batch_size to {choice}, or change the others"
    )
