"""Reads DeepSpeed's checkpoints of ZeRO stages 0 to 3 as if they were ours: a manifest in memory, ranges on demand.

    TAG/mp_rank_00_model_states.pt                         weights, counters, schedule; at stage 0 the optimizer too
    TAG/zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3: of each rank, with placeholders for weights
    TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: a rank's partitions of masters and states

The files' tensors are mapped, not loaded, so a rank reads what it asks for. `pickles` has why nothing can be run by
them. What they say is put into a `Manifest`, which is then checked as any other is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.foreign import Groups
from deepspeedlite.checkpoint.formats.deepspeed.layout import (
    MODEL_STATES,
    Span,
    dealt,
    joined_spans,
    model_file,
    optimizer_file,
    split_spans,
)
from deepspeedlite.checkpoint.formats.deepspeed.pickles import load_inert, verify_zip
from deepspeedlite.checkpoint.formats.deepspeed.states import (
    UnassignedStatesError,
    options_of,
    param_numbers,
    state_of,
    whole_states,
)
from deepspeedlite.checkpoint.manifest import (
    MASTER,
    WEIGHT,
    Manifest,
    Parameter,
    Piece,
    dtype_name,
    encode,
)
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tensors import FileRecord, TensorInfo
from deepspeedlite.checkpoint.train_state import EXTRA_STATE, MACHINE_OPTIONS
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.runtime.log import logger

# Keys of a file of model states that are DeepSpeed's own; all others are the user's client_state.
RESERVED = {
    *("module", "buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "num_experts"),
    *("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "universal_checkpoint_info"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    *("checkpoint_parallel_dimensions", "sparse_tensor_module_names", "csr_tensor_module_names"),
}
# DeepSpeed does not note which optimizer it was: the states that it keeps tell, or the configuration.
_BY_STATES = {
    frozenset({"exp_avg", "exp_avg_sq"}): "AdamW",
    frozenset({"exp_avg"}): "FusedLion",
    frozenset({"sum"}): "Adagrad",
    frozenset({"momentum_buffer"}): "SGD",
}
_BY_NAME = {
    "adam": "AdamW",
    "adamw": "AdamW",
    "lion": "FusedLion",
    "adagrad": "Adagrad",
    "lamb": "FusedLamb",
    "sgd": "SGD",
}


class DeepSpeedReader(Reader):
    """An open checkpoint of DeepSpeed's.

    Args:
        path: the tag's directory.
        groups: the names of each param group's parameters. Only where DeepSpeed trained in fp32 at stage 0 with
            several groups are they needed: its file does not tell.

    Raises:
        CheckpointError: something is missing, damaged, refused, or of a kind that is not read here.
    """

    def __init__(self, path: str | Path, groups: Groups | None = None) -> None:
        self.path, self._fds = Path(path), {}
        try:
            files = _Files(self.path, groups)
            described = files.describe()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} is not laid out as DeepSpeed does it: {error!r}") from error
        self.tensors = files.tensors
        self.left_out = files.left_out  # why there are no optimizer states, where DeepSpeed's file has some
        self.manifest = Manifest.from_bytes(described.to_bytes(), str(self.path))
        self._tensors = {
            file: {name: TensorInfo(0, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            for file, tensors in self.tensors.items()
        }
        self._index()

    def _fill(self, file: str, tensor: str, first: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[file][tensor].view(-1)[first : first + out.numel()].view(out.shape))

    def verify(self, files: Sequence[str] | None = None) -> None:
        """Compare the checksums that the files have in them, as far as they do."""
        found = [verify_zip(self.path / name) for name in (self.manifest.files if files is None else files)]
        wrong = [problem for problem in found if problem is not None]
        if wrong:
            raise CheckpointError("; ".join(wrong))

    def close(self) -> None:
        """Let go of the files."""
        super().close()
        self.tensors = {}


class _Files:
    """The files of one tag, and the manifest that says what they say."""

    def __init__(self, path: Path, groups: Groups | None) -> None:
        self._path, self._groups = path, groups
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.left_out: str | None = None
        self._loaded: dict[str, dict[str, Any]] = {}
        self._described: Counter[int] = Counter()  # parameters, by group
        self._at_stage_3 = not (path / MODEL_STATES).exists()
        self._first = model_file(0, 3 if self._at_stage_3 else 0)
        self._model = self._load(self._first)
        self._world = int(self._model["dp_world_size"])
        self._refuse_parallel_models()
        self._buffers = set(self._model["buffer_names"] or ())
        module = self._model["module"]
        self._extra = {name: module.pop(name) for name in list(module) if name.split(".")[-1] == EXTRA_STATE}
        self._entries = self._weights()

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._loaded:
            if not (self._path / name).exists():
                raise CheckpointError(
                    f"{self._path / name} is missing: a checkpoint of {self._world} ranks has a file of each. "
                    "(Universal checkpoints are not read here: take the one that this was made from)"
                )
            self._loaded[name] = load_inert(self._path / name)
            if not isinstance(self._loaded[name], dict):
                raise CheckpointError(f"{self._path / name} is not a file of DeepSpeed's")
        return self._loaded[name]

    def _refuse_parallel_models(self) -> None:
        dims = self._model.get("checkpoint_parallel_dimensions") or {}
        degrees = [self._model.get("mp_world_size"), *dims.values()]
        if any(degree not in (None, 1) for degree in degrees) or not isinstance(self._model["module"], dict):
            raise CheckpointError(f"{self._path} is of a model that tensor or pipeline parallelism had divided")
        if "num_experts" in self._model:
            raise CheckpointError(f"{self._path} is of a mixture of experts, whose files are not read here")

    def _put(self, file: str, name: str, tensor: torch.Tensor) -> list[str]:
        """Make a tensor one that pieces and values can refer to."""
        self.tensors.setdefault(file, {})[name] = tensor.detach().contiguous()
        return [file, name]

    def _put_value(self, tensor: torch.Tensor) -> list[str]:
        return self._put(self._first, f"value.{len(self.tensors.get(self._first, ()))}", tensor)

    # --- what there is --------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Parameter]:
        """An entry per weight and buffer, whose trained ones get their pieces later; tied weights are one entry."""
        model = self._model
        shapes = {**(model.get("frozen_param_shapes") or {})}
        for group in model.get("param_shapes") or ():
            shapes.update(group)
        aliases = self._aliases()
        entries: dict[str, Parameter] = {}
        for name, tensor in model["module"].items():
            if name in aliases:
                continue
            shape = tuple(int(extent) for extent in shapes.get(name, tensor.shape))
            entries[name] = Parameter(name, shape, dtype_name(tensor), trainable=False, buffer=name in self._buffers)
        for alias, name in aliases.items():
            if alias in model["module"]:
                entries[name].tied.append(alias)
        return entries

    def _aliases(self) -> dict[str, str]:
        """The name of each tied weight, by its other names."""
        if self._model.get("shared_params") is not None:
            return dict(self._model["shared_params"])
        seen: dict[Any, str] = {}
        aliases = {}
        for name, tensor in self._model["module"].items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and name not in self._buffers and seen.setdefault(key, name) != name:
                aliases[name] = seen[key]
        return aliases

    def describe(self) -> Manifest:
        """The manifest."""
        model = self._model
        stage, options = self._masters_and_states()
        self._place_weights()
        no_frozen = all(p.trainable or p.buffer for p in self._entries.values())
        left_out = MACHINE_OPTIONS | {"step"}
        groups = [{key: value for key, value in group.items() if key not in left_out} for group in options]
        param_groups = encode(groups, "param_groups", self._put_value)
        state = {
            "engine": {name: int(model.get(name, 0)) for name in ("global_steps", "global_samples", "skipped_steps")},
            "lr_scheduler": encode(model.get("lr_scheduler"), "lr_scheduler", self._put_value),
            "loss_scaler": encode(self._loss_scale(stage), "loss_scaler", self._put_value),
            "config": self._config(),
            "extra_state": self._encoded(
                {name.removesuffix(EXTRA_STATE).removesuffix("."): value for name, value in self._extra.items()},
                "extra_state",
            ),
            "client_state": self._encoded(
                {key: value for key, value in model.items() if key not in RESERVED}, "client_state"
            ),
        }
        return Manifest(
            list(self._entries.values()),
            {name: FileRecord((self._path / name).stat().st_size, 0) for name in self.tensors},
            self._path.name,
            self._world,
            stage,
            int(model["global_steps"]),
            frozen_excluded=no_frozen and model.get("frozen_param_shapes") is None,
            optimizer=self._optimizer_name() if options else None,
            param_groups=param_groups,
            state=state,
        )

    def _encoded(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What of the values a checkpoint of ours can hold."""
        kept = {}
        for key, value in values.items():
            try:
                kept[key] = encode(value, f"{where}[{key!r}]", self._put_value)
            except CheckpointError as error:
                logger.warning("left out: %s", error)
        return kept

    def _config(self) -> dict[str, Any]:
        config = self._model.get("ds_config")
        return encode(config, "ds_config", self._put_value) if isinstance(config, dict) else {}

    def _optimizer_name(self) -> str | None:
        configured = str((self._config().get("optimizer") or {}).get("type", ""))
        kinds = {kind for p in self._entries.values() for kind in p.pieces} - {WEIGHT, MASTER, "max_exp_avg_sq"}
        by_name = _BY_NAME.get(configured.lower(), configured or None)
        return by_name if by_name == "FusedLamb" else _BY_STATES.get(frozenset(kinds), by_name)

    def _loss_scale(self, stage: int) -> dict[str, Any] | None:
        """As `LossScaler.state_dict` has it."""
        if stage > 0:
            scaler = self._optimizer_state(0).get("loss_scaler")
            held = vars(scaler) if scaler is not None else {}
        else:
            held = self._model.get("optimizer") or {}
        if "cur_scale" not in held:
            return None
        return {
            "scale": float(held["cur_scale"]),
            "tolerance": int(held.get("cur_hysteresis", 1)),
            "step": int(held.get("cur_iter", 0)),
            "last_overflow": int(held.get("last_overflow_iter", -1)),
        }

    # --- where it lies --------------------------------------------------------------------------------------------

    def _place_weights(self) -> None:
        """Pieces of what has no master: buffers, frozen weights, all weights where there was no optimizer."""
        for name, entry in self._entries.items():
            if WEIGHT in entry.pieces or MASTER in entry.pieces:
                continue
            if entry.numel == 0:
                entry.pieces[WEIGHT] = []
            elif self._at_stage_3 and not entry.buffer:
                shape = {name: entry.shape}
                held = {
                    rank: {WEIGHT: self._load(model_file(rank, 3))["frozen_param_fragments"][name]}
                    for rank in range(self._world)
                }
                files = {rank: model_file(rank, 3) for rank in held}
                self._place(name, split_spans(shape, self._world), held, files)
            else:
                whole = Span(name, 0, 0, 0, entry.numel)
                self._place(name, [whole], {0: {WEIGHT: self._model["module"][name]}}, {0: self._first})

    def _place(
        self,
        label: str,
        spans: Iterable[Span],
        held: Mapping[int, Mapping[str, torch.Tensor]],
        files: Mapping[int, str],
    ) -> None:
        """Pieces of the parameters that `spans` name, in the flat tensors by kind that each rank holds of them."""
        kinds = {kind: None for tensors in held.values() for kind in tensors}
        known: set[tuple[str, str]] = set()
        for span in spans:
            entry = self._entries[span.name]
            if span.rank not in held:
                raise CheckpointError(f"{self._path}: {span.name} has more elements than the ranks' files hold")
            for kind in kinds:
                tensor, name, file = held[span.rank].get(kind), f"{kind}.{label}", files[span.rank]
                if tensor is None:
                    continue
                if (file, name) not in known:
                    known.add((file, name))
                    self._put(file, name, tensor.reshape(-1))
                same_dtype = str(tensor.dtype) == f"torch.{entry.dtype}"
                stored_as = WEIGHT if kind == MASTER and same_dtype else kind
                pieces = entry.pieces.setdefault(stored_as, [])
                if span.numel:
                    pieces.append(Piece(file, name, span.offset, span.start, span.numel))

    # --- the optimizer --------------------------------------------------------------------------------------------

    def _optimizer_file(self, rank: int) -> str:
        return optimizer_file(rank, bf16=(self._path / optimizer_file(0, bf16=True)).exists())

    def _optimizer_state(self, rank: int) -> dict[str, Any]:
        return self._load(self._optimizer_file(rank))["optimizer_state_dict"]

    def _masters_and_states(self) -> tuple[int, list[dict[str, Any]]]:
        """Place them; the stage and the param groups' options."""
        if self._model.get("param_shapes") is None:
            return 0, self._masters_of_stage_0()
        states = [self._optimizer_state(rank) for rank in range(self._world)]
        stage = int(states[0].get("zero_stage", 1))
        bases = [state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for state in states]
        masters = [state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for state in states]
        files = {rank: self._optimizer_file(rank) for rank in range(self._world)}
        options = options_of(bases[0])
        zero = self._config().get("zero_optimization") or {}
        hands = self._world if zero.get("round_robin_gradients") and stage < 3 else 1
        for number, (shapes, (param_number, group)) in enumerate(
            zip(self._model["param_shapes"], param_numbers(bases[0]), strict=True)
        ):
            group_step = options[group].get("step", states[0].get("base_optimizer_state_step"))
            found = [state_of(base, param_number, group_step) for base in bases]
            held = {rank: {MASTER: masters[rank][number], **elements} for rank, (elements, _) in enumerate(found)}
            scalars = next((scalars for _, scalars in found if scalars), {})
            self._describe_states(shapes, group, scalars, dealt(len(shapes), hands))
            self._place(str(number), self._spans(stage, states, number, shapes), held, files)
        return stage, options

    def _masters_of_stage_0(self) -> list[dict[str, Any]]:
        if self._model.get("optimizer") is None:
            return []
        weights = self._model["module"]
        try:
            states, options = whole_states(self._model["optimizer"], self._entries, weights, self._groups)
        except UnassignedStatesError as error:
            logger.warning("%s: the optimizer's states are left out: %s", self._path, error)
            self.left_out = str(error)
            return []
        for number, state in enumerate(states):
            shapes = {name: self._entries[name].shape for name in state.names}
            self._describe_states(shapes, state.group, state.scalars, range(len(shapes)))
            numel = sum(prod(shape) for shape in shapes.values())
            if any(tensor.numel() != numel for tensor in state.elements.values()):
                raise CheckpointError(f"{self._path}: the optimizer states of {', '.join(shapes)} have other sizes")
            if numel:
                self._place(str(number), joined_spans(shapes, numel), {0: state.elements}, {0: self._first})
        return options

    def _describe_states(self, names: Iterable[str], group: int, scalars: dict[str, Any], order: Iterable[int]) -> None:
        encoded = {name: encode(value, f"optimizer state {name}", self._put_value) for name, value in scalars.items()}
        before = self._described[group]
        for name, position in zip(names, order):
            entry = self._entries[name] = replace(
                self._entries[name], trainable=True, group=group, position=before + position, scalars=encoded
            )
            self._described[group] += 1
            if entry.numel == 0:
                entry.pieces[WEIGHT] = []

    def _spans(self, stage: int, states: list[dict[str, Any]], number: int, shapes: Any) -> Iterable[Span]:
        if stage == 3:
            return split_spans(shapes, self._world)
        numels = [state["single_partition_of_fp32_groups"][number].numel() for state in states]
        if "zero_stage" in states[0]:  # saved without the padding at the end
            numels = [numel + state["group_paddings"][number] for numel, state in zip(numels, states)]
        if len(set(numels)) > 1 or numels[0] < 1:
            raise CheckpointError(f"{self._path}: the ranks' partitions of group {number} have the sizes {numels}")
        gaps = states[0].get("param_alignment_paddings")  # zero_optimization.parameter_alignment
        return joined_spans(shapes, numels[0], gaps[number] if gaps else ())
