"""DeepSpeed's rules for configurations, under which some mistakes are passed over: a plug-in of `config.load`.

Strict is the rule. Where scripts know the library by DeepSpeed's name, `drop_in.finder` adds this once for the process,
since configurations are read in many places: by `initialize`, `zero.Init`, `activation_checkpointing.configure`.
"""

from __future__ import annotations

from typing import Any

from deepspeedlite.config.faults import dotted
from deepspeedlite.config.load import known_key
from deepspeedlite.config.root import DeepSpeedConfig


def pass_over(tree: dict[str, Any]) -> list[str]:
    """Take out, or mend, what DeepSpeed lets pass in silence; a line about each."""
    return [*_take_unknown(tree), *_number_stage(tree)]


def _number_stage(tree: dict[str, Any]) -> list[str]:
    """Write a stage that is true or false as the number that Python takes it for; a line about it."""
    zero = tree.get("zero_optimization")
    if not isinstance(zero, dict) or not isinstance(zero.get("stage"), bool):
        return []
    zero["stage"] = int(zero["stage"])
    return [f"zero_optimization.stage: true or false, taken as {zero['stage']}; write the number"]


def _take_unknown(tree: dict[str, Any]) -> list[str]:
    """Take the unknown keys out of the top level; a line about each."""
    names = [name for name in tree if name not in DeepSpeedConfig.model_fields]
    for name in names:
        del tree[name]
    return [f"{dotted((name,))}: unknown key, passed over; {known_key((name,), DeepSpeedConfig)}" for name in names]
