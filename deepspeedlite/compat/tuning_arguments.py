"""Learning-rate schedules on a command line, with DeepSpeed's arguments and defaults."""

from __future__ import annotations

import argparse
from typing import Any

from deepspeedlite.config.recipes import accepted_parameters
from deepspeedlite.runtime.text import IN_BRACKETS, did_you_mean
from deepspeedlite.schedules import SCHEDULES, VALID_LR_SCHEDULES

# --lr_range_test_min_lr and so on: the name, its default on the command line, what it is.
_TUNING_ARGUMENTS: tuple[tuple[str, Any, str], ...] = (
    ("lr_range_test_min_lr", 0.001, "LRRangeTest: the rate to start from"),
    ("lr_range_test_step_rate", 1.0, "LRRangeTest: growth per interval, as a multiple of the first rate"),
    ("lr_range_test_step_size", 1000, "LRRangeTest: steps per interval"),
    ("lr_range_test_staircase", False, "LRRangeTest: grow once per interval instead of every step"),
    ("cycle_first_step_size", 1000, "OneCycle: steps of the rise"),
    ("cycle_first_stair_count", -1, "OneCycle: stairs of the rise (-1: none)"),
    ("cycle_second_step_size", -1, "OneCycle: steps of the fall (-1: as many as of the rise)"),
    ("cycle_second_stair_count", -1, "OneCycle: stairs of the fall (-1: as many as of the rise)"),
    ("decay_step_size", 1000, "OneCycle: steps per interval of the decay after the cycle"),
    ("cycle_min_lr", 0.01, "OneCycle: lowest rate of the cycle"),
    ("cycle_max_lr", 0.1, "OneCycle: highest rate of the cycle"),
    ("decay_lr_rate", 0.0, "OneCycle: decay of the rate per interval after the cycle"),
    ("cycle_momentum", False, "OneCycle: cycle the momentum too"),
    ("cycle_min_mom", 0.8, "OneCycle: lowest momentum"),
    ("cycle_max_mom", 0.9, "OneCycle: highest momentum"),
    ("decay_mom_rate", 0.0, "OneCycle: growth of the momentum per interval after the cycle"),
    ("warmup_min_lr", 0.0, "WarmupLR, WarmupDecayLR: the rate to start from"),
    ("warmup_max_lr", 0.001, "WarmupLR, WarmupDecayLR: the rate to reach"),
    ("warmup_num_steps", 1000, "Warmup*: steps of the rise"),
    ("warmup_type", "log", "Warmup*: shape of the rise, log or linear"),
    ("warmup_min_ratio", 0.01, "WarmupCosineLR: what to start from, as a part of the optimizer's lr"),
    ("cos_min_ratio", 0.01, "WarmupCosineLR: what to end at, as a part of the optimizer's lr"),
)


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--lr_schedule` and one argument for every schedule parameter, with DeepSpeed's names and defaults."""
    group = parser.add_argument_group("learning-rate schedule")
    group.add_argument("--lr_schedule", type=str, default=None, help=f"one of {', '.join(VALID_LR_SCHEDULES)}")
    for name, default, text in _TUNING_ARGUMENTS:
        if isinstance(default, bool):
            group.add_argument(f"--{name}", action="store_true", default=default, help=text)
        else:
            group.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default %(default)s)")
    return parser


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """A `scheduler` section from the arguments of `add_tuning_arguments`: (section, None) or (None, why not)."""
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in SCHEDULES:
        return None, f"{name} is not a supported LR schedule{did_you_mean(name, VALID_LR_SCHEDULES, form=IN_BRACKETS)}"
    accepted = accepted_parameters(SCHEDULES[name], leading=1)
    given = {key: value for key, value in vars(args).items() if key in accepted and value is not None}
    params = {key: value for key, value in given.items() if not (key.startswith("cycle_") and value == -1)}
    return {"type": name, "params": params}, None
