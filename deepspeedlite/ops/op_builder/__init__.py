"""The ops: what each is made of (`spec`), how it is compiled (`toolchain`), when it is needed (`jit`) or into a wheel
(`wheel`), and loading it (`builder`).

Nothing else of the package is imported from here, and torch only where an op is loaded: setup.py (where nothing is
installed), the library and env_report all read the one table.
"""

from deepspeedlite.ops.op_builder.builder import load_ops
from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.jit import CacheEntry, built, cache_entries, cache_folder, compiled, why_not
from deepspeedlite.ops.op_builder.prebuilt import Record, installed_libraries, misfit, read_record
from deepspeedlite.ops.op_builder.spec import OPS, OpSpec
from deepspeedlite.ops.op_builder.torch_build import find_torch

__all__ = [
    "OPS",
    "CacheEntry",
    "OpBuildError",
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
