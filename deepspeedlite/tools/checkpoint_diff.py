"""What differs between two checkpoints, wherever and by however many ranks each was written.

Names, shapes and values are compared, not layouts: a checkpoint that was loaded and saved at another stage or world
size is the same. At most `_STEP_NUMEL` elements of each are in memory at a time, and one tensor of `client_state`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.manifest import MASTER, WEIGHT, Parameter
from deepspeedlite.checkpoint.reader import Reader

_STEP_NUMEL = 1 << 20
_SHORT = 16  # values of a list that are shown one by one


class Difference(NamedTuple):
    """One thing that differs. `a` and `b` are what each side has where that is short, and None otherwise."""

    section: str  # "parameter", "optimizer" (its states and groups), or "run" (counters, schedule, random numbers, ...)
    where: str  # a parameter's name, or a path such as lr_scheduler['last_epoch']
    what: str
    a: Any = None
    b: Any = None
    max_abs: float | None = None  # of tensors: the largest |a - b|, infinite where one of them is NaN


def differences(a: Reader, b: Reader) -> Iterator[Difference]:
    """All that differs, in the order of the manifests.

    Raises:
        CheckpointError: a file ends too soon. Checksums are not compared: `Reader.verify` does that.
    """
    seen = set()
    for mine in a.manifest.parameters:
        names = (mine.name, *mine.tied)
        other = next((b.by_any_name[name] for name in names if name in b.by_any_name), None)
        if other is None:
            yield Difference("parameter", mine.name, "only in A")
        else:
            seen.add(other.name)
            yield from _of_parameter(a, mine, b, other)
    yield from (Difference("parameter", p.name, "only in B") for p in b.manifest.parameters if p.name not in seen)
    yield from _unequal("optimizer", "class", a.manifest.optimizer, b.manifest.optimizer)
    yield from _of_values("optimizer", "param_groups", a, a.manifest.param_groups, b, b.manifest.param_groups)
    yield from _unequal("run", "global_steps", a.manifest.global_steps, b.manifest.global_steps)
    for key in dict.fromkeys((*a.manifest.state, *b.manifest.state)):
        if key in ("config", "saved_by") or (key == "rng" and a.manifest.world_size != b.manifest.world_size):
            continue  # the configuration says how, not what; random numbers are one per rank
        yield from _of_values("run", key, a, a.manifest.state.get(key), b, b.manifest.state.get(key))


def _unequal(section: str, where: str, a: Any, b: Any, what: str = "differs") -> Iterator[Difference]:
    if a != b:
        yield Difference(section, where, what, a, b)


def _of_parameter(a: Reader, mine: Parameter, b: Reader, other: Parameter) -> Iterator[Difference]:
    name = mine.name
    yield from _unequal("parameter", name, mine.dtype, other.dtype, "dtype")
    yield from _unequal("parameter", name, mine.trainable, other.trainable, "trainable")
    yield from _unequal("parameter", name, mine.group, other.group, "param group")
    names, others = (sorted((p.name, *p.tied)) for p in (mine, other))
    yield from _unequal("parameter", name, names, others, "tied names")
    if mine.shape != other.shape:
        yield Difference("parameter", name, "shape", mine.shape, other.shape)
        return
    yield from _of_kind(a, mine, b, other, MASTER if MASTER in mine.pieces and MASTER in other.pieces else WEIGHT)
    for kind in dict.fromkeys((*mine.pieces, *other.pieces)):
        if kind in (WEIGHT, MASTER):
            continue
        missing = [side for side, p in (("A", mine), ("B", other)) if kind not in p.pieces]
        if missing:
            yield Difference("optimizer", name, f"{kind} only in {'B' if missing == ['A'] else 'A'}")
        else:
            yield from _of_kind(a, mine, b, other, kind)
    yield from _of_values("optimizer", name, a, mine.scalars, b, other.scalars)


def _of_kind(a: Reader, mine: Parameter, b: Reader, other: Parameter, kind: str) -> Iterator[Difference]:
    section = "parameter" if kind in (WEIGHT, MASTER) else "optimizer"
    count, most = 0, 0.0
    for start in range(0, mine.numel, _STEP_NUMEL):
        stop = min(start + _STEP_NUMEL, mine.numel)
        unequal, apart = _compare(a.read(mine, kind, start, stop), b.read(other, kind, start, stop))
        count, most = count + unequal, max(most, apart)
    if count:
        yield Difference(section, mine.name, f"{count} of {mine.numel} elements of its {kind}", max_abs=most)


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """How many elements of two tensors of one shape differ (NaN equals NaN), and the largest |a - b|."""
    if a.dtype != b.dtype or a.dtype.itemsize == 1:
        a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    count = int(unequal.sum())
    if count == 0:
        return 0, 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    apart = (a[unequal].to(wide) - b[unequal].to(wide)).abs()
    return count, apart.nan_to_num(nan=inf, posinf=inf).max().item()


def _of_values(section: str, where: str, a: Reader, mine: Any, b: Reader, other: Any) -> Iterator[Difference]:
    """Of what `manifest.encode` made; one tensor of each side is in memory at a time."""
    if isinstance(mine, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*mine, *other)):
            place = where if key.startswith("$") else f"{where}[{key!r}]"
            if key not in mine or key not in other:
                yield Difference(section, place, f"only in {'A' if key in mine else 'B'}")
            elif key in ("$tensor", "$array"):
                one, two = a.value({"$tensor": mine[key]}), b.value({"$tensor": other[key]})
                yield from _of_tensors(section, place, one, two)
            else:
                yield from _of_values(section, place, a, mine[key], b, other[key])
    elif isinstance(mine, list) and isinstance(other, list):
        yield from _unequal(section, where, len(mine), len(other), "length")
        if len(mine) > _SHORT and not any(isinstance(value, (list, dict)) for value in (*mine, *other)):
            count = sum(x != y for x, y in zip(mine, other))  # a generator's numbers, say: nobody wants them one by one
            if count:
                yield Difference(section, where, f"{count} of {len(mine)} values")
            return
        for index, (x, y) in enumerate(zip(mine, other)):
            yield from _of_values(section, f"{where}[{index}]", a, x, b, y)
    else:
        yield from _unequal(section, where, mine, other)


def _of_tensors(section: str, where: str, mine: torch.Tensor, other: torch.Tensor) -> Iterator[Difference]:
    yield from _unequal(section, where, str(mine.dtype), str(other.dtype), "dtype")
    if mine.shape != other.shape:
        yield Difference(section, where, "shape", tuple(mine.shape), tuple(other.shape))
        return
    count, most = _compare(mine.reshape(-1), other.reshape(-1))
    if count:
        yield Difference(section, where, f"{count} of {mine.numel()} elements", max_abs=most)
