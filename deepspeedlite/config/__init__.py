"""The configuration: what a DeepSpeed JSON file may say, what each key does here, and every mistake in it at once.

    config = load_config("ds_config.json", world_size=8)
    config.batch(8)                       # BatchSizes(train=64, micro=4, accumulation=2)
    config.zero_optimization.stage        # sections and scalars under DeepSpeed's names

`python -m deepspeedlite.config check FILE` does the same from a shell. unsupported.json lists what is not acted on.
"""

from __future__ import annotations

from deepspeedlite.config.base import Section
from deepspeedlite.config.batch import BatchSizes, solve_batch
from deepspeedlite.config.features import FEATURES, Feature
from deepspeedlite.config.load import load_config
from deepspeedlite.config.root import DeepSpeedConfig
from deepspeedlite.runtime.errors import ConfigError

__all__ = [
    "FEATURES",
    "BatchSizes",
    "ConfigError",
    "DeepSpeedConfig",
    "Feature",
    "Section",
    "load_config",
    "solve_batch",
]
