"""Learning-rate schedules by name, as a configuration's `scheduler` section asks for them: torch's, and plug-ins'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from deepspeedlite.config.recipes import scheduler_faults
from deepspeedlite.optim.registry import fault_line
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.runtime.plugins import plugins

_TORCH_SCHEDULES: dict[str, type] = {
    name.lower(): getattr(lr_scheduler, name) for name in lr_scheduler.__all__ if name != "LRScheduler"
}


def build_scheduler(type: str, params: Mapping[str, Any] | None, optimizer: Any) -> Any:
    """The schedule called `type` with the section's `params`, applied to `optimizer`.

    `type` is a plug-in's name or a torch.optim.lr_scheduler class. Raises `OptimizerError` for an unknown
    name, for parameters of a wrong name or type, and for required ones left out.
    """
    options = dict(params or {})
    if faults := scheduler_faults(type, options):
        raise OptimizerError(f"scheduler {type}: " + "\n  ".join(fault_line("scheduler", type, *one) for one in faults))
    cls = plugins.find("schedule", type.lower()) or _TORCH_SCHEDULES.get(type.lower())
    if cls is None:
        raise OptimizerError(f"scheduler {type} is unknown; known: {', '.join(lr_scheduler.__all__)}")
    try:
        return cls(with_param_groups(optimizer), **options)
    except (OptimizerError, TypeError, ValueError, AttributeError) as error:
        raise OptimizerError(f"scheduler {type} cannot be built with scheduler.params {options}: {error}") from error


def with_param_groups(optimizer: Any) -> Any:
    """The object whose `param_groups` are to be written: an inner torch optimizer first, else the one given."""
    candidates = [one for one in (optimizer, getattr(optimizer, "optimizer", None)) if hasattr(one, "param_groups")]
    if not candidates:
        raise OptimizerError(f"a schedule needs an optimizer with param_groups, got {type(optimizer).__name__}")
    return next((one for one in candidates if isinstance(one, torch.optim.Optimizer)), candidates[0])
