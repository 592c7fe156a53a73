"""deepspeedlite: training acceleration with DeepSpeed's interface and a small core.

    engine, optimizer, loader, scheduler = deepspeedlite.initialize(model=model, config="ds_config.json", ...)

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
    from deepspeedlite.compat.initialize import add_config_arguments, initialize
    from deepspeedlite.compat.tuning_arguments import add_tuning_arguments

_OWN = ("config", "errors")
_LAZY = {"add_tuning_arguments": "compat.tuning_arguments"}

for _name in ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
    plugins.add("schedule", _name.lower(), f"deepspeedlite.schedules:{_name}")
plugins.add("saver", "deepspeed", "deepspeedlite.checkpoint.formats.deepspeed.saver:DeepSpeedSaver")
plugins.add("transport", "gloo", "deepspeedlite.transports.gloo:GlooTransport")
serve()  # DeepSpeed's module paths, such as deepspeedlite.runtime.lr_schedules: see drop_in

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "add_config_arguments",
    "add_tuning_arguments",
    "init_distributed",
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
