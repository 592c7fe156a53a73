"""The one ZeRO: what is sharded, how it lies in flat buffers, when it is moved, and what users call.

Read `plan`, `layout`, `flat_params`, `grad_buffer`, `arrivals`, `unit`, `prefetch`, `grad_reducer`, in this order; the
last has a note on the way of a gradient. `wrap` is policy. What users call at this path, `zero.Init` and
`zero.GatheredParameters`, is in rooms above. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {"ZeroParamStatus": "flat_params"}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepspeedlite.zero.{_LAZY[name]}"), name)
