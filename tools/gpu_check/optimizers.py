"""A step of the fused Adam, LAMB and Lion, as a share of the bandwidth of a copy (benchmarks/fused_optim.py's own)."""

from __future__ import annotations

import sys
from typing import Any

from deepspeedlite.ops import is_available
from tools.gpu_check.setting import ROOT, NotHereError, Rows, Setting

MOST_NUMEL = 1 << 28
BYTES_EACH = 72  # of a parameter: all contenders' states, gradients and copies together


def rows(setting: Setting) -> Rows:
    """One for each contender, the copy first."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.insert(0, str(ROOT / "benchmarks"))
    from fused_optim import contenders

    type_ = setting.device.type
    numel = 1 << 12 if setting.tiny else min(MOST_NUMEL, int(setting.device.free_bytes() * 0.8) // BYTES_EACH)
    found: dict[str, Any] = {}
    yield setting.tried("parameters", lambda: found.update(contenders(numel, type_)) or {"Mparams": numel / 1e6})
    rates: dict[str, float] = {}
    for name, contender in found.items():

        def measured(name: str = name, contender: Any = contender) -> dict[str, Any]:
            if name.startswith("Fused") and type_ == "cuda" and not is_available("fused_adam", type_):
                raise NotHereError("its kernels could not be compiled: see build")
            if name.startswith("FusedAdam") and type_ not in ("cpu", "cuda"):
                raise NotHereError(f"FusedAdam takes no tensors on {setting.device.name}")
            ms = setting.step_ms(contender.step, *((1, 2) if setting.tiny else (3, 10)))
            rates[name] = numel * contender.element_bytes / (ms * 1e6)
            return {"step_ms": ms, "GB_per_s": rates[name], "of_copy": rates[name] / rates.get("copy", rates[name])}

        yield setting.tried(name, measured, judges=False)
