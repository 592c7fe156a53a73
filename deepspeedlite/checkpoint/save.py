"""Saving: each rank writes its own shards, rank 0 the manifest; in the background where the configuration says so.

A step that fails on one rank fails on all (`coordination`), before the tag's directory appears. With `async_save` the
tensors are copied to host memory, the rest happens in a thread, and the next save, load, or `destroy` waits for it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.coordination import Ranks
from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.manifest import MASTER, WEIGHT, Manifest, Parameter, Piece, encode
from deepspeedlite.checkpoint.merge import Holding, merge
from deepspeedlite.checkpoint.rng import rng_state
from deepspeedlite.checkpoint.state_map import Flat, flats_of, parameters_of, with_extra_state
from deepspeedlite.checkpoint.tag import check_new_tag
from deepspeedlite.checkpoint.tensors import FileRecord, bytes_of
from deepspeedlite.checkpoint.train_state import MACHINE_OPTIONS, TrainState
from deepspeedlite.checkpoint.writer import TagWriter, survey
from deepspeedlite.config.sections.storage import Checkpoint
from deepspeedlite.offload.swap_file import DiskTensor
from deepspeedlite.runtime.device import device_in_use, on_accelerator
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import logger


@dataclass
class RankPart:
    """What one rank writes, and what it tells rank 0 about it."""

    file: str
    tensors: dict[str, torch.Tensor | DiskTensor] = field(default_factory=dict)
    pieces: dict[str, dict[str, list[Piece]]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # of modules, encoded
    rng: Any = None  # what is this rank's own, encoded
    run: dict[str, Any] = field(default_factory=dict)  # of the manifest, what rank 0 says for all

    def add_tensor(self, tensor: torch.Tensor) -> list[str]:
        """A place for a tensor that belongs to no parameter."""
        name = f"value.{len(self.tensors)}"
        self.tensors[name] = tensor.detach().cpu().contiguous()
        return [self.file, name]

    def add_flat(self, number: int, flat: Flat, rank: int, size: int) -> None:
        """This rank's slice of a flat: values, or masters from which they follow, and optimizer states."""
        start, stop = flat.slice_of(rank, size)
        kinds = {WEIGHT: flat.values} if flat.master is None or flat.master is flat.values else {MASTER: flat.master}
        scalars = {}
        for name, value in flat.state.items():
            if isinstance(value, DiskTensor) or (isinstance(value, torch.Tensor) and value.shape == (flat.numel,)):
                kinds[name] = value
            elif isinstance(value, torch.Tensor) and value.dim() > 0:
                raise CheckpointError(
                    f"optimizer state {name} of {flat.parts[0].name} has shape {tuple(value.shape)}: neither one value "
                    "nor one per element"
                )
            else:
                scalars[name] = encode(value, f"optimizer state {name}", self.add_tensor)
        for part in flat.parts:
            if scalars:
                self.scalars[part.name] = scalars
        if start == stop:
            return
        for kind, tensor in kinds.items():
            name = f"{kind}.{number}"
            self.tensors[name] = tensor[start:stop]
            for part in flat.parts:
                first, last = max(part.start, start), min(part.stop, stop)
                if first < last:
                    piece = Piece(self.file, name, first - start, part.first + first - part.start, last - first)
                    self.pieces.setdefault(part.name, {}).setdefault(kind, []).append(piece)

    def add_buffer(self, name: str, buffer: torch.Tensor) -> None:
        """A whole buffer."""
        self.tensors[f"buffer.{name}"] = buffer.detach().reshape(-1)
        piece = Piece(self.file, f"buffer.{name}", 0, 0, buffer.numel())
        self.pieces[name] = {WEIGHT: [piece] if piece.numel else []}


def describe_run(state: TrainState, part: RankPart) -> dict[str, Any]:
    """Of the manifest, what no parameter has, and which rank 0 tells for all."""
    if state.reducer.has_grads:
        logger.warning("a checkpoint in the middle of a batch does not hold the gradients accumulated so far")
    run: dict[str, Any] = {"stage": state.stage, "global_steps": state.counters["global_steps"]}
    run["model_parallel"] = state.replica.parts
    if state.optimizer is not None:
        run["optimizer"] = type(state.optimizer.optimizer).__name__
        groups = [
            {k: v for k, v in group.items() if k not in MACHINE_OPTIONS} for group in state.optimizer.param_groups
        ]
        run["param_groups"] = encode(groups, "optimizer.param_groups", part.add_tensor)
    parts = {"loss_scaler": state.loss_scaler, "lr_scheduler": state.lr_scheduler, "dataloader": state.dataloader}
    values = {
        "engine": state.counters,
        **{name: held.state_dict() if hasattr(held, "state_dict") else None for name, held in parts.items()},
        "config": json.loads(json.dumps(state.config, default=str)),
        "client_state": state.client_state,
    }
    run["state"] = {name: encode(value, name, part.add_tensor) for name, value in values.items()}
    return run


def checksums(buffers: dict[str, torch.Tensor]) -> dict[str, int]:
    """By which ranks find out which buffers differ among them, such as the statistics of batch norms."""
    return {name: zlib.crc32(bytes_of(buffer.cpu().contiguous())) for name, buffer in buffers.items()}


class _Decided(NamedTuple):
    """What rank 0 decides for all ranks, before anything is written."""

    tag: str
    suffix: str  # of new files' names, so that they are not those of files that are there
    number: str  # of the save
    buffers: dict[str, int]  # checksums of those that are written for all
    left_out: dict[int, set[str]]  # see `merge.Merged`


def _collect(state: TrainState, exclude_frozen: bool, part: RankPart, decided: _Decided) -> None:
    """Put into `part` what this rank writes: its share of what its data-parallel group writes, and its own."""
    for unit in state.reducer.units:
        unit.flat.verify_attached()
    group, elsewhere = state.group, decided.left_out.get(state.group.ranks[0], set())
    entries, buffers = parameters_of(state, exclude_frozen)
    wanted = {entry.name for entry in entries} - elsewhere
    for number, flat in enumerate(flats_of(state)):
        parts = [piece for piece in flat.parts if piece.name in wanted]
        if parts:
            part.add_flat(number, replace(flat, parts=parts), group.rank, group.size)
    own = {name: buffers[name] for name, crc in checksums(buffers).items() if crc != decided.buffers.get(name)}
    part.rng = encode({**rng_state(), "buffers": own}, "what is this rank's own", part.add_tensor)
    if group.rank != 0:
        return
    for name in filter(wanted.__contains__, buffers):
        part.add_buffer(name, buffers[name])
    for name, module in with_extra_state(state).items():
        part.extra[name] = encode(module.get_extra_state(), f"get_extra_state() of {name}", part.add_tensor)


class _Background:
    """The thread of the save that goes on, if there is one, and how it failed: told by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        atexit.register(self._end_in_failure)  # by then threads have been joined

    def _end_in_failure(self) -> None:
        """End a process with status 1 that would have ended well although its last checkpoint was not saved."""
        if self._failure is not None:
            logger.error("this process ends with status 1: a checkpoint was not saved (%s)", self._failure)
            logging.shutdown()
            sys.stdout.flush()
            os._exit(1)

    def start(self, save: Callable[[], None]) -> None:
        """Save meanwhile."""
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint")
        self._thread.start()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            logger.error("%s", error)
            self._failure = error

    def wait(self) -> None:
        """Wait for it, and raise what it has raised."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """There will be no other."""
        atexit.unregister(self._end_in_failure)


class Saver:
    """Saves the states of one engine, one after the other."""

    records: tuple[type, ...] = (
        Holding,
        Parameter,
        Piece,
        FileRecord,
        RankPart,
        _Decided,
    )  # that ranks tell each other

    def __init__(self, settings: Checkpoint, ranks: Ranks, formats: Formats) -> None:
        self._settings, self._ranks, self._formats = settings, ranks, formats
        self._background = _Background() if settings.async_save else None
        # What a save in the background writes from, by the tensors' names: the next save's are copied into the same
        # memory, which costs much to allocate and pin.
        self._host: dict[str, torch.Tensor] = {}
        # Of the disk that offloading uses: cleared while a save in the background reads what is there.
        self._has_read = threading.Event()

    def check(self, state: TrainState) -> None:
        """Raise where `state` cannot be saved, before hours of training."""

    def save(
        self,
        state: TrainState,
        save_dir: str | Path,
        tag: Any = None,
        save_latest: bool = True,
        exclude_frozen: bool = False,
    ) -> None:
        """Write a checkpoint of `state` under `save_dir/tag` (`global_step<N>` if None). Collective.

        Args:
            state: what there is to save.
            save_dir: the folder of tags; made if it is missing.
            tag: a folder's name.
            save_latest: have the file `latest` name it.
            exclude_frozen: leave out parameters that are not trained.

        Raises:
            CheckpointError: on every rank the same; what was saved before is as it was.
        """
        self.wait()
        self._ranks.meet("save_checkpoint", self.records)
        entries: list[Parameter] = []  # of the whole model, on rank 0

        def decide() -> _Decided:
            name = self._one_of([name for name, _ in told])
            suffix = survey(Path(save_dir), name, self._formats)
            merged = merge([holding for _, holding in told if holding is not None])
            entries.extend(merged.entries)
            return _Decided(name, suffix, secrets.token_hex(8), merged.checksums, merged.left_out)

        def collect() -> None:
            _collect(state, exclude_frozen, part, decided)
            if self._ranks.rank == 0:
                part.run = {**describe_run(state, part), "tag": decided.tag, "frozen_excluded": exclude_frozen}
            if self._background is not None:
                self._snapshot(part)

        told = self._ranks.each("save_checkpoint", partial(self._tell, state, save_dir, tag, exclude_frozen))
        decided = self._ranks.first("save_checkpoint", decide)
        part = RankPart(f"rank_{self._ranks.rank:05d}{decided.suffix}.safetensors")
        what = f"saving checkpoint {decided.tag} to {save_dir}"
        try:
            self._ranks.each(what, collect)
        except BaseException:  # another rank's: nothing will read what this one wanted to be read
            self._has_read.set()
            raise
        writer = TagWriter(save_dir, decided.tag, self._settings.fsync, decided.number, self._formats)
        finish = partial(self._finish, writer, part, entries, save_latest, what)
        if self._background is None:
            finish()
        else:
            self._background.start(finish)

    def _tell(
        self, state: TrainState, save_dir: str | Path, tag: Any, exclude_frozen: bool
    ) -> tuple[str, Holding | None]:
        """The tag that this rank was given, and what its group holds, which the group's first rank tells."""
        name = check_new_tag(f"global_step{state.counters['global_steps']}" if tag is None else tag, self._formats)
        check_folder(save_dir, "save_checkpoint")
        if state.group.rank != 0:
            return name, None
        held, buffers = parameters_of(state, exclude_frozen)
        return name, Holding(state.group.ranks[0], held, checksums(buffers))

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: it failed.
        """
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Wait likewise; nothing is saved any more, or the process does not look after it at its end."""
        try:
            self.wait()
        finally:
            if self._background is not None:
                self._background.close()

    def _one_of(self, tags: list[str]) -> str:
        if len(set(tags)) > 1 and self._settings.tag_validation != "ignore":
            shown = ", ".join(f"rank {rank}: {tag!r}" for rank, tag in enumerate(tags))
            if self._settings.tag_validation == "fail":
                raise CheckpointError(f"the ranks save under different tags ({shown}); pass the same tag on all")
            logger.warning("the ranks save under different tags (%s); rank 0's is taken", shown)
        return tags[0]

    def _snapshot(self, part: RankPart) -> None:
        """Copy to host memory that is kept for the next save: pinned where there is a GPU to copy from.

        What is on the disk is read while the training goes on, until it is to change: see `SwapFile.has_been_read`.
        """
        copies: dict[str, torch.Tensor] = {}
        stored: dict[str, DiskTensor] = {}
        for name, tensor in part.tensors.items():
            if isinstance(tensor, DiskTensor):
                stored[name] = tensor
                continue
            host = self._host.get(name)
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator(tensor))
            if on_accelerator(tensor):
                host.copy_(tensor.detach(), non_blocking=True)
            elif tensor.numel():  # memmove, which writes large tensors past the caches: in 60 % of the time of copy_
                bytes_of(host)[:] = bytes_of(tensor)
            copies[name] = host
        device_in_use().synchronize()
        self._host, part.tensors = copies, {**copies, **stored}
        if stored:
            self._has_read = next(iter(stored.values())).swap_file.has_been_read
            self._has_read.clear()

    def _finish(
        self, writer: TagWriter, part: RankPart, entries: list[Parameter], save_latest: bool, what: str
    ) -> None:
        ranks = self._ranks

        def prepare() -> None:
            suffix = part.file.removeprefix("rank_00000")  # on rank 0
            leftovers = writer.prepare([f"rank_{rank:05d}{suffix}" for rank in range(ranks.size)], save_latest)
            if leftovers:
                logger.warning(
                    "removed what interrupted saves had left in %s: %s", writer.save_dir, ", ".join(leftovers)
                )

        def write() -> tuple[FileRecord, RankPart]:
            record = writer.write(part.file, part.tensors)
            self._has_read.set()
            return record, replace(part, tensors={})

        def commit() -> None:
            parts = [part for _, part in told]
            manifest = Manifest(
                [whole(entry, parts) for entry in entries],
                {part.file: record for record, part in told},
                world_size=ranks.size,
                **part.run,
            )
            manifest.state["rng"] = [part.rng for part in parts]
            manifest.state["extra_state"] = {
                name: value for part in reversed(parts) for name, value in part.extra.items()
            }
            writer.commit(manifest, self._settings.keep_last)

        try:
            ranks.first(what, prepare)
            told = ranks.each(what, write)
            ranks.first(what, commit)
        except BaseException:
            if ranks.rank == 0:  # every rank has stopped writing, or was interrupted
                writer.discard()
            raise
        finally:
            self._has_read.set()


def whole(entry: Parameter, parts: Sequence[RankPart]) -> Parameter:
    """A parameter with what the ranks wrote of it."""
    held = [part.pieces.get(entry.name, {}) for part in parts]
    pieces = {}
    for kind in dict.fromkeys(kind for each in held for kind in each):
        written = [piece for each in held for piece in each.get(kind, []) if piece.numel]
        pieces[kind] = sorted(written, key=lambda piece: piece.start)
    scalars = next((found for part in parts if (found := part.scalars.get(entry.name))), {})
    return replace(entry, pieces=pieces or {WEIGHT: []}, scalars=scalars)  # without pieces: no elements
