"""A plug-in of `config.recipes`: the schedules that a configuration may name, and what their parameters may be.

Like `config.recipes` it needs no torch. What `schedules` builds checks its arguments here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeedlite.config.recipes import (
    REQUIRED,
    Faults,
    check_parameters,
    classes,
    is_number,
    signature,
    signatures,
    type_problem,
    unquote,
)
from deepspeedlite.runtime.text import IN_BRACKETS, did_you_mean

# Of our schedules: what takes one value for every parameter group, the least whole number, the words of a choice.
_PER_GROUP = {"lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom"}
_PER_GROUP |= {"warmup_min_lr", "warmup_max_lr"}
_WHOLE_FROM = {"lr_range_test_step_size": 1, "total_num_steps": 1, "warmup_num_steps": 0}
_AT_LEAST = {"cycle_second_step_size": 0, "decay_step_size": 0}
_CHOICES = {"warmup_type": ("log", "linear")}


def scheduler_faults(type: Any, params: Mapping[str, Any]) -> Faults:
    """What is wrong with a `scheduler` section, by path within it: the name alone, or any of the parameters."""
    by_lower = {name.lower(): name for name in _schedule_names()}
    name = by_lower.get(str(type).lower())
    if name is None:
        known = list(by_lower.values())
        return [(("type",), f"is unknown{did_you_mean(str(type), known, form=IN_BRACKETS)}; known: {', '.join(known)}")]
    ours = signatures("schedules").get(name)
    accepted = ours or signature("torch.optim.lr_scheduler", name)
    faults = check_parameters(accepted, params, _schedule_problem if ours else _torch_schedule_problem)
    missing = (key for key, default in accepted.items() if default is REQUIRED and key not in params)
    return faults + [(("params", key), "is not given") for key in missing]


def _schedule_names() -> list[str]:
    return [*signatures("schedules"), *classes("torch.optim.lr_scheduler", "LRScheduler")]


def _torch_schedule_problem(name: str, value: Any, default: Any) -> str:
    """The schedules of torch take much in place of a number (a list, one for each group), but no text where none is."""
    if isinstance(default, bool):
        return type_problem(name, value, default)
    wrong = isinstance(value, str) and not isinstance(default, str)
    return f"must be a number, got {value!r}{unquote(value)}" if wrong else ""


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
        return type_problem(name, value, default)
    if value is None and default is None:
        return ""
    each = value if name in _PER_GROUP and isinstance(value, (list, tuple)) else [value]
    if not all(is_number(one) for one in each):
        return f"must be a finite number, got {value!r}{unquote(value)}"
    least = _WHOLE_FROM.get(name, _AT_LEAST.get(name))
    if least is not None and value < least:
        return f"must be at least {least}, got {value}"
    if name in _WHOLE_FROM and value != int(value):
        return f"must be a whole number of steps, got {value!r}"
    if name == "cycle_first_step_size" and value <= 0:
        return f"must be more than 0, got {value}"
    return ""
