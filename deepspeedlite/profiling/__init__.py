"""What training costs: time (timers.py), memory (memory.py) and floating-point work (flops.py).

Nothing here changes a training run: timers never wait for the device until a line is printed, and the FLOPs
profiler removes every hook that it set.
"""

from __future__ import annotations

from typing import Any

from deepspeedlite.drop_in.finder import name_of
from deepspeedlite.profiling.flops import FlopsProfiler, get_model_profile
from deepspeedlite.profiling.memory import memory_breakdown, see_memory_usage
from deepspeedlite.profiling.timers import ThroughputTimer, Timers

__all__ = [
    "FlopsProfiler",
    "ThroughputTimer",
    "Timers",
    "get_model_profile",
    "memory_breakdown",
    "see_memory_usage",
]


def __getattr__(name: str) -> Any:
    return name_of(__name__, name)
