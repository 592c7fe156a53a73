"""Loading: each rank reads the ranges that its own layout asks for, whatever layout the checkpoint was saved from.

Files are verified, each by one rank, and the model is compared with the manifest before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.foreign import Formats, Groups
from deepspeedlite.checkpoint.manifest import MASTER, WEIGHT, Parameter
from deepspeedlite.checkpoint.reader import Reader, open_tag
from deepspeedlite.checkpoint.rng import restore_rng
from deepspeedlite.checkpoint.state_map import Flat, flats_of, parameters_of, with_extra_state
from deepspeedlite.checkpoint.tag import find_tag
from deepspeedlite.checkpoint.train_state import COUNTERS, MACHINE_OPTIONS, LoadOptions, TrainState
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import logger

# Optimizers that keep the same states.
_ALIKE = (
    {"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam"},
    {"FusedLion", "DeepSpeedCPULion"},
    {"Adagrad", "DeepSpeedCPUAdagrad"},
)


def load(
    state: TrainState, load_dir: str | Path, tag: Any, options: LoadOptions, ranks: Ranks, formats: Formats
) -> str | None:
    """Load a checkpoint into `state`'s parts, and what it says that they have not into `state`. Collective.

    Returns:
        its path; None where there was none.

    Raises:
        CheckpointError: on every rank the same. Unless it says that the rank failed while it changed its state, nothing
            has changed.
    """
    ranks.meet("load_checkpoint")

    def find() -> str:
        found = find_tag(check_folder(load_dir, "load_checkpoint"), tag, formats)
        return "" if found is None else str(found)

    where = ranks.first(f"loading from {load_dir}", find)
    if not where:
        logger.warning("no checkpoint in %s: nothing was loaded", load_dir)
        return None
    path = Path(where)
    what = f"loading checkpoint {path}"
    opened: list[Reader] = []
    try:
        ranks.each(what, lambda: opened.append(open_tag(path, formats, param_groups_of(state))))
        files = list(opened[0].manifest.files)
        ranks.each(what, lambda: opened[0].verify(files[ranks.rank :: ranks.size]))
        load = _Load(state, opened[0], options, ranks)
        told = ranks.each(what, load.match)
        foreign = ranks.first(what, lambda: load.foreign_to(set().union(*told)))
        ranks.each(what, lambda: load.check(foreign))
        ranks.each(what, load.restore)
        state.client_state = opened[0].state("client_state") or {}
    finally:
        for reader in opened:
            reader.close()
    return str(path)


def param_groups_of(state: TrainState) -> Groups:
    """The names of each param group's parameters, in the order in which the optimizer was given them."""
    groups: list[list[str]] = [[] for _ in state.optimizer.param_groups] if state.optimizer else []
    for entry in sorted(parameters_of(state)[0], key=lambda entry: entry.position or 0):
        if entry.group is not None and groups:
            groups[entry.group].append(entry.name)
    return groups


class _Load:
    """One checkpoint on its way into one state: `match` and `check` on every rank, and then `restore`."""

    def __init__(self, state: TrainState, reader: Reader, options: LoadOptions, ranks: Ranks) -> None:
        self._state, self._reader, self._options, self._ranks = state, reader, options, ranks
        self._entries, self._buffers = parameters_of(state)
        self._saved: dict[str, Parameter] = {}  # what of the checkpoint is loaded, by this rank's names for it

    # --- before anything is changed -------------------------------------------------------------------------------

    def match(self) -> set[str]:
        """Find this rank's parameters in the checkpoint; their names, from the first of those ranks that hold them."""
        state, manifest, parts = self._state, self._reader.manifest, self._state.replica.parts
        if any(owner.uses for owner in state.owners):
            raise CheckpointError("load_checkpoint inside GatheredParameters or a forward pass; leave it first")
        if manifest.model_parallel != parts:
            raise CheckpointError(
                f"the checkpoint is of model-parallel size {manifest.model_parallel} and this run of {parts}: "
                "what was saved of a parameter are the pieces of that many ranks; start as many per model (the number "
                "of models may differ)"
            )
        known = self._reader.by_any_name
        for entry in self._entries:
            found = next((known[name] for name in (entry.name, *entry.tied) if name in known), None)
            if found is None:
                if not (manifest.frozen_excluded and not entry.trainable):
                    self._state.mismatches.append(f"{entry.name} is in the model and not in the checkpoint")
            elif found.shape != entry.shape:
                self._state.mismatches.append(f"{entry.name} has shape {entry.shape}, in the checkpoint {found.shape}")
            else:
                self._saved[entry.name] = found
        if state.group.rank != 0:
            return set()
        return {name for entry in self._entries for name in (entry.name, *entry.tied)}

    def foreign_to(self, known: set[str]) -> list[str]:
        """What of the checkpoint has none of these names."""
        return [p.name for p in self._reader.manifest.parameters if not known & {p.name, *p.tied}]

    def check(self, foreign: list[str]) -> None:
        """Raise where the checkpoint does not fit; `foreign` is what of it no rank has."""
        self._state.mismatches += [f"{name} is in the checkpoint and not in the model" for name in foreign]
        if self._state.mismatches:
            listed = "\n  ".join(self._state.mismatches)
            if self._options.strict and self._options.custom_load_fn is None:
                raise CheckpointError(
                    f"the model is not the one saved:\n  {listed}\n(load_module_strict=False loads the rest)"
                )
            logger.warning("the model is not the one saved; the rest is loaded:\n  %s", listed)
        if self._optimizer is not None:
            self._check_optimizer(self._optimizer)

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        """What states are loaded into; None where none are wanted."""
        wanted = self._options.optimizer_states and not self._options.module_only
        return self._state.optimizer.optimizer if wanted and self._state.optimizer is not None else None

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        manifest, mine = self._reader.manifest, type(optimizer).__name__
        saved, remedy = manifest.optimizer, "pass load_optimizer_states=False to load the weights alone"
        if saved is None or (saved != mine and not any({saved, mine} <= names for names in _ALIKE)):
            raise CheckpointError(f"the checkpoint's optimizer is {saved} and this run's {mine}; {remedy}")
        if len(manifest.param_groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"the checkpoint has {len(manifest.param_groups)} param groups and the optimizer "
                f"{len(optimizer.param_groups)}; {remedy}"
            )

    # --- changing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """Read what this rank holds, and make what ranks hold alike alike again."""
        state = self._state
        state.reducer.clear()
        for owner in state.owners:
            owner.reshard()
            owner.wait_for_readers()
        if self._options.custom_load_fn is not None:
            self._load_by(self._options.custom_load_fn)
        for flat in flats_of(state, change=True):
            if self._options.custom_load_fn is None:
                self._load_values(flat)
            if self._optimizer is not None and flat.master is not None:
                self._load_states(flat, cast(torch.Tensor, flat.master), self._optimizer)
        if self._options.custom_load_fn is None:
            self._load_rest()
        state.reducer.share_values(state.share_numel)
        if state.optimizer is not None:
            state.optimizer.mend()
        if not self._options.module_only:
            self._load_progress()

    def _load_values(self, flat: Flat) -> None:
        values = cast(torch.Tensor, flat.values)  # in memory, since they are changed
        target, kind = (values, WEIGHT) if flat.master is None else (cast(torch.Tensor, flat.master), MASTER)
        for name, start, stop, first in flat.parts:
            if name in self._saved:
                self._reader.read_into(self._saved[name], kind, target[start:stop], first)
        if target is not values:
            values.copy_(target)

    def _load_states(self, flat: Flat, master: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        reader = self._reader
        parts = [(self._saved[part.name], part) for part in flat.parts if part.name in self._saved]
        state: dict[str, Any] = {}
        scalars: dict[str, list[Any]] = {}
        for parameter, part in parts:
            for kind in (kind for kind in parameter.pieces if kind not in (WEIGHT, MASTER)):
                if kind not in state:
                    covered = sum(p.stop - p.start for saved, p in parts if kind in saved.pieces)
                    make = torch.empty_like if covered == master.numel() else torch.zeros_like
                    state[kind] = make(master, dtype=reader.stored_dtype(parameter, kind))
                reader.read_into(parameter, kind, state[kind][part.start : part.stop], part.first)
            for name, value in parameter.scalars.items():
                scalars.setdefault(name, []).append(reader.value(value))
        for name, values in scalars.items():
            # Parameters that are stepped as one tensor from now on have one step count.
            state[name] = max(values, key=float) if all(v is not None for v in values) else values[0]
            if any(v is not None and float(v) != float(state[name]) for v in values if state[name] is not None):
                logger.warning(
                    "optimizer state %s differs over %s and others; the largest is taken", name, parts[0][0].name
                )
        optimizer.state.pop(master, None)
        if state:
            optimizer.state[master] = state

    def _load_rest(self) -> None:
        """Buffers, and what modules keep besides."""
        for name, buffer in self._buffers.items():
            if name in self._saved:
                flat_buffer = torch.empty(buffer.numel(), dtype=buffer.dtype)
                self._reader.read_into(self._saved[name], WEIGHT, flat_buffer)
                buffer.copy_(flat_buffer.view(buffer.shape))
        extra = self._reader.manifest.state.get("extra_state") or {}
        for name, holder in with_extra_state(self._state).items():
            if name in extra and (isinstance(holder, torch.nn.Module) or holder is self._optimizer):
                holder.set_extra_state(self._reader.value(extra[name]))

    def _load_by(self, custom_load_fn: Callable[..., Any]) -> None:
        weights = {}
        prefix, owners = self._state.replica.name_prefix, self._state.owners
        for parameter in self._reader.manifest.parameters:
            if parameter.name.startswith(prefix):
                weight = self._reader.read(parameter, WEIGHT).view(parameter.shape)
                weights.update({name.removeprefix(prefix): weight for name in (parameter.name, *parameter.tied)})
        for owner in owners:
            owner.begin_use()
        custom_load_fn(src=weights, dst=self._state.module)
        for owner in owners:
            owner.keep_changes()
            owner.end_use()

    def _load_progress(self) -> None:
        """How far the run had come: what no parameter has."""
        state, reader, saved = self._state, self._reader, self._reader.manifest.state
        counters = reader.state("engine") or {}
        state.counters = {name: int(counters.get(name, 0)) for name in COUNTERS}
        if self._optimizer is not None:
            for group, options in zip(self._optimizer.param_groups, reader.manifest.param_groups):
                group.update({k: v for k, v in reader.value(options).items() if k not in MACHINE_OPTIONS})
            if saved.get("loss_scaler"):
                state.loss_scaler.load_state_dict(reader.state("loss_scaler"))
        scheduler, position = reader.state("lr_scheduler"), reader.state("dataloader")
        wants_scheduler = self._options.lr_scheduler_states and scheduler is not None
        if wants_scheduler and hasattr(state.lr_scheduler, "load_state_dict"):
            state.lr_scheduler.load_state_dict(scheduler)
        if position is not None and hasattr(state.dataloader, "load_state_dict"):
            state.dataloader.load_state_dict(position)
        rngs = saved.get("rng") or []
        if len(rngs) == self._ranks.size:
            own = reader.value(rngs[self._ranks.rank])
            restore_rng(own)
            for name, buffer in own["buffers"].items():
                if name in self._saved and self._options.custom_load_fn is None:
                    self._buffers[name].copy_(buffer)
        elif rngs and self._ranks.rank == 0:
            logger.info("random numbers go on anew: the checkpoint was saved by %d ranks", len(rngs))
