"""From a model as it was given to one that an engine runs: its weights loaded, split, cast, moved and fused.

The model is changed in place, as a second one of its size may not fit. It is copied where others rely on it: an engine
of `initialize` that trains it (whose weights are shared as long as nothing has to change), or another inference engine
that wants it otherwise.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch

from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.comm import Group
from deepspeedlite.inference.blocks import fuse
from deepspeedlite.inference.checks import on_all
from deepspeedlite.inference.config import DeepSpeedInferenceConfig, checkpoint_of, saved_to
from deepspeedlite.inference.loading import LayerReader, fill_computed, load_checkpoint
from deepspeedlite.inference.quantized import quantize_linears
from deepspeedlite.inference.saving import save_weights
from deepspeedlite.inference.streamed import StreamedWeights
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import InferenceError, UnsupportedError
from deepspeedlite.runtime.log import log_dist, log_dist_once, log_once
from deepspeedlite.zero.flat_params import owners_of

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ENGINES = "_inference_engines"  # on a module


class Setting(NamedTuple):
    """What an engine makes of a model; two engines that ask for the same share it."""

    dtype: torch.dtype
    device: torch.device | None  # None: wherever it is
    ranks: tuple[int, ...]
    fused: bool
    bits: int | None
    group_size: int
    max_tokens: int
    zero: str = ""  # the section that says how weights are streamed; empty: they are not

    @property
    def packing(self) -> dict[str, Any]:
        """How packed weights are kept."""
        return {"dtype": self.dtype, "bits": self.bits, "group_size": self.group_size}

    @property
    def is_lasting(self) -> bool:
        """Whether the model cannot be what it was before."""
        return len(self.ranks) > 1 or self.fused or self.bits is not None or bool(self.zero)


def setting_of(config: DeepSpeedInferenceConfig, model: torch.nn.Module, group: Group, device: Device) -> Setting:
    """What a configuration asks for.

    Raises:
        UnsupportedError: the device cannot compute in this dtype.
    """
    given = config.dtype == "int8" or ("quant" in config.model_fields_set and config.quant.weight.enabled)
    quantized = given and config.quant.enabled
    dtype = _own_dtype(model) if config.dtype == "int8" else TORCH_DTYPES[config.dtype]
    check_dtype(device, dtype)
    streams = config.zero.stage == 3
    if streams and config.replace_with_kernel_inject:
        log_dist_once("inference engine: no blocks are fused, since weights are streamed")
    return Setting(
        dtype=dtype,
        device=None if config.keep_module_on_host else device.torch_device,
        ranks=tuple(group.ranks),
        fused=config.replace_with_kernel_inject and not streams,
        bits=config.quant.weight.num_bits if quantized else None,
        group_size=config.quant.weight.group_size,
        max_tokens=config.max_out_tokens,
        zero=config.zero.model_dump_json(exclude_unset=True) if streams else "",
    )


def _own_dtype(model: torch.nn.Module) -> torch.dtype:
    return next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)


def check_dtype(device: Device, dtype: torch.dtype) -> None:
    """Raise an UnsupportedError where matrices of this dtype cannot be multiplied on the device."""
    try:
        tried = torch.ones(2, 2, dtype=dtype, device=device.torch_device)
        torch.nn.functional.layer_norm(torch.nn.functional.linear(tried, tried), (2,))
    except RuntimeError as error:
        raise UnsupportedError(f"dtype {dtype} cannot be computed with on {device.name} ({error}); use fp32") from error
    if device.type == "cpu" and dtype == torch.float16:
        log_once("fp16 on a CPU is slower than bf16 and fp32: consider dtype=torch.bfloat16")


def prepare(
    model: torch.nn.Module,
    config: DeepSpeedInferenceConfig,
    setting: Setting,
    group: Group,
    device: Device,
    formats: Formats,
) -> torch.nn.Module:
    """The model to run.

    Raises:
        InferenceError: it cannot be split, or has tensors without values and there is no checkpoint.
        CheckpointError: the checkpoint is missing, damaged, or does not fit.
    """
    mark = model.__dict__.get(_ENGINES)
    if mark is not None and mark.streamed is not None:
        if mark.setting != setting or not mark.streamed.is_open:
            raise InferenceError("the weights of this model went with the engine that streamed them: build it anew")
        return model
    if is_trained(model) or (owners_of(model.parameters()) and not setting.zero):
        model, is_whole = _of_training(model, setting)
        if not is_whole:
            return model
    elif mark is not None and (len(mark.engines) or mark.setting.is_lasting):
        if mark.setting == setting and checkpoint_of(config)[0] is None:
            return model
        model = _copy_of_engines(model, mark.setting)
    shapes = _shapes_of(model)
    if folder := saved_to(config):
        save_weights(model, folder, is_to_be_loaded=checkpoint_of(config)[0] is not None)
    pieces = _split(model, config, group)
    cast(model, setting.dtype)
    streamed = None
    with _loaded(model, config, setting, pieces, formats) as reader:
        if setting.zero:
            streamed = StreamedWeights(model, config.zero, device.torch_device, read=reader)
        elif reader is None:
            _move(model, setting.device)
        fill = None if reader is None else reader.fill
        if setting.fused:
            _tell(fuse(model, **setting.packing, max_tokens=setting.max_tokens, batch=1, fill=fill))
        if setting.bits is not None:
            _tell(quantize_linears(model, **setting.packing, fill=fill))
        if reader is not None:
            reader.fill(model)
            _move(model, setting.device)
    _refuse_empty(model)
    if hasattr(model, "save_pretrained") and _shapes_of(model) != shapes:
        model.__dict__["save_pretrained"] = refuse_saving  # its checkpoint would be read as one without most weights
    model.__dict__[_ENGINES] = Engines(setting, streamed)
    return model


def _shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    """What a checkpoint of the model would have."""
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def refuse_saving(*_: Any, **__: Any) -> NoReturn:
    """In the place of `save_pretrained` on a model that was split, fused, quantized or streamed.

    Raises:
        InferenceError: always.
    """
    raise InferenceError(
        "save_pretrained: init_inference has split, fused, quantized or streamed this model, and from_pretrained would "
        "find neither its weights' names nor their shapes; save it before init_inference, or copy the checkpoint that "
        "it was loaded from"
    )


def is_trained(model: torch.nn.Module) -> bool:
    """Whether an engine of `initialize` holds its parameters."""
    return any(owner.lease is not None for owner in owners_of(model.parameters()))


class Engines:
    """The engines that run a model, and what they have made of it. Copies of the model are nobody's."""

    def __init__(self, setting: Setting, streamed: StreamedWeights | None) -> None:
        self.setting, self.streamed = setting, streamed
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def hold(model: torch.nn.Module, engine: Any) -> None:
    """An engine runs the model."""
    if (mark := model.__dict__.get(_ENGINES)) is not None:
        mark.engines.add(engine)


def release(model: torch.nn.Module, engine: Any) -> None:
    """It does not any more. Weights that were streamed end with the last engine: there may be no memory for them."""
    if (mark := model.__dict__.get(_ENGINES)) is not None:
        mark.engines.discard(engine)
        if mark.streamed is not None and not len(mark.engines):
            mark.streamed.close()


def _copy_of_engines(model: torch.nn.Module, made: Setting) -> torch.nn.Module:
    """A copy for an engine that wants a model otherwise than the engine that has it."""
    if made.is_lasting:
        raise InferenceError(
            "another inference engine has split, fused or quantized this model: destroy() does not make it whole "
            "again; build the model anew for an engine with other settings"
        )
    log_dist("another inference engine uses this model in other settings: this engine works on a copy of it")
    return copy.deepcopy(model)


def _of_training(model: torch.nn.Module, setting: Setting) -> tuple[torch.nn.Module, bool]:
    """A model that an engine trains, and whether it is a copy with all its weights."""
    dtypes = {param.dtype for param in model.parameters() if param.is_floating_point()}
    devices = {param.device for param in model.parameters()}
    same_place = setting.device is None or devices <= {setting.device}
    if dtypes == {setting.dtype} and same_place and len(setting.ranks) == 1 and not setting.fused and not setting.bits:
        log_dist_once("inference engine: an engine trains this model, and its weights are used as they are trained")
        return model, False
    log_dist("inference engine: an engine trains this model; this engine works on a copy of its weights of now")
    return _whole_copy(model), True


def _whole_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with all weights, which at stage 3 every rank takes at the same time."""
    weights = model.state_dict()
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = torch.nn.Parameter(torch.empty(0, dtype=param.dtype), requires_grad=param.requires_grad)
    copied = copy.deepcopy(model, memo)
    names: dict[int, str] = {}
    for name, param in copied.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), name)
    for name, param in copied.named_parameters():
        param.data = weights[name].detach().clone()
    return copied


def _split(model: torch.nn.Module, config: DeepSpeedInferenceConfig, group: Group) -> Any:
    if group.size == 1:
        return None
    from deepspeedlite.parallel.tensor import split_model  # with what only split models need

    return split_model(model, group, config.injection_policy)


def _move(model: torch.nn.Module, device: torch.device | None) -> None:
    """Move it as a whole; what is streamed sees to its own place."""
    if device is not None and not owners_of(model.parameters()):
        model.to(device)
        return
    for part in model.modules() if device is not None else ():
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else buffer.to(device)


@contextmanager
def _loaded(
    model: torch.nn.Module, config: DeepSpeedInferenceConfig, setting: Setting, pieces: Any, formats: Formats
) -> Iterator[LayerReader | None]:
    """The model has its checkpoint's weights, where there is one; or gets them from what is yielded.

    The latter where something smaller is made of each layer at once: a model that needs that may not fit as it is.
    """
    checkpoint, base_dir = checkpoint_of(config)
    if checkpoint is None:
        _refuse_empty(model)
        yield None
        return
    one_by_one = setting.zero or setting.bits is not None
    if one_by_one and pieces is None and any(param.is_meta for param in model.parameters()):
        open_all = partial(LayerReader, model, checkpoint, base_dir, formats, device=setting.device)
        with closing(on_all(Group(), open_all) if setting.zero else open_all()) as reader:
            reader.fill(model, buffers_alone=True)
            fill_computed(model, setting.device)
            yield reader
        return
    load_checkpoint(
        model,
        checkpoint,
        base_dir,
        formats,
        dtype_of=lambda name, tensor: tensor.dtype,
        device=setting.device,
        pieces=pieces or {},
    )
    yield None


def _refuse_empty(model: torch.nn.Module) -> None:
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    empty += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if empty:
        raise InferenceError(
            f"{len(empty)} tensors of the model have no values (they are on the meta device), such as {empty[0]}; give "
            "checkpoint=, the folder of its weights"
        )


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place; buffers keep their types, as positions are wrong in 16 bits.

    What a transformers model says must stay fp32 stays so. A batch norm's statistics follow its weights.
    """
    keep = keeps_fp32(model, dtype)
    for name, param in model.named_parameters():
        if param.is_floating_point() and not keep(name) and param.dtype != dtype:
            param.data = param.data.to(dtype)
    for part in model.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.weight is not None:
            for key, buffer in part._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    part._buffers[key] = buffer.to(part.weight.dtype)


def keeps_fp32(model: torch.nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters a transformers model keeps in fp32 by name, beside weights of this dtype."""
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        names += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in names]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _tell(lines: list[str]) -> None:
    for line in lines:
        log_dist(f"inference engine: {line}")
