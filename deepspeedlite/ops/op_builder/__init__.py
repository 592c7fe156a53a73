"""The ops: what each is made of (`spec`), how it is compiled (`toolchain`), when it is needed (`jit`) or into a wheel
(`wheel`), and loading it (`builder`).

Of the rest of the package only `runtime/` is imported from here, and torch only where an op is loaded: setup.py (where
nothing is installed), the library and env_report all read the one table.
"""

from deepspeedlite.ops.op_builder.builder import load_ops
from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.folders import cache_folder, places
from deepspeedlite.ops.op_builder.gpu import named_archs
from deepspeedlite.ops.op_builder.jit import LEAST_BYTES, CacheEntry, built, cache_entries, compiled, why_not
from deepspeedlite.ops.op_builder.library_file import NO_SUM, load_error
from deepspeedlite.ops.op_builder.prebuilt import Record, installed_libraries, misfit, read_record
from deepspeedlite.ops.op_builder.spec import OPS, OpSpec
from deepspeedlite.ops.op_builder.toolchain import ISA_VARIABLE, check_cxx, find_cxx, max_jobs, named_isa
from deepspeedlite.ops.op_builder.torch_build import find_torch

__all__ = [
    "ISA_VARIABLE",
    "LEAST_BYTES",
    "NO_SUM",
    "OPS",
    "CacheEntry",
    "OpBuildError",
    "OpSpec",
    "Record",
    "built",
    "cache_entries",
    "cache_folder",
    "check_cxx",
    "compiled",
    "find_cxx",
    "find_torch",
    "installed_libraries",
    "load_error",
    "load_ops",
    "max_jobs",
    "misfit",
    "named_archs",
    "named_isa",
    "places",
    "read_record",
    "why_not",
]
