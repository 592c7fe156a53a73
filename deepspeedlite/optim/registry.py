"""Optimizers by name, as a configuration's `optimizer` section asks for them.

`build_optimizer("AdamW", {"lr": 3e-4}, model.parameters())` takes DeepSpeed's names and parameters, and any
torch.optim class by its name with its own. Every mistake in the section is an `OptimizerError` that lists all of them.
What is known about each optimizer is in tables, here and (names and parameters) in config/recipes.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite.config.faults import dotted
from deepspeedlite.config.recipes import (
    OPTIMIZERS,
    accepted_parameters,
    optimizer_faults,
    refused_combination,
    refused_optimizer,
)
from deepspeedlite.ops import is_available
from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeedlite.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import FusedLion
from deepspeedlite.ops.uncorrected_adam import UncorrectedAdam
from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError

OURS: dict[str, type[Optimizer]] = {"lion": FusedLion, "lamb": FusedLamb}
TORCH_CLASSES: dict[str, type[Optimizer]] = {
    name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and cls is not Optimizer
}
# Where torch has a kernel that updates a whole list of tensors in one pass.
_ANYWHERE = frozenset({"cpu", "cuda", "mps", "xpu"})
_FUSED_ON: dict[type[Optimizer], frozenset[str]] = {
    torch.optim.Adam: _ANYWHERE,
    torch.optim.AdamW: _ANYWHERE,
    torch.optim.SGD: _ANYWHERE,
    torch.optim.Adagrad: frozenset({"cpu"}),
}
# What takes another's place on a kind of device: the optimizer made of an op, the op, and what it is told besides.
# States get the masters' dtype, which is fp32 unless the configuration wants otherwise.
_LIKE_MASTERS = {"fp32_optimizer_states": False}
_BY_OP: dict[tuple[type[Optimizer], str], tuple[type[Optimizer], str, dict[str, Any]]] = {
    (torch.optim.Adam, "cpu"): (DeepSpeedCPUAdam, "cpu_adam", {"adamw_mode": False, **_LIKE_MASTERS}),
    (torch.optim.AdamW, "cpu"): (DeepSpeedCPUAdam, "cpu_adam", {"adamw_mode": True, **_LIKE_MASTERS}),
    (torch.optim.Adagrad, "cpu"): (DeepSpeedCPUAdagrad, "cpu_adagrad", _LIKE_MASTERS),
    (UncorrectedAdam, "cpu"): (FusedAdam, "fused_adam", {"bias_correction": False}),
    (UncorrectedAdam, "cuda"): (FusedAdam, "fused_adam", {"bias_correction": False}),
    (torch.optim.Adam, "cuda"): (FusedAdam, "fused_adam", {"adam_w_mode": False}),
    (torch.optim.AdamW, "cuda"): (FusedAdam, "fused_adam", {"adam_w_mode": True}),
}
_RULES_OUT_FUSED = {"fused", "foreach", "differentiable"}


def build_optimizer(
    type: str, params: Mapping[str, Any] | None, parameters: Iterable[Any], sharded: bool = True
) -> Optimizer:
    """The optimizer called `type`, with the section's `params`, over `parameters`.

    `type` is one of DeepSpeed's names or a torch.optim class, upper and lower case alike. `parameters` are tensors,
    (name, tensor) pairs or param-group dicts. torch's fused kernel is chosen where every parameter allows it; say
    `"fused": false` or `"foreach": true` to choose otherwise. `sharded`: it will step shards of parameters.
    Raises `OptimizerError` for an unknown name, parameter or value and `UnsupportedError` for a name not done here.
    """
    options = dict(params or {})
    if isinstance(type, str) and (refused := refused_optimizer(type, sharded)):
        raise UnsupportedError(f"optimizer.type {type} {refused}")
    if faults := optimizer_faults(type, options, sharded):
        lines = [fault_line("optimizer", type, path, said) for path, said in faults]
        raise OptimizerError(_as_message(f"optimizer {type}", lines))
    if combination := refused_combination(type, options):
        raise UnsupportedError(f"optimizer {type}: optimizer.params.{combination[0]} {combination[1]}")
    groups = list(parameters)
    if not groups:
        raise OptimizerError(
            f"optimizer {type} has no parameters to train: pass model_parameters, or leave it out to train all "
            "that require a gradient (a generator that was already used up is empty)"
        )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    known = OPTIMIZERS.get(type.lower())
    switches = {**known.switches, **options} if known is not None else options
    if known is not None:
        options = {key: value for key, value in options.items() if key not in known.switches}
    cls = _class_of(type.lower())
    if "adam_w_mode" in switches:
        cls, options = _adam(cls, switches, options)
    if not _RULES_OUT_FUSED & options.keys():
        if _all_plain(groups, _FUSED_ON.get(cls, frozenset())):
            options["fused"] = True
        if not (params or {}).get("torch_adam"):
            cls, options = _by_op(cls, options, groups)
    try:
        return cls(groups, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (OptimizerError, UnsupportedError)):
            raise
        raise OptimizerError(f"optimizer {type} cannot be built with optimizer.params {options}: {error}") from error


def choose_fused(optimizer: Optimizer) -> None:
    """Let a fresh torch optimizer step in one pass over memory where its maker left the choice to torch.

    Without `fused` torch's Adam makes temporaries as large as the tensor it updates, and runs are large.
    """
    devices = _FUSED_ON.get(type(optimizer))
    groups = optimizer.param_groups
    if devices is None or optimizer.state or not _all_plain(groups, devices):
        return
    for group in groups:
        left = group.get("fused") is None and group.get("foreach") is None
        if left and not (group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], Tensor)):
            group["fused"] = True


def built_like(optimizer: Optimizer, group: Mapping[str, Any], params: Sequence[Tensor]) -> Optimizer:
    """A fresh optimizer of the same class for other parameters, with the options of one of its groups."""
    accepted = accepted_parameters(type(optimizer), leading=1).keys() - {"params"}
    options = {key: value for key, value in {**optimizer.defaults, **group}.items() if key in accepted}
    return type(optimizer)(params, **options)


def fault_line(section: str, type: Any, path: Sequence[Any], said: str) -> str:
    """A fault of a section as a line: its key's path, with the name where that is at fault, and what is wrong."""
    where = dotted((section, *path))
    return f"{where} {type} {said}" if path == ("type",) else f"{where} {said}"


def _class_of(name: str) -> type[Optimizer]:
    known = OPTIMIZERS.get(name)
    if known is None:
        return TORCH_CLASSES[name]
    cls: type[Optimizer] = getattr(torch.optim, known.torch) if known.torch else OURS[known.ours]
    return cls


def _adam(
    cls: type[Optimizer], switch: Mapping[str, Any], options: dict[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class and options for Adam or AdamW, from DeepSpeed's switches.

    DeepSpeed's Adam decays weights as AdamW does unless `adam_w_mode` is false, and its AdamW always does; without
    `torch_adam` the default weight decay of both is 0.
    """
    decoupled = cls is torch.optim.AdamW or (switch["adam_w_mode"] and switch["decoupled_weight_decay"])
    if not switch["torch_adam"]:
        options = {"weight_decay": 0.0, **options}
    if switch["bias_correction"]:
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), options
    kept = {key: value for key, value in options.items() if key in accepted_parameters(UncorrectedAdam, 1)}
    return UncorrectedAdam, {**kept, "adam_w_mode": decoupled}


def _by_op(cls: type[Optimizer], options: dict[str, Any], groups: list[Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """The op's optimizer in place of `cls`, where it takes the parameters and all that was asked for."""
    kinds = {tensor.device.type if tensor.itemsize <= 4 else "fp64" for tensor in _tensors(groups)}
    device_type = kinds.pop() if len(kinds) == 1 else "several"
    if (cls, device_type) not in _BY_OP or not _all_plain(groups, frozenset({device_type})):
        return cls, options
    better, op, switches = _BY_OP[cls, device_type]
    accepted = {key: value for key, value in options.items() if key != "fused"}
    if accepted.keys() - accepted_parameters(better, 1).keys() or not is_available(op, device_type):
        return cls, options
    return better, {**accepted, **switches}


def _as_message(what: str, faults: list[str]) -> str:
    return f"{what}: {faults[0]}" if len(faults) == 1 else f"{what}:\n  " + "\n  ".join(faults)


def _tensors(groups: Iterable[Any]) -> Iterable[Any]:
    for entry in groups:
        if isinstance(entry, dict):
            held = entry.get("params", ())
            yield from [held] if isinstance(held, Tensor) else _tensors(held)
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _all_plain(groups: list[Any], devices: frozenset[str]) -> bool:
    """Whether a one-pass kernel takes every parameter: floating point, plain, on one of the devices that have it."""
    for entry in groups:
        if isinstance(entry, dict) and not isinstance(entry.get("params", ()), (Tensor, list, tuple)):
            entry["params"] = list(entry["params"])  # a generator would be used up by looking
    plain = (Tensor, torch.nn.Parameter)
    return all(type(t) in plain and t.is_floating_point() and t.device.type in devices for t in _tensors(groups))
