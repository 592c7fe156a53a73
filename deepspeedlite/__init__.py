"""deepspeedlite: training acceleration with DeepSpeed's interface and a small core.

    engine, optimizer, loader, scheduler = deepspeedlite.initialize(model=model, config="ds_config.json", ...)
    engine = deepspeedlite.init_inference(model, dtype=torch.bfloat16)

Everything below is imported on first use: `import deepspeedlite` itself loads neither torch nor the rest of the
package, so that the launcher and the command-line tools start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepspeedlite._version import __version__
from deepspeedlite.compat.drop_in.finder import name_of, serve
from deepspeedlite.runtime.plugins import plugins

if TYPE_CHECKING:
    from deepspeedlite.compat.comm import init_distributed
    from deepspeedlite.compat.engine import DeepSpeedEngine
    from deepspeedlite.compat.inference import init_inference
    from deepspeedlite.compat.initialize import add_config_arguments, initialize
    from deepspeedlite.compat.tuning_arguments import add_tuning_arguments

_OWN = ("config", "errors")
# What the core is given beside what it has, so that it need not know it: where it is, and what it is asked for as.
_PLUGINS = {
    "checkpoint.formats.deepspeed.saver:DeepSpeedSaver": [("saver", "deepspeed")],
    "parallel.mpu:groups_of": [("groups", "mpu")],
    "spellings:modernise": [("older spellings", "rewrite")],
    "spellings:older_names": [("older spellings", "names")],
    "schedule_parameters:scheduler_faults": [("faults", "scheduler")],
    "schedulers:world_of": [("world", "schedulers")],
    "schedulers:ask_mpi": [
        ("address of rank 0", name) for name in ("Open MPI", "MVAPICH", "MPICH or Intel MPI", "SageMaker")
    ],
    "segments:tell_segments": [("segments", "numbers")],
    "segments:tell_parameters": [("segments", "parameters")],
    "transports.gloo:GlooTransport": [("transport", "gloo")],
    **{
        f"schedules:{name}": [("schedule", name.lower())]
        for name in ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    },
}
_LAZY = {"add_tuning_arguments": "compat.tuning_arguments", "init_inference": "compat.inference"}

for _place, _added in _PLUGINS.items():
    for _kind, _name in _added:
        plugins.add(_kind, _name, f"{__name__}.{_place}")
serve()  # DeepSpeed's module paths, such as deepspeedlite.runtime.lr_schedules: see drop_in

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "add_config_arguments",
    "add_tuning_arguments",
    "init_distributed",
    "init_inference",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name in _OWN:
        return importlib.import_module(f"deepspeedlite.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"deepspeedlite.{_LAZY[name]}"), name)
    return name_of(__name__, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_OWN, "comm", "monitor", "profiling", "utils", "zero"])
