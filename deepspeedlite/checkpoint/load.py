"""Loading: each rank reads the ranges that its own layout asks for, whatever layout the checkpoint was saved from.

Files are verified, each by one rank, and the model is compared with the manifest before anything is changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.manifest import MASTER, WEIGHT, Parameter
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.save import COUNTERS, MACHINE_OPTIONS
from deepspeedlite.checkpoint.state_map import Flat, flats_of, owners, parameters_of, with_extra_state
from deepspeedlite.checkpoint.tag import find_tag
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import logger

# Optimizers that keep the same states.
_ALIKE = (
    {"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam"},
    {"FusedLion", "DeepSpeedCPULion"},
    {"Adagrad", "DeepSpeedCPUAdagrad"},
)


@dataclass
class LoadOptions:
    """What of a checkpoint is wanted; the arguments of `DeepSpeedEngine.load_checkpoint`."""

    strict: bool = True
    optimizer_states: bool = True
    lr_scheduler_states: bool = True
    module_only: bool = False
    custom_load_fn: Callable[..., Any] | None = None


class Loader:
    """Loads into one engine. `mismatches` lists, after a load, what of model and checkpoint did not fit."""

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self.mismatches: list[str] = []

    def load(self, load_dir: str | Path, tag: Any, options: LoadOptions) -> tuple[str | None, dict[str, Any]]:
        """Load a checkpoint; see `DeepSpeedEngine.load_checkpoint`."""
        self._ranks.meet("load_checkpoint")
        path = self._ranks.first(
            f"loading from {load_dir}", lambda: find_tag(check_folder(load_dir, "load_checkpoint"), tag)
        )
        if path is None:
            logger.warning("no checkpoint in %s: nothing was loaded", load_dir)
            return None, {}
        from deepspeedlite.checkpoint.formats.deepspeed.reader import (
            open_tag,  # what a training that loads nothing need not wait for
        )

        what = f"loading checkpoint {path}"
        opened: list[Reader] = []
        try:
            self._ranks.each(what, lambda: opened.append(open_tag(path, self._groups())))
            reader = opened[0]
            files = list(reader.manifest.files)
            self._ranks.each(what, lambda: reader.verify(files[self._ranks.rank :: self._ranks.size]))
            told = self._ranks.each(what, lambda: self._match(reader))
            foreign = self._ranks.first(what, lambda: _foreign(reader, told))
            self._ranks.each(what, lambda: self._check(reader, foreign, options))
            self._ranks.each(what, lambda: self._restore(reader, options))
            client_state = reader.state("client_state") or {}
        finally:
            for reader in opened:
                reader.close()
        return str(path), client_state

    def _groups(self) -> list[list[str]]:
        """The names of each param group's parameters, in the order in which the optimizer was given them."""
        groups: list[list[str]] = [[] for _ in self._engine.optimizer.param_groups] if self._engine.optimizer else []
        for entry in sorted(parameters_of(self._engine)[0], key=lambda entry: entry.position or 0):
            if entry.group is not None and groups:
                groups[entry.group].append(entry.name)
        return groups

    # --- before anything is changed -------------------------------------------------------------------------------

    def _match(self, reader: Reader) -> set[str]:
        """Find this rank's parameters in the checkpoint; their names, from the first of those ranks that hold them."""
        engine, manifest, replica = self._engine, reader.manifest, self._engine._parts.replica
        if any(owner.uses for owner in owners(engine)):
            raise CheckpointError("load_checkpoint inside GatheredParameters or a forward pass; leave it first")
        if manifest.model_parallel != replica.parts:
            raise CheckpointError(
                f"the checkpoint is of model-parallel size {manifest.model_parallel} and this run of {replica.parts}: "
                "what was saved of a parameter are the pieces of that many ranks; start as many per model (the number "
                "of models may differ)"
            )
        self._names: dict[str, Parameter] = {}
        self.mismatches = []
        entries, self._buffers = parameters_of(engine)
        for entry in entries:
            found = next((reader.by_any_name[n] for n in (entry.name, *entry.tied) if n in reader.by_any_name), None)
            if found is None:
                if not (manifest.frozen_excluded and not entry.trainable):
                    self.mismatches.append(f"{entry.name} is in the model and not in the checkpoint")
            elif found.shape != entry.shape:
                self.mismatches.append(f"{entry.name} has shape {entry.shape}, in the checkpoint {found.shape}")
            else:
                self._names[entry.name] = found
        if engine._parts.group.rank != 0:
            return set()
        return {name for entry in entries for name in (entry.name, *entry.tied)}

    def _check(self, reader: Reader, foreign: list[str], options: LoadOptions) -> None:
        self.mismatches += [f"{name} is in the checkpoint and not in the model" for name in foreign]
        if self.mismatches:
            listed = "\n  ".join(self.mismatches)
            if options.strict and options.custom_load_fn is None:
                raise CheckpointError(
                    f"the model is not the one saved:\n  {listed}\n(load_module_strict=False loads the rest)"
                )
            logger.warning("the model is not the one saved; the rest is loaded:\n  %s", listed)
        if self._wants_states(options):
            self._check_optimizer(reader)

    def _wants_states(self, options: LoadOptions) -> bool:
        return options.optimizer_states and not options.module_only and self._engine.optimizer is not None

    def _check_optimizer(self, reader: Reader) -> None:
        saved, optimizer = reader.manifest.optimizer, self._engine.optimizer.optimizer
        mine = type(optimizer).__name__
        remedy = "pass load_optimizer_states=False to load the weights alone"
        if saved is None or (saved != mine and not any({saved, mine} <= names for names in _ALIKE)):
            raise CheckpointError(f"the checkpoint's optimizer is {saved} and this run's {mine}; {remedy}")
        if len(reader.manifest.param_groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"the checkpoint has {len(reader.manifest.param_groups)} param groups and the optimizer "
                f"{len(optimizer.param_groups)}; {remedy}"
            )

    # --- changing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _restore(self, reader: Reader, options: LoadOptions) -> None:
        engine = self._engine
        engine._reducer.clear()
        for owner in owners(engine):
            owner.reshard()
            owner.wait_for_readers()
        if options.custom_load_fn is not None:
            self._load_by(options.custom_load_fn, reader)
        for flat in flats_of(engine, change=True):
            if options.custom_load_fn is None:
                self._load_values(reader, flat)
            if self._wants_states(options) and flat.master is not None:
                self._load_states(reader, flat, cast(torch.Tensor, flat.master))
        for name, buffer in self._buffers.items():
            if name in self._names and options.custom_load_fn is None:
                flat_buffer = torch.empty(buffer.numel(), dtype=buffer.dtype)
                reader.read_into(self._names[name], WEIGHT, flat_buffer)
                buffer.copy_(flat_buffer.view(buffer.shape))
        extra = reader.manifest.state.get("extra_state") or {}
        for name, module in with_extra_state(engine).items() if options.custom_load_fn is None else ():
            if name in extra:
                module.set_extra_state(reader.value(extra[name]))
        engine._reducer.share_values(engine._parts.config.zero_optimization.allgather_bucket_size)
        if engine.optimizer is not None:
            engine.optimizer.broken = ""
        if not options.module_only:
            self._load_run(reader, options)

    def _load_values(self, reader: Reader, flat: Flat) -> None:
        values = cast(torch.Tensor, flat.values)  # in memory, since they are changed
        target, kind = (values, WEIGHT) if flat.master is None else (cast(torch.Tensor, flat.master), MASTER)
        for name, start, stop, first in flat.parts:
            if name in self._names:
                reader.read_into(self._names[name], kind, target[start:stop], first)
        if target is not values:
            values.copy_(target)

    def _load_states(self, reader: Reader, flat: Flat, master: torch.Tensor) -> None:
        parts = [(self._names[part.name], part) for part in flat.parts if part.name in self._names]
        state: dict[str, Any] = {}
        scalars: dict[str, list[Any]] = {}
        for parameter, part in parts:
            for kind in parameter.pieces:
                if kind in (WEIGHT, MASTER):
                    continue
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
        optimizer = self._engine.optimizer.optimizer
        optimizer.state.pop(master, None)
        if state:
            optimizer.state[master] = state

    def _load_by(self, custom_load_fn: Callable[..., Any], reader: Reader) -> None:
        weights = {}
        prefix = self._engine._parts.replica.name_prefix
        for parameter in reader.manifest.parameters:
            if parameter.name.startswith(prefix):
                weight = reader.read(parameter, WEIGHT).view(parameter.shape)
                weights.update({name.removeprefix(prefix): weight for name in (parameter.name, *parameter.tied)})
        for owner in owners(self._engine):
            owner.begin_use()
        custom_load_fn(src=weights, dst=self._engine.module)
        for owner in owners(self._engine):
            owner.keep_changes()
            owner.end_use()

    def _load_run(self, reader: Reader, options: LoadOptions) -> None:
        engine = self._engine
        for name in COUNTERS:
            setattr(engine, name, int((reader.state("engine") or {}).get(name, 0)))
        engine._window_steps = 0
        if self._wants_states(options):
            for group, saved in zip(engine.optimizer.param_groups, reader.manifest.param_groups):
                group.update({k: v for k, v in reader.value(saved).items() if k not in MACHINE_OPTIONS})
            if reader.manifest.state.get("loss_scaler"):
                engine._scaler.load_state_dict(reader.state("loss_scaler"))
        scheduler, position = reader.state("lr_scheduler"), reader.state("dataloader")
        if options.lr_scheduler_states and scheduler is not None and hasattr(engine.lr_scheduler, "load_state_dict"):
            engine.lr_scheduler.load_state_dict(scheduler)
        if position is not None and hasattr(engine.training_dataloader, "load_state_dict"):
            engine.training_dataloader.load_state_dict(position)
        saved_rngs = reader.manifest.state.get("rng") or []
        if len(saved_rngs) == self._ranks.size:
            own = reader.value(saved_rngs[self._ranks.rank])
            restore_rng(own)
            for name, buffer in own["buffers"].items():
                if name in self._names and options.custom_load_fn is None:
                    self._buffers[name].copy_(buffer)
        elif saved_rngs and self._ranks.rank == 0:
            logger.info("random numbers go on anew: the checkpoint was saved by %d ranks", len(saved_rngs))


def _foreign(reader: Reader, told: Sequence[set[str]]) -> list[str]:
    """What of the checkpoint no rank has, by the names that they told of."""
    known = set().union(*told)
    return [p.name for p in reader.manifest.parameters if not known & {p.name, *p.tied}]


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to what `save.rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
