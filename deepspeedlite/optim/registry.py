"""Optimizers by name, as a configuration's `optimizer` section asks for them.

`build_optimizer("AdamW", {"lr": 3e-4}, model.parameters())` takes DeepSpeed's names and parameters, and any
torch.optim class by its name with its own. Every mistake in the section is an `OptimizerError` that lists all of them.
`check_flat_compatible(optimizer)` refuses optimizers that cannot work on the engine's flat 1-D runs.
What is known about each optimizer is in the tables below; the code only reads them.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite.errors import OptimizerError, UnsupportedError
from deepspeedlite.log import log_once
from deepspeedlite.ops import is_available
from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeedlite.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeedlite.ops.foreach import dense_gradients, moment
from deepspeedlite.ops.hyperparameters import check_hyperparameters
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import DeepSpeedCPULion, FusedLion


class UncorrectedAdam(Optimizer):
    """Adam without bias correction: p <- p - lr m / (sqrt(v) + eps), for `"bias_correction": false`.

    Kingma and Ba 2014 (arXiv:1412.6980) with m and v used as they are; weight decay decoupled (arXiv:1711.05101) or,
    with `adam_w_mode=False`, added to the gradient. State per parameter: `step` (0-d fp32), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        check_hyperparameters("Adam", lr, betas, eps=eps, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "adam_w_mode": adam_w_mode})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads = dense_gradients(self, group)
            if not params:
                continue
            lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
            if decay and group["adam_w_mode"]:
                torch._foreach_mul_(params, 1.0 - lr * decay)
            elif decay:
                grads = list(torch._foreach_add(grads, params, alpha=decay))
            exp_avgs, exp_avg_sqs = moment(self, params, "exp_avg"), moment(self, params, "exp_avg_sq")
            torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - beta2)
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr)
            for param in params:
                state = self.state[param]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                state["step"] += 1
        return loss


@dataclass(frozen=True)
class _Recipe:
    """How a name becomes an optimizer: its class, the switches it takes besides, the defaults that differ."""

    cls: type[Optimizer]
    switches: Mapping[str, Any] = field(default_factory=dict)  # name -> its default, which also gives its type
    defaults: Mapping[str, Any] = field(default_factory=dict)  # DeepSpeed's where they differ from the class's own


# `fp32_optimizer_states` and `set_grad_none` choose between implementations in DeepSpeed; see `_adam`.
_ADAM_SWITCHES = {
    "adam_w_mode": True,
    "torch_adam": False,
    "bias_correction": True,
    "fp32_optimizer_states": True,
    "set_grad_none": True,
}
_ADAM = _Recipe(torch.optim.Adam, {**_ADAM_SWITCHES, "decoupled_weight_decay": True})
_ADAMW = _Recipe(torch.optim.AdamW, _ADAM_SWITCHES, {"weight_decay": 0.0})
_LION = _Recipe(FusedLion, {"fp32_optimizer_states": True})
_ADAGRAD = _Recipe(torch.optim.Adagrad, {"fp32_optimizer_states": True})
_RECIPES: dict[str, _Recipe] = {
    "adam": _ADAM,
    "fusedadam": _ADAM,
    "cpuadam": _ADAM,
    "deepspeedcpuadam": _ADAM,
    "adamw": _ADAMW,
    "adagrad": _ADAGRAD,
    "cpuadagrad": _ADAGRAD,
    "deepspeedcpuadagrad": _ADAGRAD,
    "lion": _LION,
    "fusedlion": _LION,
    "cpulion": _LION,
    "deepspeedcpulion": _LION,
    "lamb": _Recipe(FusedLamb),
    "fusedlamb": _Recipe(FusedLamb),
}
_TORCH_CLASSES: dict[str, type[Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
_OFFERED = sorted({"Adam", "AdamW", "Adagrad", "Lion", "Lamb"} | {cls.__name__ for cls in _TORCH_CLASSES.values()})

# Optimizers whose update of an element depends on the shape of its tensor or on the tensor's other elements, or that
# need more than one gradient per step. Flat runs hide both, so the result would be silently wrong.
_WHOLE_TENSOR: dict[str, str] = {
    "adafactor": "keeps row and column averages of each matrix: use AdamW, or Lion, which keeps half its state",
    "muon": "orthogonalises whole matrices: use AdamW",
    "muonwithauxadam": "orthogonalises whole matrices: use AdamW",
    "shampoo": "preconditions each axis of a tensor: use AdamW",
    "distributedshampoo": "preconditions each axis of a tensor: use AdamW",
    "soap": "preconditions each axis of a tensor: use AdamW",
    "came": "keeps row and column averages of each matrix: use AdamW",
    "galoreadamw": "projects each matrix to a low rank: use AdamW",
    "adam_mini": "keeps one second moment per attention head or row: use AdamW",
    "lars": "needs the norm of each parameter: use Lamb, which is told where each parameter lies",
    "lamb": "needs the norm of each parameter: use deepspeedlite's Lamb, which is told where each parameter lies",
    "fusedlamb": "needs the norm of each parameter: use deepspeedlite's Lamb, which is told where each parameter lies",
    "novograd": "needs the norm of each parameter: use Lamb",
    "lbfgs": "evaluates the loss several times per step through a closure: use AdamW",
    "sparseadam": "takes sparse gradients alone and runs are dense: use AdamW",
}

_ONE_BIT = "compresses the gradients it sends to 1 bit, which is not done here: use {} (and, to halve the traffic, "
_ONE_BIT += '"communication_data_type": "bf16")'
_MUP = "rescales learning rates with the package mup: build mup.{} yourself and pass it as initialize(optimizer=...)"
_REFUSED: dict[str, str] = {
    **{name: _WHOLE_TENSOR[name] for name in ("adafactor", "muon", "lbfgs", "sparseadam")},
    "onebitadam": _ONE_BIT.format("Adam"),
    "zerooneadam": _ONE_BIT.format("Adam"),
    "onebitlamb": _ONE_BIT.format("Lamb"),
    "muadam": _MUP.format("MuAdam"),
    "muadamw": _MUP.format("MuAdamW"),
    "musgd": _MUP.format("MuSGD"),
}

# Names that people write and that no spelling distance leads to the right one.
_ONE_BIT_ONLY = "belongs to the 1-bit optimizers, which are not here: leave it out"
_NAME_HINTS: dict[str, str] = {
    "max_grad_norm": 'is not an optimizer parameter: set "gradient_clipping" at the top level of the configuration',
    "grad_clip": 'is not an optimizer parameter: set "gradient_clipping" at the top level of the configuration',
    "learning_rate": 'is called "lr"',
    "epsilon": 'is called "eps"',
    "beta1": 'is part of "betas": [beta1, beta2]',
    "beta2": 'is part of "betas": [beta1, beta2]',
    "wd": 'is called "weight_decay"',
    **dict.fromkeys(("freeze_step", "cuda_aware", "comm_backend_name", "var_freeze_step", "coeff_beta"), _ONE_BIT_ONLY),
}
_MAY_BE_NONE = {"foreach": False, "fused": False}  # torch's default None means "choose"; given, they are booleans
_NOT_NEGATIVE = {"lr", "eps", "weight_decay", "momentum", "lr_decay", "initial_accumulator_value", "momentum_decay"}

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

_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {cls for name, cls in _TORCH_CLASSES.items() if name not in _WHOLE_TENSOR}
    | {FusedLion, FusedLamb, FusedAdam, UncorrectedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion}
)


def build_optimizer(type: str, params: Mapping[str, Any] | None, parameters: Iterable[Any]) -> Optimizer:
    """The optimizer called `type`, with the section's `params`, over `parameters`.

    `type` is one of DeepSpeed's names or a torch.optim class, upper and lower case alike. `parameters` are tensors,
    (name, tensor) pairs or param-group dicts. torch's fused kernel is chosen where every parameter allows it; say
    `"fused": false` or `"foreach": true` to choose otherwise.
    Raises `OptimizerError` for an unknown name, parameter or value and `UnsupportedError` for a name not done here.
    """
    recipe, options = _find_recipe(type), dict(params or {})
    faults = check_parameters("optimizer.params", _signature(recipe), options)
    faults += _range_faults(options)
    if faults:
        raise OptimizerError(_as_message(f"optimizer {type}", faults))
    groups = list(parameters)
    if not groups:
        raise OptimizerError(
            f"optimizer {type} has no parameters to train: pass model_parameters, or leave it out to train all "
            "that require a gradient (a generator that was already used up is empty)"
        )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    cls = recipe.cls
    if "adam_w_mode" in recipe.switches:
        cls, options = _adam(type, recipe, options)
    else:
        options = {**recipe.defaults, **{key: v for key, v in options.items() if key not in recipe.switches}}
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


def check_flat_compatible(optimizer: Optimizer, allow_untested: bool = False) -> None:
    """Raise `UnsupportedError` if the optimizer would be wrong on flat runs.

    The engine gives optimizers 1-D fp32 runs, each a concatenation of parameters. That changes nothing for an update
    that treats every element alike, and breaks one that looks at matrices or at a parameter's norm. Known classes are
    looked up; an unknown one is tried out on two small matrices and on their concatenation, and refused if the results
    differ. `allow_untested` (the key `zero_allow_untested_optimizer`) accepts unknown classes untried.
    """
    cls = type(optimizer)
    if cls in _ELEMENTWISE or isinstance(optimizer, FusedLamb):
        return
    for base in cls.__mro__:
        reason = _WHOLE_TENSOR.get(base.__name__.lower())
        if reason is not None:
            raise UnsupportedError(f"optimizer {cls.__name__} cannot run on flat parameter runs: it {reason}")
    if allow_untested:
        log_once(f"optimizer {cls.__name__} is taken untested (zero_allow_untested_optimizer): it will see flat runs")
        return
    try:
        elementwise = _is_elementwise(optimizer)
    except Exception as error:  # unknown code, on tensors it did not choose: any failure only means "not known"
        log_once(
            f"optimizer {cls.__name__} could not be tried out on flat runs ({error.__class__.__name__}: {error}); it "
            "is used as it is, and is right only if its update treats every element alike"
        )
        return
    if not elementwise:
        raise UnsupportedError(
            f"optimizer {cls.__name__} gives other results on flat parameter runs than on whole tensors, so its update "
            'is not elementwise (or is random): use AdamW, Lion or Lamb, or set "zero_allow_untested_optimizer": true '
            "if you know better"
        )
    log_once(f"optimizer {cls.__name__} is not known here; tried out, it treats every element alike")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause ` (did you mean "x"?)` for the known name nearest to a wrong one, or nothing."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f' (did you mean "{by_lower[found[0]]}"?)' if found else ""


def check_parameters(section: str, accepted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Faults of the names and types in `given`, one line each; `accepted` maps each name to its default."""
    faults = []
    for name, value in given.items():
        where = f"{section}.{name}"
        if name in accepted:
            faults += _type_faults(where, value, accepted[name])
        elif name in _NAME_HINTS:
            faults.append(f"{where} {_NAME_HINTS[name]}")
        else:
            faults.append(f"{where} is not a parameter{nearest(name, accepted)}; accepted: {', '.join(accepted)}")
    return faults


def accepted_parameters(cls: type, leading: int) -> dict[str, Any]:
    """A constructor's parameters and defaults after `self` and `leading` more; those without one map to None."""
    entries = list(inspect.signature(cls.__init__).parameters.values())[1 + leading :]  # type: ignore[misc]
    named = [p for p in entries if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: None if p.default is p.empty else p.default for p in named}


def _find_recipe(name: str) -> _Recipe:
    if not isinstance(name, str):
        raise OptimizerError(f"optimizer.type must be a name, got {name!r}; known: {', '.join(_OFFERED)}")
    key = name.lower()
    if key in _REFUSED:
        raise UnsupportedError(f"optimizer.type {name} {_REFUSED[key]}")
    if key in _RECIPES:
        return _RECIPES[key]
    if key in _TORCH_CLASSES:
        return _Recipe(_TORCH_CLASSES[key])
    known = [one for one in _OFFERED if one.lower() not in _REFUSED]
    raise OptimizerError(f"optimizer.type {name} is unknown{nearest(name, known)}; known: {', '.join(known)}")


def _signature(recipe: _Recipe) -> dict[str, Any]:
    accepted = {**accepted_parameters(recipe.cls, leading=1), **recipe.switches}
    return {name: value for name, value in accepted.items() if name != "max_grad_norm"}


def _adam(name: str, recipe: _Recipe, given: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class and options for Adam or AdamW, from DeepSpeed's switches.

    DeepSpeed's Adam decays weights as AdamW does unless `adam_w_mode` is false, and its AdamW always does; without
    `torch_adam` the default weight decay of both is 0.
    """
    switch = {**recipe.switches, **given}
    options = {key: value for key, value in given.items() if key not in recipe.switches}
    decoupled = recipe is _ADAMW or (switch["adam_w_mode"] and switch["decoupled_weight_decay"])
    if not switch["fp32_optimizer_states"]:
        raise UnsupportedError(f"optimizer {name}: fp32_optimizer_states false is not done here; moments are fp32")
    if not switch["torch_adam"]:
        options = {"weight_decay": 0.0, **options}
    if switch["bias_correction"]:
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), options
    options = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
    extra = sorted(key for key in options if options[key] and key not in accepted_parameters(UncorrectedAdam, 1))
    if extra:
        raise UnsupportedError(
            f"optimizer {name}: optimizer.params.{extra[0]} does not go with bias_correction false: drop one of the two"
        )
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


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _type_faults(where: str, value: Any, default: Any) -> list[str]:
    """What is wrong with a value, judged by the type of its parameter's default."""
    name = where.rsplit(".", 1)[-1]
    default = _MAY_BE_NONE.get(name, default)
    if value == "auto" and isinstance(value, str):
        return [f'{where} is still "auto": that is filled in by a trainer such as transformers\'; write the value']
    if default is None or (value is None and name in _MAY_BE_NONE):
        return []
    if isinstance(default, bool):
        return [] if isinstance(value, bool) else [f"{where} must be true or false, got {value!r}"]
    if isinstance(default, (int, float)):
        return [] if _is_number(value) else [f"{where} must be a finite number, got {value!r}{_unquote(value)}"]
    if isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default)
        fits = fits and all(_is_number(one) or (one is None and d is None) for one, d in zip(value, default))
        return [] if fits else [f"{where} must be a list of {len(default)} numbers, got {value!r}"]
    return []


def _unquote(value: Any) -> str:
    try:
        return f": write it without quotes, {float(value)}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _range_faults(options: Mapping[str, Any]) -> list[str]:
    """Numbers outside the range that every optimizer with a parameter of that name demands."""
    faults = []
    for name, value in options.items():
        if name in _NOT_NEGATIVE and _is_number(value) and value < 0:
            faults.append(f"optimizer.params.{name} must not be negative, got {value}")
        if name == "betas" and isinstance(value, (list, tuple)):
            faults += [
                f"optimizer.params.betas[{index}] must be in [0, 1), got {beta}"
                for index, beta in enumerate(value)
                if _is_number(beta) and not 0 <= beta < 1
            ]
    return faults


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


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a fresh optimizer of the same class moves two matrices exactly as it moves their concatenation."""
    first = optimizer.param_groups[0]
    device = first["params"][0].device
    accepted = accepted_parameters(type(optimizer), leading=1)
    options = {key: value for key, value in first.items() if key in accepted and key != "params"}
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 6), (5, 7))
    whole = [torch.randn(shape, generator=generator).to(device) * (i + 1) for i, shape in enumerate(shapes)]
    flat = torch.cat([tensor.flatten() for tensor in whole])
    start = flat.clone()
    layouts = [[torch.nn.Parameter(t.clone()) for t in whole], [torch.nn.Parameter(flat)]]
    for tensors in layouts:
        noise = torch.Generator().manual_seed(2)
        trial = type(optimizer)(tensors, **options)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for _ in range(3):
                grads = [torch.randn(shape, generator=noise).to(device) * 10.0**i for i, shape in enumerate(shapes)]
                grads = grads if len(tensors) > 1 else [torch.cat([g.flatten() for g in grads])]
                for tensor, grad in zip(tensors, grads):
                    tensor.grad = grad
                trial.step()
    moved = [torch.cat([t.detach().flatten() for t in tensors]) - start for tensors in layouts]
    return torch.allclose(moved[0], moved[1], rtol=1e-3, atol=1e-6 * float(moved[0].abs().max()))
