"""The optimizers and schedules that a configuration may name, with their parameters, as data; and what is wrong in one.

`optimizer_faults` and `scheduler_faults` are asked when a configuration is loaded and again where the object is built;
so `config check`, which knows no torch, refuses what `initialize` refuses. A torch that is loaded is asked for its own
signatures; without one those in recipes.json, which are torch 2.13's, stand for them. That table has, too, what is
refused and why (`refused`, `whole_tensor`), which classes DeepSpeed's names stand for and which switches these take
(`names`; `fp32_optimizer_states` and `set_grad_none` choose between implementations there), and what is said of names
that people write and that no spelling distance leads to the right one, of parameters and of the file's own `keys`.
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

from deepspeedlite.runtime.plugins import plugins
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


_OURS = [line.partition("(")[0] for line in _TABLE["signatures"]["deepspeedlite"]]
OPTIMIZERS: Mapping[str, Known] = {name: Known(ours=name) for name in _OURS} | {
    name: Known(**known) for names, known in _TABLE["names"].items() for name in names.split()
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
    """What is wrong with a `scheduler` section, by path within it, as a plug-in says."""
    look = plugins.find("faults", "scheduler")
    return look(type, params) if look is not None else []


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
        return signature("torch.optim", names[type.lower()])
    own = signature("torch.optim", known.torch) if known.torch else signatures("deepspeedlite")[known.ours]
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
            said = (problem or type_problem)(name, value, accepted[name])
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


def signature(module: str, name: str) -> Mapping[str, Any]:
    """A class of torch's parameters and defaults: of the torch that is loaded, or the table's."""
    cls = getattr(sys.modules.get(module), name, None)
    return signatures(module)[name] if cls is None else accepted_parameters(cls, leading=1)


def _optimizer_names() -> list[str]:
    return classes("torch.optim", "Optimizer")


def classes(module: str, base_name: str) -> list[str]:
    """The names of torch's classes: of one that is loaded, or the table's."""
    loaded = sys.modules.get(module)
    base = getattr(loaded, base_name, None)
    if base is None:
        return list(signatures(module))
    found = (n for n, c in vars(loaded).items() if isinstance(c, type) and issubclass(c, base) and c is not base)
    return [name for name in found if not name.startswith("_")]


def type_problem(name: str, value: Any, default: Any) -> str:
    """What is wrong with a value, judged by the type of its parameter's default."""
    default = _MAY_BE_NONE.get(name, default)
    if default in (None, REQUIRED) or (value is None and name in _MAY_BE_NONE):
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else f"must be true or false, got {value!r}"
    if isinstance(default, (int, float)):
        return "" if is_number(value) else f"must be a finite number, got {value!r}{unquote(value)}"
    if isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default)
        fits = fits and all(is_number(one) or (one is None and d is None) for one, d in zip(value, default))
        return "" if fits else f"must be a list of {len(default)} numbers, got {value!r}"
    return ""


def unquote(value: Any) -> str:
    """What to add where text stands for a number; "" where it is none."""
    try:
        return f": write it without quotes, {float(value)}" if isinstance(value, str) else ""
    except ValueError:
        return ""
