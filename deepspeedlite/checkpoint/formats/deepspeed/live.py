"""A training run read as if it were a checkpoint: what `writer.Files` is given where nothing lies on a disk yet.

Each rank holds two files that there are not: its own, of what is sharded, and `COMMON`, of what every rank has alike.
What they hold is told to all (`Described`), their elements are not: what a rank reads of its own is copied at once,
and what it reads of another's is noted down, for `exchange` to bring all of it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.formats.deepspeed.exchange import Range, Want
from deepspeedlite.checkpoint.manifest import WEIGHT, Manifest, Parameter, encode
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.save import RankPart, describe_run, whole
from deepspeedlite.checkpoint.state_map import flats_of, parameters_of, with_extra_state
from deepspeedlite.checkpoint.tensors import FileRecord, TensorInfo
from deepspeedlite.checkpoint.train_state import TrainState
from deepspeedlite.offload.swap_file import DiskTensor

COMMON = "common"
Held = torch.Tensor | DiskTensor


class Told(NamedTuple):
    """What one rank tells of what it holds; both parts are without tensors."""

    own: RankPart
    common: RankPart
    tensors: dict[str, TensorInfo]  # of its own file
    common_tensors: dict[str, TensorInfo]
    values: dict[tuple[str, str], torch.Tensor]  # of no parameter, by file and name: these are small


@dataclass(frozen=True)
class Described:
    """What all ranks hold."""

    manifest: Manifest
    tensors: dict[str, dict[str, TensorInfo]]  # by file
    values: dict[tuple[str, str], torch.Tensor]
    owners: dict[str, int]  # of files


class Holding:
    """What this rank holds, from its construction until the save ends; nothing is copied.

    Raises:
        CheckpointError: it has what no checkpoint can hold.
    """

    def __init__(self, state: TrainState, rank: int, exclude_frozen: bool, tag: str) -> None:
        for unit in state.reducer.units:
            unit.flat.verify_attached()
        self.own, self.common = RankPart(f"rank_{rank:05d}"), RankPart(COMMON)
        self.entries, buffers = parameters_of(state, exclude_frozen)
        wanted = {entry.name for entry in self.entries}
        for flat in flats_of(state):
            parts = [piece for piece in flat.parts if piece.name in wanted]
            if parts:
                into = self.common if flat.replicated else self.own
                # The number of those before it in the same file: all ranks number what they have alike alike.
                into.add_flat(len(into.tensors), replace(flat, parts=parts), 0, 1)
        for name, buffer in buffers.items():
            self.common.add_buffer(name, buffer)
        for name, module in with_extra_state(state).items():
            self.own.extra[name] = encode(module.get_extra_state(), f"get_extra_state() of {name}", self.own.add_tensor)
        if rank == 0:
            self.own.run = {**describe_run(state, self.own), "tag": tag, "frozen_excluded": exclude_frozen}
        # Weights that are here whole, under their names: they need not be made of masters that others hold.
        shapes = {entry.name: entry.shape for entry in self.entries}
        named = [*state.module.named_parameters(), *buffers.items()]
        self.weights = {name: tensor for name, tensor in named if shapes.get(name) == tuple(tensor.shape)}

    def tell(self) -> Told:
        """What others are to know of it."""
        parts = (self.own, self.common)
        values = {(part.file, n): t for part in parts for n, t in part.tensors.items() if n.startswith("value.")}
        own, common = ({n: _info(t) for n, t in part.tensors.items()} for part in parts)
        return Told(replace(self.own, tensors={}), replace(self.common, tensors={}), own, common, values)  # type: ignore[arg-type]

    def read_own(self, tensor: str, first: int, out: torch.Tensor) -> None:
        """Fill the 1-D `out`, in host memory, with elements of one of the tensors that others do not have."""
        _copy(self.own.tensors[tensor], first, out)

    def read_common(self, tensor: str, first: int, out: torch.Tensor) -> None:
        """The same of what all ranks have alike."""
        _copy(self.common.tensors[tensor], first, out)


def _copy(held: Held, first: int, out: torch.Tensor) -> None:
    part = held[first : first + out.numel()]
    if not isinstance(part, DiskTensor):
        out.copy_(part.detach())
        return
    done = 0
    for piece in part.pieces():
        out[done : done + piece.numel()].copy_(piece)
        done += piece.numel()


def _info(tensor: Held) -> TensorInfo:
    return TensorInfo(0, tensor.dtype, tuple(tensor.shape))


def describe(told: Sequence[Told], entries: Sequence[Parameter]) -> Described:
    """Put together what all ranks have told. On rank 0."""
    first = told[0]
    parts = [*(each.own for each in told), first.common]
    tensors = {each.own.file: each.tensors for each in told} | {COMMON: first.common_tensors}
    manifest = Manifest(
        [whole(entry, parts) for entry in entries],
        {file: FileRecord(0, 0) for file in tensors},
        world_size=len(told),
        **first.own.run,
    )
    manifest.state["extra_state"] = first.own.extra
    values = {key: value for each in reversed(told) for key, value in each.values.items()}
    return Described(manifest, tensors, values, {each.own.file: rank for rank, each in enumerate(told)})


class LiveReader(Reader):
    """Reads what all ranks hold, once `exchange` has brought what it noted in `wanted`, by the rank that has it."""

    def __init__(self, path: Path, described: Described, holding: Holding) -> None:
        self.path, self._fds = path, {}
        self.manifest, self._tensors = described.manifest, described.tensors
        self._values, self._owners, self._holding = described.values, described.owners, holding
        self.wanted: dict[int, list[Want]] = {}
        self._index()

    def read(self, parameter: Parameter, kind: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `Reader.read`; what others hold of it is there after the exchange."""
        here = self._holding.weights.get(parameter.name) if kind == WEIGHT else None
        if here is None:
            return super().read(parameter, kind, start, stop)
        return here.detach().reshape(-1)[start:stop].to("cpu", copy=True)

    def _fill(self, file: str, tensor: str, first: int, out: torch.Tensor) -> None:
        if file == COMMON:
            self._holding.read_common(tensor, first, out)
        elif file == self._holding.own.file:
            self._holding.read_own(tensor, first, out)
        else:
            dtype = self._tensors[file][tensor].dtype
            asked = Range(tensor, first, out.numel(), dtype.itemsize)
            self.wanted.setdefault(self._owners[file], []).append(Want(asked, dtype, out))

    def _tensor(self, reference: Sequence[str]) -> Any:
        file, name = reference
        return self._values[file, name]
