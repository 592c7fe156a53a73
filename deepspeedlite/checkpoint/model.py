"""What of a model and its optimizer lies where on this rank: the slice map that saving and loading share.

Everything is a `Flat`: a 1-D tensor of values, with its masters, optimizer states, and the parts of parameters in it.
A rank's flats are its shards of trained units and of frozen values at stage 3; parameters that no unit holds are flats
of one whole parameter each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.manifest import Parameter
from deepspeedlite.zero.layout import FlatLayout
from deepspeedlite.zero.values import FlatValues, full_shape, owner_of


class Part(NamedTuple):
    """Elements `[start, stop)` of a flat, which are those of a parameter from `first` on."""

    name: str
    start: int
    stop: int
    first: int


@dataclass
class Flat:
    """A 1-D tensor of values and what belongs to it."""

    parts: list[Part]
    values: torch.Tensor
    master: torch.Tensor | None = None  # what the optimizer updates; `values` itself in fp32
    state: Mapping[str, Any] = field(default_factory=dict)
    replicated: bool = True  # every rank has all of it

    def slice_of(self, rank: int, size: int) -> tuple[int, int]:
        """The elements that `rank` writes."""
        if not self.replicated:
            return 0, self.values.numel()
        share = -(-self.values.numel() // size)
        return min(rank * share, self.values.numel()), min((rank + 1) * share, self.values.numel())


def _parts(layout: FlatLayout, run: Any) -> list[Part]:
    return [Part(s.slot.name, s.start, s.stop, run.start + s.start - s.slot.start) for s in layout.segments(run)]


def flats_of(engine: Any) -> Iterator[Flat]:
    """This rank's flats of all parameters."""
    parts = engine._parts
    state = parts.optimizer.state if parts.optimizer is not None else {}
    for unit in parts.schedule.units:
        masters = unit.masters or [None] * len(unit.runs())
        for (run, values, _), master in zip(unit.runs(), masters):
            held = state.get(master, {}) if master is not None else {}
            yield Flat(_parts(unit.layout, run), values, master, held, unit.layout.shard_count == 1)
    for frozen in parts.frozen:
        if not frozen.slots:  # thawed since
            continue
        known = {slot.name for slot, _ in frozen.slots}
        begin, _ = frozen.layout.shard(frozen.index)
        for run in frozen.layout.runs(frozen.index):
            found = [part for part in _parts(frozen.layout, run) if part.name in known]
            yield Flat(found, frozen.shard[run.start - begin : run.stop - begin], replicated=frozen.group.size == 1)
    for name, param in engine.module.named_parameters():
        if owner_of(param) is None and param.numel():
            yield Flat([Part(name, 0, param.numel(), 0)], param.data.view(-1))


def parameters_of(engine: Any, exclude_frozen: bool = False) -> tuple[list[Parameter], dict[str, torch.Tensor]]:
    """All parameters and persistent buffers, and the buffers' tensors by name."""
    module = engine.module
    names: dict[int, list[str]] = {}
    entries: dict[str, Parameter] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        if len(names[id(param)]) == 1:
            shape, dtype = tuple(full_shape(param)), str(param.dtype).removeprefix("torch.")
            entries[name] = Parameter(name, shape, dtype, param.requires_grad, tied=[])
        else:
            entries[names[id(param)][0]].tied.append(name)
    positions = engine._parts.optimizer.positions if engine._parts.optimizer is not None else {}
    for unit in engine._parts.schedule.units:
        for slot, param in unit.slots:
            known = names.get(id(param), [slot.name])[0]
            dtype = str(param.dtype).removeprefix("torch.")
            entry = entries.setdefault(known, Parameter(known, slot.shape, dtype, param.requires_grad))
            entry.group, entry.position = slot.group, positions.get(known)
    if exclude_frozen:
        entries = {name: entry for name, entry in entries.items() if entry.trainable}
    buffers: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for short, buffer in part.named_buffers(recurse=False):
            name = f"{path}.{short}" if path else short
            if short in part._non_persistent_buffers_set:
                continue
            if id(buffer) in seen:
                entries[seen[id(buffer)]].tied.append(name)
                continue
            seen[id(buffer)], buffers[name] = name, buffer
            dtype = str(buffer.dtype).removeprefix("torch.")
            entries[name] = Parameter(name, tuple(buffer.shape), dtype, trainable=False, buffer=True)
    return list(entries.values()), buffers


def owners(engine: Any) -> list[FlatValues]:
    """Every owner of values, trained and frozen."""
    return [*engine._parts.schedule.units, *(frozen for frozen in engine._parts.frozen if frozen.slots)]
