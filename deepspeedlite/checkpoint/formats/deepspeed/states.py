"""What the optimizer states in DeepSpeed's checkpoints belong to.

A torch state dict numbers parameters through all groups. At stages 1 to 3 such a number stands for a partition, whose
parameters the checkpoint lists. At stage 0 it stands for a parameter, and nothing says which: in 16 bit it is found by
the fp32 master, which rounds to the weight, in fp32 by the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.manifest import DTYPES, MASTER, Parameter
from deepspeedlite.runtime.errors import CheckpointError

Shape = tuple[int, ...]


class UnassignedStatesError(CheckpointError):
    """It cannot be told which parameter an optimizer state belongs to."""


class WholeState(NamedTuple):
    """Masters and states of one parameter, or of several that are flattened one behind the other."""

    names: list[str]
    group: int
    elements: dict[str, torch.Tensor]  # by kind
    scalars: dict[str, Any]


def param_numbers(base: Any) -> list[tuple[int, int]]:
    """The number of each parameter (or partition) and its group. A list is DeepSpeed's form for elastic checkpoints."""
    if isinstance(base, list):
        return [(number, number) for number in range(len(base))]
    return [(number, index) for index, group in enumerate(base["param_groups"]) for number in group["params"]]


def options_of(base: Any) -> list[dict[str, Any]]:
    """Each group's options; an elastic checkpoint has none."""
    return [{} for _ in base] if isinstance(base, list) else base["param_groups"]


def state_of(base: Any, number: int, group_step: Any = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states that have a value per element, by kind, and those that are one value. Step counts become tensors.

    Args:
        base: the optimizer's state dict.
        number: the parameter's number.
        group_step: the step count where the optimizer keeps it for a group.
    """
    state = base[number] if isinstance(base, list) else base["state"].get(number, {})
    elements = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    scalars = {key: value for key, value in state.items() if key not in elements}
    if state and "step" not in scalars and group_step is not None:
        scalars["step"] = group_step
    if "step" in scalars:
        scalars["step"] = torch.tensor(float(scalars["step"]))
    return elements, scalars


def whole_states(
    optimizer: dict[str, Any],
    entries: Mapping[str, Parameter],
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[Sequence[str]] | None,
) -> tuple[list[WholeState], list[dict[str, Any]]]:
    """Masters and states at stage 0, and the groups' options.

    Args:
        optimizer: what the checkpoint has under that name.
        entries: all parameters and buffers.
        weights: their values, by name.
        groups: each group's names, if they are known.

    Raises:
        UnassignedStatesError: it cannot be told which parameter a state belongs to.
        CheckpointError: masters and weights contradict each other.
    """
    base = optimizer.get("optimizer_state_dict", optimizer)
    numbers, options = param_numbers(base), options_of(base)
    masters = optimizer.get("fp32_groups_flat")
    if masters is None:
        masters = [master for group in optimizer.get("fp32_groups", ()) for master in group]
    found = [state_of(base, number, options[group].get("step")) for number, group in numbers]
    free = {name: entry for name, entry in entries.items() if not entry.buffer}
    if masters:
        named = [_by_value(master, free, weights) for master in masters]
    else:
        shapes = [next((tuple(value.shape) for value in elements.values()), None) for elements, _ in found]
        named = [[name] for name in _by_order(shapes, numbers, free, groups)] if any(shapes) else [[] for _ in numbers]
    steps: dict[int, torch.Tensor] = {}
    for (_, group), (_, scalars) in zip(numbers, found):
        if "step" in scalars:  # DeepSpeed's FusedAdam counts a group's steps at its last parameter alone
            steps[group] = max(scalars["step"], steps.get(group, scalars["step"]))
    states = []
    for number, ((_, group), (elements, scalars)) in enumerate(zip(numbers, found)):
        kinds = {MASTER: masters[number], **elements} if masters else elements
        counted = {**scalars, "step": steps[group]} if "step" in scalars else scalars
        states.append(WholeState(named[number], group, kinds, counted))
    return states, options


def _by_value(master: torch.Tensor, free: dict[str, Parameter], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The parameters that round to the weights are taken out of `free`."""
    flat, cursor, names = master.detach().reshape(-1), 0, []
    while cursor < flat.numel():
        rest = flat[cursor:]
        name = next((name for name, entry in free.items() if _rounds_to(rest, entry, weights[name])), None)
        if name is None or (master.dim() > 1 and free[name].shape != tuple(master.shape)):
            raise CheckpointError(
                "an fp32 master is in this checkpoint that rounds to none of the weights: it is damaged, or was saved "
                "in the middle of a step"
            )
        cursor += free.pop(name).numel
        names.append(name)
    return names


def _rounds_to(flat: torch.Tensor, entry: Parameter, weight: torch.Tensor) -> bool:
    if not 0 < entry.numel <= flat.numel():
        return False
    begin = min(entry.numel, 64)  # most candidates differ there
    halves = weight.detach().reshape(-1)
    return all(torch.equal(flat[:n].to(DTYPES[entry.dtype]), halves[:n]) for n in (begin, entry.numel))


def _by_order(
    shapes: Sequence[Shape | None],
    numbers: Sequence[tuple[int, int]],
    free: Mapping[str, Parameter],
    groups: Sequence[Sequence[str]] | None,
) -> list[str]:
    """The names of the parameters that the states belong to; None is the shape of one that has no state."""
    if groups is not None:
        names = [name for group in groups for name in group if name in free]
        if _fit(shapes, [free[name] for name in names]):
            return names
    elif len({group for _, group in numbers}) == 1:
        first, last = _alignment(shapes, free.values()), _alignment(shapes[::-1], reversed(list(free.values())))
        if first is not None and last is not None and first == last[::-1]:
            return first
    raise UnassignedStatesError(
        "DeepSpeed trained this in fp32 at stage 0 with several groups or with frozen parameters, and its checkpoint "
        "does not say which parameter an optimizer state belongs to; engine.load_checkpoint into the same model with "
        "the same groups can tell"
    )


def _fit(shapes: Sequence[Shape | None], entries: Sequence[Parameter]) -> bool:
    return len(shapes) == len(entries) and all(s is None or s == e.shape for s, e in zip(shapes, entries))


def _alignment(shapes: Iterable[Shape | None], entries: Iterable[Parameter]) -> list[str] | None:
    """The first of the entries, in order, that have these shapes."""
    left = iter(entries)
    found = [next((e.name for e in left if shape is None or e.shape == shape), None) for shape in shapes]
    return None if None in found else found  # type: ignore[return-value]
