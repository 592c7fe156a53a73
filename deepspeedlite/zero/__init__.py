"""The one ZeRO: what is sharded, how it lies in flat buffers, when it is moved, and what users call.

Read `plan`, `layout`, `values`, `unit`, `schedule`, `hooks`, in this order. `wrap` is policy, and `init` is
what users call. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from deepspeedlite.drop_in.finder import name_of

_LAZY = {
    "Init": "init",
    "GatheredParameters": "gathered",
    "register_external_parameter": "hooks",
    "unwrap_model_for_generation": "gathered",
    "ZeroParamStatus": "values",
    "estimate_zero2_model_states_mem_needs_all_live": "estimate",
    "estimate_zero2_model_states_mem_needs_all_cold": "estimate",
    "estimate_zero3_model_states_mem_needs_all_live": "estimate",
    "estimate_zero3_model_states_mem_needs_all_cold": "estimate",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        return name_of(__name__, name)
    return getattr(importlib.import_module(f"deepspeedlite.zero.{_LAZY[name]}"), name)
