"""deepspeedlite: training acceleration with DeepSpeed's interface and a small core.

    engine, optimizer, loader, scheduler = deepspeedlite.initialize(model=model, config="ds_config.json", ...)

Everything below is imported on first use: `import deepspeedlite` itself loads neither torch nor the rest of the
package, so that the launcher and the command-line tools start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepspeedlite._version import __version__

if TYPE_CHECKING:
    from deepspeedlite.comm import init_distributed
    from deepspeedlite.engine import DeepSpeedEngine
    from deepspeedlite.factory import add_config_arguments, initialize
    from deepspeedlite.optim.lr_schedules import add_tuning_arguments

_LAZY = {
    "initialize": "deepspeedlite.factory",
    "add_config_arguments": "deepspeedlite.factory",
    "DeepSpeedEngine": "deepspeedlite.engine",
    "init_distributed": "deepspeedlite.comm",
    "add_tuning_arguments": "deepspeedlite.optim.lr_schedules",
}
_SUBPACKAGES = ("comm", "config", "errors", "monitor", "profiling", "utils", "zero")

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "add_config_arguments",
    "add_tuning_arguments",
    "init_distributed",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"deepspeedlite.{name}")
    else:
        raise AttributeError(f"module 'deepspeedlite' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
