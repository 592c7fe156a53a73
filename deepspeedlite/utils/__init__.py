"""What scripts import from `deepspeed.utils`: sharded state read and written, leaf modules, the logger.

Everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepspeedlite.drop_in.finder import name_of

if TYPE_CHECKING:
    from deepspeedlite.data import RepeatingLoader
    from deepspeedlite.log import log_dist, log_dist_once, logger
    from deepspeedlite.utils.inspect import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )
    from deepspeedlite.utils.on_device import OnDevice
    from deepspeedlite.zero.leaf import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        z3_leaf_module,
    )

__all__ = [
    "OnDevice",
    "RepeatingLoader",
    "get_z3_leaf_modules",
    "log_dist",
    "log_dist_once",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
]


def _home(name: str) -> str:
    if name.startswith("safe_"):
        return "deepspeedlite.utils.inspect"
    if "z3_leaf" in name:
        return "deepspeedlite.zero.leaf"
    homes = {"RepeatingLoader": "data", "OnDevice": "utils.on_device"}
    return f"deepspeedlite.{homes.get(name, 'log')}"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        return name_of(__name__, name)
    value = getattr(importlib.import_module(_home(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
