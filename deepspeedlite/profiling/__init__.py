"""What training costs: time (timers.py), memory (memory.py) and floating-point work (flops.py).

Nothing here changes a training run: timers never wait for the device until a line is printed, and the FLOPs
profiler removes every hook that it set.
"""

from __future__ import annotations

from deepspeedlite.metrics.flops import FlopsProfiler, get_model_profile
from deepspeedlite.metrics.memory import memory_breakdown, see_memory_usage
from deepspeedlite.metrics.timers import ThroughputTimer, Timers

__all__ = [
    "FlopsProfiler",
    "ThroughputTimer",
    "Timers",
    "get_model_profile",
    "memory_breakdown",
    "see_memory_usage",
]
