"""The ops: what each is made of (`spec`), how it is compiled (`toolchain`), when it is needed (`jit`) or into a wheel
(`wheel`), and loading it under DeepSpeed's builder classes (`builder`).

Nothing here imports deepspeedlite, and torch only where an op is loaded: setup.py, the library and env_report all read
the one table. Inside the package this folder is `deepspeedlite.ops.op_builder`.
"""

from typing import Any

from .builder import BUILDERS, OpBuilder, load_ops
from .errors import OpBuildError
from .jit import CacheEntry, built, cache_entries, cache_folder, compiled, why_not
from .prebuilt import Record, installed_libraries, misfit, read_record
from .spec import OPS, OpSpec
from .torch_build import find_torch

__all__ = [
    "BUILDERS",
    "OPS",
    "CacheEntry",
    "OpBuildError",
    "OpBuilder",
    "OpSpec",
    "Record",
    "built",
    "cache_entries",
    "cache_folder",
    "compiled",
    "find_torch",
    "installed_libraries",
    "load_ops",
    "misfit",
    "read_record",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in BUILDERS:
        return BUILDERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the builders are {', '.join(BUILDERS)}")
