"""Writes checkpoints that DeepSpeed loads: one of ours, or of its own, for a chosen ZeRO stage and number of ranks.

One rank's partitions are in memory at a time, and below stage 3 the model's weights. The run that loads the files must
have the configuration that the checkpoint was saved with, but for stage and ranks: DeepSpeed's files depend on it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.files import check_folder, sync_dir
from deepspeedlite.checkpoint.formats.deepspeed.layout import (
    Span,
    dealt,
    joined_numel,
    joined_spans,
    model_file,
    optimizer_file,
    piece_numel,
    split_spans,
)
from deepspeedlite.checkpoint.formats.deepspeed.pickles import DynamicLossScaler, LossScaler, save_for_deepspeed
from deepspeedlite.checkpoint.formats.deepspeed.reader import RESERVED
from deepspeedlite.checkpoint.manifest import DTYPES, MASTER, WEIGHT, Parameter
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tag import LATEST, check_tag
from deepspeedlite.checkpoint.train_state import EXTRA_STATE
from deepspeedlite.runtime.errors import CheckpointError

VERSION = "0.19.8"  # DeepSpeed's whose layout this is
_DEFAULTS = {
    "gradient_clipping": 1.0,
    "optimizer.type": "",
    "optimizer.params.torch_adam": False,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.sub_group_size": 1_000_000_000,
    "fp16.loss_scale": 0,
    "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2,
    "fp16.min_loss_scale": 1,
    "fp16.consecutive_hysteresis": False,
}
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def export_to_deepspeed(
    reader: Reader,
    out: str | Path,
    stage: int | None = None,
    world_size: int | None = None,
    track: Track = lambda files, title: files,
) -> Path:
    """Write the new folder `out` with a checkpoint under the reader's tag, and `latest`; the tag's folder.

    Args:
        reader: the checkpoint.
        out: must not exist.
        stage: the ZeRO stage that is to go on; the checkpoint's if None.
        world_size: the ranks that are to go on; as many as saved the checkpoint if None.
        track: wraps the files as they are written, to show progress.

    Raises:
        CheckpointError: `out` exists, or the checkpoint has what DeepSpeed's cannot hold.
        OSError: it cannot be written; nothing is left.
    """
    out = check_folder(out, "exporting")
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; name a new folder")
    manifest = reader.manifest
    if manifest.model_parallel > 1:
        raise CheckpointError(
            f"{reader.path} is of model-parallel size {manifest.model_parallel}: an export of the pieces of "
            "tensor-parallel parameters is not in this release; to_fp32 gives each rank's weights by its own names"
        )
    stage = manifest.stage if stage is None else stage
    export = Files(reader, stage, manifest.world_size if world_size is None else world_size)
    files = list(export.files())
    tag = check_tag(manifest.tag)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp.{out.name}-{secrets.token_hex(4)}")
    (temporary / tag).mkdir(parents=True)
    try:
        for name, content in track(files, f"writing {out}"):
            save_for_deepspeed(content(), temporary / tag / name)
        with (temporary / LATEST).open("w") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        sync_dir(temporary / tag)
        sync_dir(temporary)
        os.rename(temporary, out)
        sync_dir(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out / tag


@dataclass
class _Group:
    """What is stepped together: at stages 1 and 2 a param group, at stage 3 a part of one."""

    number: int  # of the param group
    parameters: list[Parameter]

    @property
    def shapes(self) -> OrderedDict[str, torch.Size]:
        return OrderedDict((p.name, torch.Size(p.shape)) for p in self.parameters)

    @property
    def kinds(self) -> list[str]:
        found = dict.fromkeys(kind for p in self.parameters for kind in p.pieces)
        return [kind for kind in found if kind not in (WEIGHT, MASTER)]


class Files:
    """The files' contents, of whatever the reader reads."""

    def __init__(self, reader: Reader, stage: int, world: int) -> None:
        self._reader, self._stage, self._world = reader, stage, world
        manifest = reader.manifest
        if manifest.optimizer is None:
            raise CheckpointError(
                f"{reader.path} has no optimizer that DeepSpeed could go on with; to_fp32 takes weights"
            )
        if stage not in range(4) or world < 1:
            raise CheckpointError(f"there is no ZeRO stage {stage} of {world} ranks")
        by_group: dict[int, list[Parameter]] = {}
        for parameter in sorted(manifest.parameters, key=lambda p: p.position or 0):
            if parameter.group is not None and parameter.numel:
                by_group.setdefault(parameter.group, []).append(parameter)
        self._groups = [_Group(number, by_group[number]) for number in sorted(by_group)]
        self._trained = {p.name for group in self._groups for p in group.parameters}
        self._frozen = [p for p in manifest.parameters if not p.buffer and p.name not in self._trained]
        dtypes = {DTYPES[p.dtype] for group in self._groups for p in group.parameters}
        if len(dtypes) > 1:
            raise CheckpointError(f"{reader.path} was trained in several dtypes, {dtypes}; DeepSpeed trains in one")
        self._dtype = dtypes.pop() if dtypes else torch.float32

    def _setting(self, path: str) -> Any:
        """What the configuration of the run that saved the checkpoint has under a key, or DeepSpeed's default."""
        found: Any = self._reader.state("config") or {}
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        default = _DEFAULTS[path]
        return found if isinstance(found, str if isinstance(default, str) else (bool, int, float)) else default

    def files(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each file's name, and what gives its content."""
        for rank in range(self._world if self._stage == 3 else 1):
            yield model_file(rank, self._stage), partial(self._model_states, rank)
        bf16 = self._dtype is torch.bfloat16
        for rank in range(self._world if self._stage > 0 else 0):
            yield optimizer_file(rank, bf16), partial(self._optimizer_states, rank)

    # --- weights and counters -------------------------------------------------------------------------------------

    def _model_states(self, rank: int) -> dict[str, Any]:
        reader, zero = self._reader, self._stage > 0
        counters = reader.state("engine") or {}
        client_state = reader.state("client_state") or {}
        taken = sorted(RESERVED & client_state.keys())
        if taken:
            raise CheckpointError(f"client_state has {', '.join(taken)}, which DeepSpeed keeps for itself")
        frozen = self._stage >= 2 and not reader.manifest.frozen_excluded
        fragments = {p.name: self._frozen_fragment(p, rank) for p in self._frozen} if frozen else None
        return {
            "module": self._module(),
            "buffer_names": [p.name for p in reader.manifest.parameters if p.buffer],
            "optimizer": None if zero else self._whole_optimizer(),
            "param_shapes": [group.shapes for group in self._stepped()] if zero else None,
            "frozen_param_shapes": OrderedDict((p.name, torch.Size(p.shape)) for p in self._frozen) if frozen else None,
            "shared_params": {n: p.name for p in reader.manifest.parameters for n in p.tied} if zero else None,
            "frozen_param_fragments": OrderedDict(fragments) if fragments is not None else None,
            "lr_scheduler": reader.state("lr_scheduler"),
            "data_sampler": None,
            "random_ltd": None,
            **{name: counters.get(name, 0) for name in ("skipped_steps", "global_steps", "global_samples")},
            "dp_world_size": self._world,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": reader.state("config") or {},
            "ds_version": VERSION,
            **client_state,
        }

    def _module(self) -> OrderedDict[str, torch.Tensor]:
        """All weights; at stage 3 placeholders for all but the buffers."""
        module: OrderedDict[str, torch.Tensor] = OrderedDict()
        for p in self._reader.manifest.parameters:
            if self._stage == 3 and not p.buffer:
                value = torch.empty(0, dtype=DTYPES[p.dtype])
            else:
                value = self._reader.read(p, WEIGHT).view(p.shape)
            module.update(dict.fromkeys((p.name, *p.tied), value))
        for name, state in (self._reader.state("extra_state") or {}).items():
            module[f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE] = state
        return module

    def _frozen_fragment(self, p: Parameter, rank: int) -> torch.Tensor:
        if self._stage < 3:
            return self._reader.read(p, WEIGHT).view(p.shape)
        fragment = torch.zeros(piece_numel(p.shape, self._world), dtype=DTYPES[p.dtype])
        for span in split_spans({p.name: p.shape}, self._world):
            if span.rank == rank:
                self._reader.read_into(p, WEIGHT, fragment[: span.numel], span.start)
        return fragment

    # --- the optimizer --------------------------------------------------------------------------------------------

    def _stepped(self) -> list[_Group]:
        """The groups as DeepSpeed orders them: `round_robin_gradients` deals parameters out, `sub_group_size` cuts."""
        if self._stage < 3:
            hands = self._world if self._setting("zero_optimization.round_robin_gradients") else 1
            orders = [(group, dealt(len(group.parameters), hands)) for group in self._groups]
            return [_Group(group.number, [group.parameters[i] for i in order]) for group, order in orders]
        most = int(self._setting("zero_optimization.sub_group_size"))
        cut: list[_Group] = []
        for group in self._groups:
            room = 0
            for parameter in group.parameters:
                if room <= 0:
                    cut.append(_Group(group.number, []))
                    room = most
                cut[-1].parameters.append(parameter)
                room -= piece_numel(parameter.shape, self._world)
        return cut

    def _optimizer_states(self, rank: int) -> dict[str, Any]:
        groups = self._stepped()
        layouts = [self._layout(group) for group in groups]
        masters = [self._partition(group, MASTER, rank, *layout) for group, layout in zip(groups, layouts)]
        states = [
            {kind: self._partition(group, kind, rank, *layout) for kind in group.kinds}
            for group, layout in zip(groups, layouts)
        ]
        base = self._base(groups, states)
        scaler = self._loss_scaler()
        held: dict[str, Any] = {
            "zero_stage": self._stage,
            "loss_scaler": scaler,
            "dynamic_loss_scale": isinstance(scaler, DynamicLossScaler),
            "overflow": False,
        }
        if self._stage == 3:
            held |= {"partition_count": self._world, "optimizer_state_dict": base, "fp32_flat_groups": masters}
        else:
            inside = [sum(p.numel for p in g.parameters) - rank * numel for g, (numel, _) in zip(groups, layouts)]
            used = [min(max(more, 0), master.numel()) for more, master in zip(inside, masters)]
            held |= {
                "partition_count": [self._world] * len(groups),
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": [master[:numel] for master, numel in zip(masters, used)],
                "group_paddings": [master.numel() - numel for master, numel in zip(masters, used)],
                "clip_grad": float(self._setting("gradient_clipping")),
                "ds_version": VERSION,
            }
        return {"optimizer_state_dict": held, "ds_config": self._reader.state("config") or {}, "ds_version": VERSION}

    def _layout(self, group: _Group) -> tuple[int, list[Span]]:
        """A rank's partition in elements, and where the group's parameters lie."""
        if self._stage == 3:
            numel = sum(piece_numel(p.shape, self._world) for p in group.parameters)
            return numel, list(split_spans(group.shapes, self._world))
        numel = joined_numel(group.shapes, self._world)
        return numel, list(joined_spans(group.shapes, numel))

    def _partition(self, group: _Group, kind: str, rank: int, numel: int, spans: list[Span]) -> torch.Tensor:
        flat = torch.zeros(numel, dtype=self._dtype_of(group, kind))
        parameters = {p.name: p for p in group.parameters}
        for span in spans:
            p = parameters[span.name]
            if span.rank == rank and (kind == MASTER or kind in p.pieces):
                self._reader.read_into(p, kind, flat[span.offset : span.offset + span.numel], span.start)
        return flat

    def _dtype_of(self, group: _Group, kind: str) -> torch.dtype:
        if kind == MASTER:
            return torch.float64 if self._dtype is torch.float64 else torch.float32
        return next(self._reader.stored_dtype(p, kind) for p in group.parameters if kind in p.pieces)

    def _base(self, groups: list[_Group], states: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """A torch optimizer's state dict in which each of `groups` is one parameter."""
        numbers: dict[int, list[int]] = {}
        found: dict[int, dict[str, Any]] = {}
        for index, (group, elements) in enumerate(zip(groups, states)):
            numbers.setdefault(group.number, []).append(index)
            scalars = self._scalars(group)
            if elements or scalars:
                found[index] = {**scalars, **elements}
        return {"state": found, "param_groups": self._options(numbers, found)}

    def _options(self, numbers: dict[int, list[int]], states: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        options = []
        for number, indices in numbers.items():
            group = {**self._reader.value(self._reader.manifest.param_groups[number]), "params": indices}
            steps = [states[index]["step"] for index in indices if "step" in states.get(index, {})]
            # What DeepSpeed's Adams look up and torch's do not keep.
            defaults = {"bias_correction": True, "amsgrad": False} if "exp_avg_sq" in self._kinds() else {}
            options.append({**defaults, **group, **({"step": max(steps)} if steps else {})})
        return options

    def _kinds(self) -> set[str]:
        return {kind for group in self._groups for kind in group.kinds}

    def _scalars(self, group: _Group) -> dict[str, Any]:
        """States that are one value. Step counts are integers, which all of DeepSpeed's and torch's optimizers take."""
        values: dict[str, list[Any]] = {}
        for p in group.parameters:
            for name, encoded in p.scalars.items():
                values.setdefault(name, []).append(self._reader.value(encoded))
        return {n: max(int(v) for v in found) if n == "step" else found[0] for n, found in values.items()}

    # --- stage 0 --------------------------------------------------------------------------------------------------

    def _whole_optimizer(self) -> dict[str, Any]:
        """In 16 bit DeepSpeed flattens each group if the optimizer is its FusedAdam, and keeps parameters if not."""
        if self._dtype in (torch.float32, torch.float64):
            return self._base_per_parameter()
        fused = self._setting("optimizer.type").lower() in ("adam", "adamw")
        fused = fused and not self._setting("optimizer.params.torch_adam")
        scaler = self._loss_scaler()
        kept = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
        held: dict[str, Any] = {"cur_iter": 0, **{key: vars(scaler)[key] for key in kept if key in vars(scaler)}}
        held["dynamic_loss_scale"] = isinstance(scaler, DynamicLossScaler)
        held["clip_grad"] = float(self._setting("gradient_clipping"))
        if not fused:
            return {**held, "optimizer_state_dict": self._base_per_parameter(), "fp32_groups": self._whole_masters()}
        layouts = [self._layout_of_whole(group) for group in self._groups]
        states = [
            {kind: self._partition(group, kind, 0, *layout) for kind in group.kinds}
            for group, layout in zip(self._groups, layouts)
        ]
        masters = [self._partition(group, MASTER, 0, *layout) for group, layout in zip(self._groups, layouts)]
        return {**held, "optimizer_state_dict": self._base(self._groups, states), "fp32_groups_flat": masters}

    def _layout_of_whole(self, group: _Group) -> tuple[int, list[Span]]:
        numel = sum(p.numel for p in group.parameters)
        return numel, list(joined_spans(group.shapes, numel))

    def _singles(self) -> list[_Group]:
        return [_Group(group.number, [p]) for group in self._groups for p in group.parameters]

    def _whole(self, single: _Group, kind: str) -> torch.Tensor:
        return self._partition(single, kind, 0, *self._layout_of_whole(single)).view(single.parameters[0].shape)

    def _base_per_parameter(self) -> dict[str, Any]:
        singles = self._singles()
        return self._base(singles, [{kind: self._whole(single, kind) for kind in single.kinds} for single in singles])

    def _whole_masters(self) -> list[list[torch.Tensor]]:
        return [[self._whole(_Group(g.number, [p]), MASTER) for p in g.parameters] for g in self._groups]

    # --- the loss scale -------------------------------------------------------------------------------------------

    def _loss_scaler(self) -> LossScaler | DynamicLossScaler:
        state = self._reader.state("loss_scaler") or {}
        scaler: Any = LossScaler()
        scaler.cur_scale, scaler.dynamic = float(state.get("scale", 1.0)), False
        if self._dtype is not torch.float16 or self._setting("fp16.loss_scale"):
            return scaler
        scaler, scale, hysteresis = DynamicLossScaler(), scaler.cur_scale, self._setting("fp16.hysteresis")
        vars(scaler).update(
            cur_scale=scale,
            dynamic=True,
            cur_iter=int(state.get("step", 0)),
            last_overflow_iter=int(state.get("last_overflow", -1)),
            scale_factor=2.0,
            scale_window=self._setting("fp16.loss_scale_window"),
            min_scale=self._setting("fp16.min_loss_scale"),
            delayed_shift=hysteresis,
            cur_hysteresis=int(state.get("tolerance", hysteresis)),
            consecutive_hysteresis=self._setting("fp16.consecutive_hysteresis"),
            raise_error_at_min_scale=True,
            dtype=torch.float16,
        )
        return scaler
