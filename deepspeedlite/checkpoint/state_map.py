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


@dataclass
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


def _parts(owner: FlatParams, run: Any, names: Mapping[str, str]) -> list[Part]:
    """The parameters in a run, those of them that checkpoints have a name for."""
    return [
        Part(names[s.slot.name], s.start, s.stop, run.start + s.start - s.slot.start)
        for s in owner.layout.segments(run)
        if s.slot.name in names
    ]


class _Names:
    """What checkpoints call the parameters that owners hold: the names that they have now.

    Since `initialize` modules may have been given other names (an adapter around a layer has the layer in it), and a
    parameter that has left the model may have left its name to another.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._now = {id(param): name for name, param in module.named_parameters()}
        self._taken = set(self._now.values())

    def of(self, slot: Slot, param: torch.Tensor) -> str:
        """Empty: checkpoints leave it out."""
        return self._now.get(id(param), "" if slot.name in self._taken else slot.name)

    def inside(self, owner: FlatParams) -> dict[str, str]:
        """By their names in the owner."""
        named = ((slot.name, self.of(slot, param)) for slot, param in owner.slots)
        return {known: name for known, name in named if name}


def flats_of(state: TrainState, change: bool = False) -> Iterator[Flat]:
    """This rank's flats of all parameters, under their names in checkpoints.

    With `change` the caller writes to them: every tensor is then in memory until the next flat is asked for, and
    `master` is the key of its states in the optimizer.
    """
    prefix = state.replica.name_prefix
    for flat in _flats(state, change):
        flat.parts = [part._replace(name=prefix + part.name) for part in flat.parts]
        yield flat


def _flats(state: TrainState, change: bool) -> Iterator[Flat]:
    names = _Names(state.module)
    states = state.optimizer.state if state.optimizer is not None else {}
    own = dict.fromkeys(state.owners)
    for holder in own:
        yield from _of_owner(holder, names.inside(holder), states, change)
    for name, param in state.module.named_parameters():
        owner = owner_of(param)
        if param.numel() and (owner is None or (owner not in own and not owner.sharded)):
            yield Flat([Part(name, 0, param.numel(), 0)], param.numel(), param.data.view(-1))


def _of_owner(
    owner: FlatParams, names: Mapping[str, str], states: Mapping[torch.Tensor, dict[str, Any]], change: bool
) -> Iterator[Flat]:
    replicated = owner.layout.shard_count == 1
    for run, values, master, store in _runs_of(owner):
        found, state = _parts(owner, run, names), states.get(master, {}) if master is not None else {}
        if change:
            with store.opened(write=True):
                yield Flat(found, run.numel, values, master, state, replicated)
            continue
        own, kept = store.stored(VALUES, values), {name: store.stored(STATE + name, v) for name, v in state.items()}
        at = own if master is values else None if master is None else store.stored(MASTER, master)
        yield Flat(found, run.numel, own, at, kept, replicated)


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
    entries, buffers = _named(state)
    prefix = state.replica.name_prefix
    for entry in entries:
        entry.name, entry.tied = prefix + entry.name, [prefix + name for name in entry.tied]
    kept = [entry for entry in entries if entry.trainable or entry.buffer or not exclude_frozen]
    return kept, {prefix + name: buffer for name, buffer in buffers.items()}


def _named(state: TrainState) -> tuple[list[Parameter], dict[str, torch.Tensor]]:
    module = state.module
    names: dict[int, list[str]] = {}
    entries: dict[str, Parameter] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        if len(names[id(param)]) == 1:
            shape, dtype = tuple(full_shape(param)), str(param.dtype).removeprefix("torch.")
            entries[name] = Parameter(name, shape, dtype, param.requires_grad, tied=[])
        else:
            entries[names[id(param)][0]].tied.append(name)
    positions = state.optimizer.positions if state.optimizer is not None else {}
    called = _Names(module)
    held = ((slot, param) for unit in state.reducer.units for slot, param in unit.flat.slots)
    for slot, param in held:
        if known := called.of(slot, param):
            dtype = str(param.dtype).removeprefix("torch.")
            entry = entries.setdefault(known, Parameter(known, slot.shape, dtype, param.requires_grad))
            entry.group, entry.position = slot.group, positions.get(slot.name)
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
