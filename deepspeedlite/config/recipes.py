"""The optimizers and schedules that a configuration may name, with their parameters, as data; and what is wrong in one.

`optimizer_faults` and `scheduler_faults` are asked when a configuration is loaded and again where the object is built;
so `config check`, which knows no torch, refuses what `initialize` refuses. A torch that is loaded is asked for its own
signatures; without one those in recipes.json, which are torch 2.13's, stand for them. That table has, too, what is
refused and why (`refused`, `whole_tensor`), and what is said of names that people write and that no spelling distance
leads to the right one, of parameters and of the file's own `keys`.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from deepspeedlite.runtime.text import IN_BRACKETS, did_you_mean

REQUIRED: Any = ...
Faults = list[tuple[tuple[Any, ...], str]]  # (path within the section, what is wrong)


_TABLE: Any = json.loads(Path(__file__).with_name("recipes.json").read_text("utf-8"))


@cache
def signatures(of: str) -> Mapping[str, Mapping[str, Any]]:
    """The table's `Name(needed, other=1e-3)` as {"Name": {"needed": REQUIRED, "other": 1e-3}}.

    Args:
        of: a module of torch's, "schedules" or "deepspeedlite" for ours.
    """
    calls: list[Any] = [ast.parse(line, mode="eval").body for line in _TABLE["signatures"][of]]
    return {
        call.func.id: {
            **{parameter.id: REQUIRED for parameter in call.args},
            **{parameter.arg: ast.literal_eval(parameter.value) for parameter in call.keywords},
        }
        for call in calls
    }


class Known(NamedTuple):
    """A name of DeepSpeed's: the class of torch's or ours that it stands for, and the switches that it takes."""

    torch: str = ""
    ours: str = ""
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
_LION = Known(ours="lion", switches={"fp32_optimizer_states": True})
_LAMB = Known(ours="lamb")
_OURS = [line.partition("(")[0] for line in _TABLE["signatures"]["deepspeedlite"]]
OPTIMIZERS: Mapping[str, Known] = {
    **{name: Known(ours=name) for name in _OURS},
    **dict.fromkeys(("adam", "fusedadam", "cpuadam", "deepspeedcpuadam"), _ADAM),
    "adamw": Known("AdamW", switches=ADAM_SWITCHES),
    **dict.fromkeys(("adagrad", "cpuadagrad", "deepspeedcpuadagrad"), _ADAGRAD),
    **dict.fromkeys(("lion", "fusedlion", "cpulion", "deepspeedcpulion"), _LION),
    **dict.fromkeys(("lamb", "fusedlamb"), _LAMB),
}

# Optimizers whose update of an element depends on the shape of its tensor or on the tensor's other elements, or that
# need more than one gradient per step. Flat runs hide both, so the result would be silently wrong.
WHOLE_TENSOR: Mapping[str, str] = _TABLE["whole_tensor"]
OTHER_NAMES: Mapping[str, str] = _TABLE["keys"]
_WHERE_WHOLE = ("adafactor", "lbfgs")  # of a configuration's names, what is done where nothing is sharded
REFUSED: Mapping[str, str] = {
    **{name: f"{WHOLE_TENSOR[name]}, or ZeRO stage 0" for name in _WHERE_WHOLE},
    **{name: WHOLE_TENSOR[name] for name in ("muon", "sparseadam")},
    **_TABLE["refused"],
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
    ours = signatures("schedules").get(name)
    accepted = ours or _signature("torch.optim.lr_scheduler", name)
    faults = check_parameters(accepted, params, _schedule_problem if ours else _torch_schedule_problem)
    missing = (key for key, default in accepted.items() if default is REQUIRED and key not in params)
    return faults + [(("params", key), "is not given") for key in missing]


def unknown_optimizer(type: Any) -> str:
    """Why a name stands for no optimizer; "" if it does."""
    names = {name.lower(): name for name in _optimizer_names()}
    offered = sorted({*(n.capitalize() for n in _OURS), *(n for k, n in names.items() if k not in REFUSED)})
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
        return _signature("torch.optim", names[type.lower()])
    own = _signature("torch.optim", known.torch) if known.torch else signatures("deepspeedlite")[known.ours]
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
        elif name in _TABLE["parameters"]:
            said = _TABLE["parameters"][name]
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


def _signature(module: str, name: str) -> Mapping[str, Any]:
    cls = getattr(sys.modules.get(module), name, None)
    return signatures(module)[name] if cls is None else accepted_parameters(cls, leading=1)


def _optimizer_names() -> list[str]:
    return _classes("torch.optim", "Optimizer")


def _schedule_names() -> list[str]:
    return [*signatures("schedules"), *_classes("torch.optim.lr_scheduler", "LRScheduler")]


def _classes(module: str, base_name: str) -> list[str]:
    """The names of torch's classes: of one that is loaded, or the table's."""
    loaded = sys.modules.get(module)
    base = getattr(loaded, base_name, None)
    if base is None:
        return list(signatures(module))
    found = (n for n, c in vars(loaded).items() if isinstance(c, type) and issubclass(c, base) and c is not base)
    return [name for name in found if not name.startswith("_")]


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


def schedule_problem(name: str, value: Any) -> str:
    """What is wrong with an argument of our schedules' constructors; "" for nothing, or if it is none of theirs."""
    defaults = [of[name] for of in signatures("schedules").values() if name in of]
    if not defaults or isinstance(defaults[0], bool) or (value is None and None in defaults):
        return ""
    return _schedule_problem(name, value, defaults[0])


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
