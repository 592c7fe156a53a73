"""`DeepSpeedInferenceConfig`: what `init_inference` takes, under DeepSpeed's keys and the older spellings of them.

`read_inference_config` makes one of a file or dict and keyword arguments, or one ConfigError with all that is wrong.
Values may be objects (process groups, classes, a torch.dtype), so a file cannot say everything that a dict can.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from deepspeedlite.config.base import DTYPE_NAMES, Flag, FreeForm, Int, Path, Section, Text, key
from deepspeedlite.config.faults import Fault, Origin, dotted, raise_faults, show
from deepspeedlite.config.load import Findings, check_features, placeholders, validate
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.config.source import read_source
from deepspeedlite.runtime.log import log_dist_once, log_once

DTYPES = {**DTYPE_NAMES, "torch.half": "fp16", "bfloat": "bf16", "torch.int8": "int8", "int8": "int8"}
_NO_EXPERTS = "refused: expert parallelism is not in this release; leave it out: experts run on every rank"


def _dtype(value: Any) -> Any:
    value = str(value) if type(value).__module__ == "torch" else value
    return DTYPES.get(value.lower(), value) if isinstance(value, str) else value


def _moe(value: Any) -> Any:
    return {"enabled": value} if isinstance(value, bool) else value


InferenceDtype = Annotated[Literal["fp32", "fp16", "bf16", "int8"], BeforeValidator(_dtype)]


class DeepSpeedTPConfig(Section):
    """Ranks that hold one model together, each a part of every split matrix."""

    SWITCH = "enabled"

    enabled: Flag = key(True, "Split the model.")
    tp_size: Int = key(1, "Ranks that a model is split over.", ge=1)
    tp_grain_size: Int = key(
        64, "Granularity of uneven parts.", stands="hint: changes nothing: heads are split whole, other columns evenly"
    )
    mpu: Any = key(None, "A Megatron-style object, whose tensor (or model) parallel group is used.")
    tp_group: Any = key(None, "The torch process group to use.")


class DeepSpeedMoEConfig(Section):
    """Mixture-of-experts layers of DeepSpeed's own kind."""

    SWITCH = "enabled"

    enabled: Flag = key(True, "The model has such layers.", stands="hint: changes nothing: the model's own layers run")
    ep_size: Int = key(1, "Ranks that experts are spread over.", stands=_NO_EXPERTS, ge=1)
    moe_experts: Any = key(lambda: [1], "Experts in each layer.", stands="hint: is read from the model itself")
    type: Literal["standard", "residual"] = key("standard", "Kind of layer.", stands="hint: is read from the model")
    ep_mp_group: Any = key(None, "Group of ranks.", stands=_NO_EXPERTS)
    ep_group: Any = key(None, "Group of ranks.", stands=_NO_EXPERTS)


class _Quantized(Section):
    """How numbers are quantized."""

    q_type: Literal["symmetric", "asymmetric"] = key(
        "symmetric", "Whether a group has a zero point.", stands="hint: changes nothing: groups are symmetric"
    )
    q_groups: Int = key(
        1, "Groups of a matrix.", stands="hint: changes nothing: a group is 64 weights of a row, or group_size", ge=1
    )


class WeightQuantConfig(_Quantized):
    """Quantized weights."""

    enabled: Flag = key(True, "Quantize them.")
    num_bits: Literal[8, 4] = key(8, "Bits of a weight.")
    group_size: Int = key(64, "Consecutive weights of a row that share a scale; not a key of DeepSpeed's.", ge=1)
    quantized_initialization: FreeForm = key(
        dict, "Quantize while the model is built.", stands="refused: give dtype int8, which quantizes on load"
    )
    post_init_quant: FreeForm = key(
        dict, "Which modules to quantize, and how.", stands="refused: give dtype int8, which quantizes linear layers"
    )


_WEIGHTS_ALONE = "hint: changes nothing: weights alone are quantized"


class ActivationQuantConfig(_Quantized):
    """Quantized activations."""

    enabled: Flag = key(True, "Quantize them.", stands=_WEIGHTS_ALONE)
    num_bits: Int = key(8, "Bits of a number.", stands=_WEIGHTS_ALONE)


class QKVQuantConfig(Section):
    """Quantized projections of attention."""

    enabled: Flag = key(True, "Quantize them.", stands="hint: changes nothing: they are linear layers like others")


class QuantizationConfig(Section):
    """Quantization; of the weights only."""

    SWITCH = "enabled"

    enabled: Flag = key(True, "Quantize weights, where this section is given or dtype is int8.")
    activation: ActivationQuantConfig = key(ActivationQuantConfig, "Activations.")
    weight: WeightQuantConfig = key(WeightQuantConfig, "Weights.")
    qkv: QKVQuantConfig = key(QKVQuantConfig, "Projections of attention.")


_SAVED_TO = (
    "Folder that the weights are written to before the model is split, for any number of ranks, with a "
    "`ds_inference_config.json` that `checkpoint` takes; nothing where `checkpoint` is given, which has them."
)


class InferenceCheckpointConfig(Section):
    """The same as `checkpoint`, `base_dir` and `save_mp_checkpoint_path`."""

    checkpoint_dir: Path | None = key(None, "Folder of the weights; `checkpoint`, if that is not given.")
    save_mp_checkpoint_path: Path | None = key(None, _SAVED_TO)
    base_dir: Path | None = key(None, "Folder that relative paths begin at; `base_dir`, if that is not given.")


class DeepSpeedInferenceConfig(Section):
    """What an inference engine is asked for. Frozen; every section is there, with defaults where nothing is said."""

    dtype: InferenceDtype = key(
        "fp16", "Type of the weights, by name or as a torch.dtype; int8: quantized, and computed with as fp32 or bf16."
    )
    tensor_parallel: DeepSpeedTPConfig = key(DeepSpeedTPConfig, "Splitting the model over ranks.")
    replace_with_kernel_inject: Flag = key(False, "Replace transformer blocks that are known by fused ones.")
    injection_policy: Any = key(
        None,
        "{class of a block: names in it of the linear layers whose outputs are summed over the ranks}; the other "
        "linear layers of such a block are split by columns. Before the model's own plan.",
    )
    max_out_tokens: Int = key(1024, "Most tokens of a sequence, its prompt included.", gt=0)
    min_out_tokens: Int = key(
        1, "Tokens that there must be room for after a prompt; fewer are an error before anything is computed.", ge=0
    )
    checkpoint: Any = key(
        None,
        "Weights to load: a folder, file or list of safetensors files, a checkpoint of initialize's engine, or a JSON "
        "file or dict with `checkpoints`.",
    )
    base_dir: Path = key("", "Folder that relative paths in `checkpoint` begin at.")
    checkpoint_config: InferenceCheckpointConfig = key(InferenceCheckpointConfig, "The same, as a section.")
    save_mp_checkpoint_path: Path | None = key(None, _SAVED_TO)
    set_empty_params: Flag = key(
        False, "The model has no values yet.", stands="hint: changes nothing: tensors on the meta device say so"
    )
    keep_module_on_host: Flag = key(False, "Leave the model in CPU memory.")
    enable_cuda_graph: Flag = key(False, "Record a forward pass of each shape on a GPU, and replay it.")
    quant: QuantizationConfig = key(QuantizationConfig, "Quantized weights.")
    zero: ZeroOptimization = key(
        ZeroOptimization,
        "Stage 3: each rank keeps a share of every layer, on `offload_param`'s device, until it is used.",
    )
    moe: Annotated[DeepSpeedMoEConfig, BeforeValidator(_moe)] = key(DeepSpeedMoEConfig, "Experts.")
    use_triton: Flag = key(
        False, "Kernels in Triton.", stands="refused: there are none; set it to false: kernels are compiled"
    )
    triton_autotune: Flag = key(False, "Tune them.", stands="hint: changes nothing: there are none")
    triangular_masking: Flag = key(
        True, "Attend to earlier tokens only.", stands="hint: changes nothing: the model's own mask is used"
    )
    return_tuple: Flag = key(
        True, "Blocks return tuples.", stands="hint: changes nothing: blocks return what the model expects of them"
    )
    training_mp_size: Int = key(
        1,
        "Ranks that trained the checkpoint together.",
        stands="refused: pieces of a Megatron-style training are not put together here; give its merged checkpoint",
        ge=1,
    )
    replace_method: Literal["auto"] | Text = key(
        "auto", "How blocks are found.", stands="hint: changes nothing: there is one way"
    )
    injection_policy_tuple: Any = key(
        None, "Names of layers.", stands="refused: give injection_policy, {class of a block: names}"
    )
    config: Any = key(None, "The model's configuration.", stands="hint: is read from the model")
    transposed_mode: Flag = key(False, "Weights are transposed.", stands="hint: is read from the model")

    @model_validator(mode="before")
    @classmethod
    def _older_spellings(cls, data: Any) -> Any:
        """Take them from whoever makes an object of keyword arguments too."""
        if not isinstance(data, dict):
            return data
        tree = {name: dict(value) if isinstance(value, dict) else value for name, value in data.items()}
        faults: list[Fault] = []
        modernise(tree, faults)
        if faults:
            raise_faults("inference configuration", faults)
        return tree


# Older and other spellings: where a key was, and where it is now.
RENAMED: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("kernel_inject",), ("replace_with_kernel_inject",)),
    (("tp",), ("tensor_parallel",)),
    (("tm",), ("triangular_masking",)),
    (("ckpt_config",), ("checkpoint_config",)),
    (("injection_dict",), ("injection_policy",)),
    (("args",), ("config",)),
    (("max_tokens",), ("max_out_tokens",)),
    (("min_tokens",), ("min_out_tokens",)),
    (("mp_size",), ("tensor_parallel", "tp_size")),
    (("mpu",), ("tensor_parallel", "mpu")),
    (("ep_size",), ("moe", "ep_size")),
    (("expert_group",), ("moe", "ep_group")),
    (("ep_group",), ("moe", "ep_group")),
    (("expert_mp_group",), ("moe", "ep_mp_group")),
    (("ep_mp_group",), ("moe", "ep_mp_group")),
    (("moe_experts",), ("moe", "moe_experts")),
    (("moe_type",), ("moe", "type")),
    (("moe", "num_experts"), ("moe", "moe_experts")),
    (("moe", "expert_group"), ("moe", "ep_group")),
)


# What scripts of older releases of DeepSpeed's give, and it has no more: what to write now.
FORMER = {
    "cpu_offload": 'zero: {"stage": 3, "offload_param": {"device": "cpu"}}, which streams weights from the host\'s '
    "memory, or keep_module_on_host",
}


def modernise(tree: dict[str, Any], faults: list[Fault]) -> dict[tuple[Any, ...], Origin]:
    """Rewrite older spellings in `tree`; {path now: as written}. A key given both ways, differently, is a fault."""
    moved: dict[tuple[Any, ...], Origin] = {}
    if isinstance(tree.get("moe"), bool):
        tree["moe"] = {"enabled": tree["moe"]}
    for name in FORMER.keys() & tree.keys():
        if value := tree.pop(name):
            faults.append(Fault((name,), value, "DeepSpeed has this key no more", f"give {FORMER[name]}"))
    for was, now in RENAMED:
        holder = tree if len(was) == 1 else tree.get(was[0])
        if not isinstance(holder, dict) or was[-1] not in holder:
            continue
        value = holder.pop(was[-1])
        target = tree if len(now) == 1 else tree.setdefault(now[0], {})
        if not isinstance(target, dict):
            continue  # what is wrong with it is said of it
        if now[-1] in target and target[now[-1]] is not value and target[now[-1]] != value:
            problem = f"is another spelling of {dotted(now)}, which is given too ({show(target[now[-1]])})"
            faults.append(Fault(was, value, problem, f"keep only {dotted(now)}"))
            continue
        target[now[-1]] = value
        moved[now] = Origin(was)
    return moved


_OBJECTS = ("injection_policy", "injection_dict", "checkpoint", "config", "args")


def read_inference_config(config: Any, kwargs: Mapping[str, Any]) -> DeepSpeedInferenceConfig:
    """Read and check what `init_inference` was given; keyword arguments go before what `config` says.

    Raises:
        ConfigError: lists every fault, one per line, with the key's full path, its value and the remedy.
    """
    if isinstance(config, DeepSpeedInferenceConfig):
        if not kwargs:
            return config
        config = {name: getattr(config, name) for name in config.model_fields_set}
    origin, tree, faults, moved = _read(config)
    _, given, more, moved_given = _read(kwargs)
    _merge(tree, given)
    moved.update(moved_given)
    found = Findings(moved, [*faults, *more])
    placeholders(tree, DeepSpeedInferenceConfig, (), found, False)
    made = validate(tree, found, DeepSpeedInferenceConfig)
    hints: dict[str, list[str]] = {}
    check_features(made, (), found, hints)
    _check_zero(made, found)
    if found.faults:
        raise_faults(f"inference {origin}", found.faults)
    for note, keys in hints.items():
        log_once(f"inference configuration: {', '.join(keys)}: {note}")
    return made


def _read(source: Any) -> tuple[str, dict[str, Any], list[Fault], dict[tuple[Any, ...], Origin]]:
    """A configuration in its newer spelling, objects as they are."""
    source = {} if source is None else source
    kept = {name: source[name] for name in _OBJECTS if name in source} if isinstance(source, Mapping) else {}
    if isinstance(source, Mapping):
        source = {name: _as_dict(value) for name, value in source.items() if name not in kept}
    origin, tree, faults = read_source(source)
    tree.update(kept)
    return origin, tree, faults, modernise(tree, faults)


def _as_dict(value: Any) -> Any:
    """A section that a script made an object of, as what it was given."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _merge(tree: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict) and name not in _OBJECTS:
            _merge(tree[name], value)
            continue
        if name in tree and tree[name] is not value and tree[name] != value:
            log_dist_once(f"init_inference: {name}={show(value)} is taken, not the configuration's {show(tree[name])}")
        tree[name] = value


def _check_zero(config: DeepSpeedInferenceConfig, found: Findings) -> None:
    """Weights that are streamed: what they do not go with."""
    if config.zero.stage != 3:
        if config.zero.offload_param.device != "none":
            found.add(
                ("zero", "stage"), config.zero.stage, "offload_param streams weights at stage 3 only", "set it to 3"
            )
        return
    place = config.zero.offload_param
    if place.device == "nvme" and not place.nvme_path:
        path = ("zero", "offload_param", "nvme_path")
        found.add(path, place.nvme_path, "is where the weights are to be", "name a directory on the NVMe drive")
    if config.tensor_parallel.tp_size > 1:
        found.add(
            ("zero", "stage"),
            3,
            "streams whole layers, which are shared over all ranks, and tensor_parallel splits them",
            "use one of the two",
        )
    if config.dtype == "int8" or ("quant" in config.model_fields_set and config.quant.enabled):
        found.add(("zero", "stage"), 3, "quantized weights are not streamed", "use one of the two")


def saved_to(config: DeepSpeedInferenceConfig) -> str | None:
    """The folder to write the weights to, or None."""
    return config.save_mp_checkpoint_path or config.checkpoint_config.save_mp_checkpoint_path


def checkpoint_of(config: DeepSpeedInferenceConfig) -> tuple[Any, str]:
    """What to load (None: nothing), and the folder that relative paths begin at."""
    checkpoint = config.checkpoint if config.checkpoint is not None else config.checkpoint_config.checkpoint_dir
    return checkpoint, os.fspath(config.base_dir or config.checkpoint_config.base_dir or "")
