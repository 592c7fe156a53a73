"""The optimizers and schedules that a configuration may name, with their parameters, as data; and what is wrong in one.

`optimizer_faults` and `scheduler_faults` are asked when a configuration is loaded and again where the object is built;
so `config check`, which knows no torch, refuses what `initialize` refuses. A torch that is loaded is asked for its own
signatures; without one the tables below, which are torch 2.13's, stand for them.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deepspeedlite.runtime.text import IN_BRACKETS, did_you_mean

REQUIRED: Any = ...
Faults = list[tuple[tuple[Any, ...], str]]  # (path within the section, what is wrong)


def _signatures(text: str) -> Mapping[str, Mapping[str, Any]]:
    """`Name(needed, other=1e-3)`, a line each, as {"Name": {"needed": REQUIRED, "other": 1e-3}}; "    " goes on."""
    calls: list[Any] = [ast.parse(line, mode="eval").body for line in text.replace("\n    ", " ").strip().splitlines()]
    return {
        call.func.id: {
            **{parameter.id: REQUIRED for parameter in call.args},
            **{parameter.arg: ast.literal_eval(parameter.value) for parameter in call.keywords},
        }
        for call in calls
    }


# torch.optim's classes: parameters and their defaults.
TORCH_OPTIMIZERS = _signatures("""
Adadelta(lr=1.0, rho=0.9, eps=1e-06, weight_decay=0, foreach=None, maximize=False, differentiable=False,
    capturable=False)
Adafactor(lr=0.01, beta2_decay=-0.8, eps=(None, 0.001), d=1.0, weight_decay=0.0, foreach=None, maximize=False)
Adagrad(lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, foreach=None, maximize=False,
    differentiable=False, fused=None)
Adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False, foreach=None, maximize=False,
    differentiable=False, capturable=False, fused=None, decoupled_weight_decay=False)
AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, foreach=None, maximize=False,
    differentiable=False, capturable=False, fused=None)
Adamax(lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, foreach=None, maximize=False, differentiable=False,
    capturable=False)
ASGD(lr=0.01, lambd=0.0001, alpha=0.75, t0=1000000.0, weight_decay=0, foreach=None, maximize=False,
    differentiable=False, capturable=False)
LBFGS(lr=1, max_iter=20, max_eval=None, tolerance_grad=1e-07, tolerance_change=1e-09, history_size=100,
    line_search_fn=None)
Muon(lr=0.001, weight_decay=0.1, momentum=0.95, nesterov=True, eps=1e-07, ns_steps=5, ns_coefficients=(3.4445,
    -4.775, 2.0315), adjust_lr_fn=None)
NAdam(lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, momentum_decay=0.004, decoupled_weight_decay=False,
    foreach=None, maximize=False, differentiable=False, capturable=False)
RAdam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, decoupled_weight_decay=False, foreach=None,
    maximize=False, differentiable=False, capturable=False)
RMSprop(lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, foreach=None, maximize=False,
    differentiable=False, capturable=False)
Rprop(lr=0.01, etas=(0.5, 1.2), step_sizes=(1e-06, 50), foreach=None, maximize=False, differentiable=False,
    capturable=False)
SGD(lr=0.001, momentum=0, dampening=0, weight_decay=0, nesterov=False, foreach=None, maximize=False,
    differentiable=False, fused=None)
SparseAdam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, maximize=False)
""")


class Known(NamedTuple):
    """A name of DeepSpeed's: the torch class that it stands for, or ours' parameters; and the switches it takes."""

    torch: str = ""
    ours: str = ""
    own: Mapping[str, Any] = {}
    switches: Mapping[str, Any] = {}


# `fp32_optimizer_states` and `set_grad_none` choose between implementations in DeepSpeed; see the registry's `_adam`.
ADAM_SWITCHES = {
    "adam_w_mode": True,
    "torch_adam": False,
    "bias_correction": True,
    "fp32_optimizer_states": True,
    "set_grad_none": True,
}
_ADAM = Known("Adam", switches={**ADAM_SWITCHES, "decoupled_weight_decay": True})
_ADAGRAD = Known("Adagrad", switches={"fp32_optimizer_states": True})
_OURS = _signatures("""
lion(lr=0.001, betas=(0.9, 0.999), weight_decay=0.0, set_grad_none=True)
lamb(lr=0.001, bias_correction=True, betas=(0.9, 0.999), eps=1e-08, eps_inside_sqrt=False, weight_decay=0.0,
    max_coeff=10.0, min_coeff=0.01, amsgrad=False)
""")
_LION = Known(
    ours="lion",
    own=_OURS["lion"],
    switches={"fp32_optimizer_states": True},
)
_LAMB = Known(
    ours="lamb",
    own=_OURS["lamb"],
)
OPTIMIZERS: Mapping[str, Known] = {
    **dict.fromkeys(("adam", "fusedadam", "cpuadam", "deepspeedcpuadam"), _ADAM),
    "adamw": Known("AdamW", switches=ADAM_SWITCHES),
    **dict.fromkeys(("adagrad", "cpuadagrad", "deepspeedcpuadagrad"), _ADAGRAD),
    **dict.fromkeys(("lion", "fusedlion", "cpulion", "deepspeedcpulion"), _LION),
    **dict.fromkeys(("lamb", "fusedlamb"), _LAMB),
}

# Optimizers whose update of an element depends on the shape of its tensor or on the tensor's other elements, or that
# need more than one gradient per step. Flat runs hide both, so the result would be silently wrong.
WHOLE_TENSOR: Mapping[str, str] = {
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
_WHERE_WHOLE = ("adafactor", "lbfgs")  # of a configuration's names, what is done where nothing is sharded
REFUSED: Mapping[str, str] = {
    **{name: f"{WHOLE_TENSOR[name]}, or ZeRO stage 0" for name in _WHERE_WHOLE},
    **{name: WHOLE_TENSOR[name] for name in ("muon", "sparseadam")},
    "onebitadam": _ONE_BIT.format("Adam"),
    "zerooneadam": _ONE_BIT.format("Adam"),
    "onebitlamb": _ONE_BIT.format("Lamb"),
    "muadam": _MUP.format("MuAdam"),
    "muadamw": _MUP.format("MuAdamW"),
    "musgd": _MUP.format("MuSGD"),
}

SCHEDULES = _signatures("""
LRRangeTest(lr_range_test_min_lr=0.001, lr_range_test_step_size=2000, lr_range_test_step_rate=1.0,
    lr_range_test_staircase=False, last_batch_iteration=-1)
OneCycle(cycle_min_lr, cycle_max_lr, decay_lr_rate=0.0, cycle_first_step_size=2000, cycle_second_step_size=None,
    cycle_first_stair_count=0, cycle_second_stair_count=None, decay_step_size=0, cycle_momentum=True,
    cycle_min_mom=0.8, cycle_max_mom=0.9, decay_mom_rate=0.0, last_batch_iteration=-1)
WarmupLR(warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=1000, warmup_type='log', last_batch_iteration=-1)
WarmupDecayLR(total_num_steps, warmup_min_lr=0.0, warmup_max_lr=0.001, warmup_num_steps=1000, warmup_type='log',
    last_batch_iteration=-1)
WarmupCosineLR(total_num_steps, warmup_min_ratio=0.0, warmup_num_steps=1000, cos_min_ratio=0.0001,
    warmup_type='log', last_batch_iteration=-1)
""")
TORCH_SCHEDULES = _signatures("""
LambdaLR(lr_lambda, last_epoch=-1)
MultiplicativeLR(lr_lambda, last_epoch=-1)
StepLR(step_size, gamma=0.1, last_epoch=-1)
MultiStepLR(milestones, gamma=0.1, last_epoch=-1)
ConstantLR(factor=0.3333333333333333, total_iters=5, last_epoch=-1)
LinearLR(start_factor=0.3333333333333333, end_factor=1.0, total_iters=5, last_epoch=-1)
ExponentialLR(gamma, last_epoch=-1)
SequentialLR(schedulers, milestones, last_epoch=-1)
PolynomialLR(total_iters=5, power=1.0, last_epoch=-1)
CosineAnnealingLR(T_max, eta_min=0.0, last_epoch=-1)
ChainedScheduler(optimizer=None)
ReduceLROnPlateau(mode='min', factor=0.1, patience=10, threshold=0.0001, threshold_mode='rel', cooldown=0, min_lr=0,
    eps=1e-08)
CyclicLR(base_lr, max_lr, step_size_up=2000, step_size_down=None, gamma=1.0, mode='triangular', scale_fn=None,
    scale_mode='cycle', cycle_momentum=True, base_momentum=0.8, max_momentum=0.9, last_epoch=-1)
CosineAnnealingWarmRestarts(T_0, T_mult=1, eta_min=0.0, last_epoch=-1)
OneCycleLR(max_lr, total_steps=None, epochs=None, steps_per_epoch=None, pct_start=0.3, anneal_strategy='cos',
    cycle_momentum=True, base_momentum=0.85, max_momentum=0.95, div_factor=25.0, final_div_factor=10000.0,
    three_phase=False, last_epoch=-1)
""")

# Names that people write and that no spelling distance leads to the right one.
_ONE_BIT_ONLY = "belongs to the 1-bit optimizers, which are not here: leave it out"
_CLIPPING = 'is not an optimizer parameter: set "gradient_clipping" at the top level of the configuration'
_NAME_HINTS: Mapping[str, str] = {
    "max_grad_norm": _CLIPPING,
    "grad_clip": _CLIPPING,
    "learning_rate": 'is called "lr"',
    "epsilon": 'is called "eps"',
    "beta1": 'is part of "betas": [beta1, beta2]',
    "beta2": 'is part of "betas": [beta1, beta2]',
    "wd": 'is called "weight_decay"',
    **dict.fromkeys(("freeze_step", "cuda_aware", "comm_backend_name", "var_freeze_step", "coeff_beta"), _ONE_BIT_ONLY),
}
_MAY_BE_NONE = {"foreach": False, "fused": False}  # torch's default None means "choose"; given, they are booleans
_NOT_NEGATIVE = {"lr", "eps", "weight_decay", "momentum", "lr_decay", "initial_accumulator_value", "momentum_decay"}

# Of our schedules: what takes one value for every parameter group, the least whole number, the words of a choice.
_PER_GROUP = {"lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom"}
_PER_GROUP |= {"warmup_min_lr", "warmup_max_lr"}
_WHOLE_FROM = {"lr_range_test_step_size": 1, "total_num_steps": 1, "warmup_num_steps": 0}
_AT_LEAST = {"cycle_second_step_size": 0, "decay_step_size": 0}
_CHOICES = {"warmup_type": ("log", "linear")}


def optimizer_faults(type: Any, params: Mapping[str, Any], sharded: bool = True) -> Faults:
    """What is wrong with an `optimizer` section, by path within it: the name alone, or any of the parameters.

    `sharded`: the stage is not 0.
    """
    problem = unknown_optimizer(type) or refused_optimizer(type, sharded)
    if problem:
        return [(("type",), problem)]
    faults = check_parameters(optimizer_parameters(type), params)
    for name, value in params.items():
        if name in _NOT_NEGATIVE and is_number(value) and value < 0:
            faults.append((("params", name), f"must not be negative, got {value}"))
        if name == "betas" and isinstance(value, (list, tuple)):
            wrong = ((i, beta) for i, beta in enumerate(value) if is_number(beta) and not 0 <= beta < 1)
            faults += [(("params", name, index), f"must be in [0, 1), got {beta}") for index, beta in wrong]
    bare = not params.get("momentum") or params.get("dampening")
    if params.get("nesterov") is True and bare and "dampening" in optimizer_parameters(type):
        faults.append((("params", "nesterov"), "needs a momentum, and no dampening"))
    return faults


def refused_combination(type: str, params: Mapping[str, Any]) -> tuple[str, str] | None:
    """A parameter that is right in itself and asks for what is not done here, and why; None if there is none."""
    if "adam_w_mode" not in OPTIMIZERS.get(type.lower(), Known()).switches:
        return None
    if not params.get("fp32_optimizer_states", True):
        return "fp32_optimizer_states", "false is not done here; moments are fp32"
    if not params.get("bias_correction", True):
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            if params.get(name):
                return name, "does not go with bias_correction false: drop one of the two"
    return None


def scheduler_faults(type: Any, params: Mapping[str, Any]) -> Faults:
    """What is wrong with a `scheduler` section, by path within it: the name alone, or any of the parameters."""
    by_lower = {name.lower(): name for name in _schedule_names()}
    name = by_lower.get(str(type).lower())
    if name is None:
        known = list(by_lower.values())
        return [(("type",), f"is unknown{did_you_mean(str(type), known, form=IN_BRACKETS)}; known: {', '.join(known)}")]
    accepted = SCHEDULES.get(name) or _signature("torch.optim.lr_scheduler", name, TORCH_SCHEDULES)
    faults = check_parameters(accepted, params, _schedule_problem if name in SCHEDULES else _torch_schedule_problem)
    missing = (key for key, default in accepted.items() if default is REQUIRED and key not in params)
    return faults + [(("params", key), "is not given") for key in missing]


def unknown_optimizer(type: Any) -> str:
    """Why a name stands for no optimizer; "" if it does."""
    names = {name.lower(): name for name in _optimizer_names()}
    offered = sorted({"Adam", "AdamW", "Adagrad", "Lion", "Lamb"} | {n for k, n in names.items() if k not in REFUSED})
    if not isinstance(type, str):
        return f"must be a name, got {type!r}; known: {', '.join(offered)}"
    if type.lower() in REFUSED or type.lower() in OPTIMIZERS or type.lower() in names:
        return ""
    return f"is unknown{did_you_mean(type, offered, form=IN_BRACKETS)}; known: {', '.join(offered)}"


def refused_optimizer(type: str, sharded: bool = True) -> str:
    """Why an optimizer that is known is not done here; "" if it is."""
    return REFUSED.get(type.lower(), "") if sharded or type.lower() not in _WHERE_WHOLE else ""


def optimizer_parameters(type: str) -> Mapping[str, Any]:
    """The parameters that a name takes, with their defaults."""
    known = OPTIMIZERS.get(type.lower())
    if known is None:
        names = {name.lower(): name for name in _optimizer_names()}
        return _signature("torch.optim", names[type.lower()], TORCH_OPTIMIZERS)
    own = _signature("torch.optim", known.torch, TORCH_OPTIMIZERS) if known.torch else known.own
    return {**own, **known.switches}


def check_parameters(
    accepted: Mapping[str, Any], given: Mapping[str, Any], problem: Callable[[str, Any, Any], str] | None = None
) -> Faults:
    """Faults of the names and types in `given`; `accepted` maps each name to its default."""
    faults: Faults = []
    for name, value in given.items():
        if isinstance(value, str) and value == "auto":
            said = 'is still "auto": that is filled in by a trainer such as transformers\'; write the value'
        elif name in accepted:
            said = (problem or _type_problem)(name, value, accepted[name])
        elif name in _NAME_HINTS:
            said = _NAME_HINTS[name]
        else:
            said = (
                f"is not a parameter{did_you_mean(name, accepted, form=IN_BRACKETS)}; accepted: {', '.join(accepted)}"
            )
        if said:
            faults.append((("params", name), said))
    return faults


def is_number(value: Any) -> bool:
    """A finite number, or a tensor of one element."""
    if hasattr(value, "numel"):
        return bool(value.numel() == 1)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def accepted_parameters(cls: type, leading: int) -> dict[str, Any]:
    """A constructor's parameters and defaults after `self` and `leading` more; those without one map to REQUIRED."""
    entries = list(inspect.signature(cls.__init__).parameters.values())[1 + leading :]  # type: ignore[misc]
    named = [p for p in entries if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in named}


def _signature(module: str, name: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    cls = getattr(sys.modules.get(module), name, None)
    return table[name] if cls is None else accepted_parameters(cls, leading=1)


def _optimizer_names() -> list[str]:
    torchs = sys.modules.get("torch.optim")
    base = getattr(torchs, "Optimizer", None)
    if base is None:
        return list(TORCH_OPTIMIZERS)
    return [n for n, c in vars(torchs).items() if isinstance(c, type) and issubclass(c, base) and c is not base]


def _schedule_names() -> list[str]:
    torchs = sys.modules.get("torch.optim.lr_scheduler")
    base = getattr(torchs, "LRScheduler", None)
    if base is None:
        return [*SCHEDULES, *TORCH_SCHEDULES]
    found = [n for n, c in vars(torchs).items() if isinstance(c, type) and issubclass(c, base) and c is not base]
    return [*SCHEDULES, *(name for name in found if not name.startswith("_"))]


def _type_problem(name: str, value: Any, default: Any) -> str:
    """What is wrong with a value, judged by the type of its parameter's default."""
    default = _MAY_BE_NONE.get(name, default)
    if default in (None, REQUIRED) or (value is None and name in _MAY_BE_NONE):
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else f"must be true or false, got {value!r}"
    if isinstance(default, (int, float)):
        return "" if is_number(value) else f"must be a finite number, got {value!r}{_unquote(value)}"
    if isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default)
        fits = fits and all(is_number(one) or (one is None and d is None) for one, d in zip(value, default))
        return "" if fits else f"must be a list of {len(default)} numbers, got {value!r}"
    return ""


def _torch_schedule_problem(name: str, value: Any, default: Any) -> str:
    """The schedules of torch take much in place of a number (a list, one for each group), but no text where none is."""
    if isinstance(default, bool):
        return _type_problem(name, value, default)
    wrong = isinstance(value, str) and not isinstance(default, str)
    return f"must be a number, got {value!r}{_unquote(value)}" if wrong else ""


def _schedule_problem(name: str, value: Any, default: Any) -> str:
    if name in _CHOICES:
        words = " or ".join(f'"{word}"' for word in _CHOICES[name])
        return "" if value in _CHOICES[name] else f"must be {words}, got {value!r}"
    if isinstance(default, bool):
        return _type_problem(name, value, default)
    if value is None and default is None:
        return ""
    each = value if name in _PER_GROUP and isinstance(value, (list, tuple)) else [value]
    if not all(is_number(one) for one in each):
        return f"must be a finite number, got {value!r}{_unquote(value)}"
    least = _WHOLE_FROM.get(name, _AT_LEAST.get(name))
    if least is not None and value < least:
        return f"must be at least {least}, got {value}"
    if name in _WHOLE_FROM and value != int(value):
        return f"must be a whole number of steps, got {value!r}"
    if name == "cycle_first_step_size" and value <= 0:
        return f"must be more than 0, got {value}"
    return ""


def _unquote(value: Any) -> str:
    try:
        return f": write it without quotes, {float(value)}" if isinstance(value, str) else ""
    except ValueError:
        return ""
