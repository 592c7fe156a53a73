"""What of a model and its optimizer lies where on this rank: the slice map that saving and loading share.

Everything is a `Flat`: a 1-D tensor of values, with its masters, optimizer states, and the parts of parameters in it.
A rank's flats are its shards of trained units and of frozen values at stage 3; parameters that no unit holds are flats
of one whole parameter each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.manifest import Parameter, dtype_name
from deepspeedlite.checkpoint.train_state import TrainState
from deepspeedlite.offload.store import MASTER, STATE, VALUES, Store
from deepspeedlite.offload.swap_file import DiskTensor
from deepspeedlite.ops.whole_tensors import WholeTensors
from deepspeedlite.zero.flat_params import FlatParams, full_shape, owner_of
from deepspeedlite.zero.layout import Run, Slot
from deepspeedlite.zero.unit import ShardUnit


class Part(NamedTuple):
    """Elements `[start, stop)` of a flat, which are those of a parameter from `first` on."""

    name: str
    start: int
    stop: int
    first: int


Values = torch.Tensor | DiskTensor


@dataclass(frozen=True)
class Flat:
    """A 1-D tensor of values and what belongs to it; `DiskTensor` where it is on a disk."""

    parts: list[Part]
    numel: int
    values: Values
    master: Values | None = None  # what the optimizer updates; `values` itself in fp32
    state: Mapping[str, Any] = field(default_factory=dict)
    replicated: bool = True  # every rank has all of it

    def slice_of(self, rank: int, size: int) -> tuple[int, int]:
        """The elements that `rank` writes."""
        if not self.replicated:
            return 0, self.numel
        share = -(-self.numel // size)
        return min(rank * share, self.numel), min((rank + 1) * share, self.numel)


class _Names:
    """What checkpoints call the parameters that owners hold: the names that they have now.

    Since `initialize` modules may have been given other names (an adapter around a layer has the layer in it), and a
    parameter that has left the model may have left its name to another. Where several ranks hold one model, its replica
    says what comes before.
    """

    def __init__(self, state: TrainState) -> None:
        self.prefix = state.replica.name_prefix
        self._now = {id(param): name for name, param in state.module.named_parameters()}
        self._taken = set(self._now.values())

    def of(self, slot: Slot, param: torch.Tensor) -> str:
        """Empty: checkpoints leave it out."""
        name = self._now.get(id(param), "" if slot.name in self._taken else slot.name)
        return name and self.prefix + name

    def parts(self, owner: FlatParams, run: Run) -> list[Part]:
        """The parameters in a run, those of them that checkpoints have a name for."""
        named = {slot.name: name for slot, param in owner.slots if (name := self.of(slot, param))}
        return [
            Part(named[s.slot.name], s.start, s.stop, run.start + s.start - s.slot.start)
            for s in owner.layout.segments(run)
            if s.slot.name in named
        ]


def flats_of(state: TrainState, change: bool = False) -> Iterator[Flat]:
    """This rank's flats of all parameters, under their names in checkpoints.

    With `change` the caller writes to them: every tensor is then in memory until the next flat is asked for, and
    `master` is the key of its states in the optimizer.
    """
    names = _Names(state)
    states = state.optimizer.state if state.optimizer is not None else {}
    own = dict.fromkeys(state.owners)
    for owner in own:
        for run, values, master, store in _runs_of(owner):
            parts, replicated = names.parts(owner, run), owner.layout.shard_count == 1
            kept = states.get(master, {}) if master is not None else {}
            if change:
                with store.opened(write=True):
                    yield Flat(parts, run.numel, values, master, kept, replicated)
                continue
            at = store.stored(VALUES, values)
            stored = {name: store.stored(STATE + name, value) for name, value in kept.items()}
            master_at = at if master is values else None if master is None else store.stored(MASTER, master)
            yield Flat(parts, run.numel, at, master_at, stored, replicated)
    for name, param in state.module.named_parameters():
        holder = owner_of(param)
        if param.numel() and (holder is None or (holder not in own and not holder.sharded)):
            yield Flat([Part(names.prefix + name, 0, param.numel(), 0)], param.numel(), param.data.view(-1))


def _runs_of(owner: FlatParams) -> list[tuple[Run, torch.Tensor, torch.Tensor | None, Store]]:
    """Each run of this rank with its values, what a step updates of it (None: nothing does), and where these live."""
    unit = owner.unit
    if isinstance(unit, ShardUnit) and unit.masters:
        stepped = zip(unit.runs(), unit.masters, unit.run_stores)
        return [(run, values, master, store) for (run, values, _), master, store in stepped]
    return [
        (run, values, None, owner.store.of_run(*owner.layout.span(run), values)) for run, values in owner.cut_runs()
    ]


def parameters_of(state: TrainState, exclude_frozen: bool = False) -> tuple[list[Parameter], dict[str, torch.Tensor]]:
    """This rank's parameters and persistent buffers, and the buffers' tensors, under their names in checkpoints."""
    names, entries = _Names(state), _parameters(state)
    positions = state.optimizer.positions if state.optimizer is not None else {}
    for slot, param in ((slot, param) for unit in state.reducer.units for slot, param in unit.flat.slots):
        if known := names.of(slot, param):
            entry = entries.get(known) or Parameter(known, slot.shape, dtype_name(param), param.requires_grad)
            entries[known] = replace(entry, group=slot.group, position=positions.get(slot.name))
    buffers: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for path, part in state.module.named_modules(remove_duplicate=False):
        for short, buffer in part.named_buffers(recurse=False):
            name = names.prefix + (f"{path}.{short}" if path else short)
            if short in part._non_persistent_buffers_set:
                continue
            if id(buffer) in seen:
                entries[seen[id(buffer)]].tied.append(name)
                continue
            seen[id(buffer)], buffers[name] = name, buffer
            entries[name] = Parameter(name, tuple(buffer.shape), dtype_name(buffer), trainable=False, buffer=True)
    kept = [entry for entry in entries.values() if entry.trainable or entry.buffer or not exclude_frozen]
    return kept, buffers


def _parameters(state: TrainState) -> dict[str, Parameter]:
    """What the module lists, by first names."""
    first: dict[int, str] = {}
    entries: dict[str, Parameter] = {}
    for inside, param in state.module.named_parameters(remove_duplicate=False):
        name = state.replica.name_prefix + inside
        if first.setdefault(id(param), name) != name:
            entries[first[id(param)]].tied.append(name)
        else:
            entries[name] = Parameter(name, tuple(full_shape(param)), dtype_name(param), param.requires_grad)
    return entries


def with_extra_state(state: TrainState) -> dict[str, torch.nn.Module | WholeTensors]:
    """The modules that have a state besides parameters and buffers (`get_extra_state`), by name in checkpoints.

    And the optimizer, if its states are not one value per element.
    """
    prefix, plain = state.replica.name_prefix, torch.nn.Module.get_extra_state
    found: dict[str, torch.nn.Module | WholeTensors] = {
        prefix + name: module
        for name, module in state.module.named_modules()
        if type(module).get_extra_state is not plain
    }
    if state.optimizer is not None and isinstance(state.optimizer.optimizer, WholeTensors):
        found[f"{prefix}(optimizer)"] = state.optimizer.optimizer
    return found
