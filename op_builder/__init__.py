"""The ops: what each is made of (`spec`), how it is compiled (`toolchain`), and compiling it when it is needed (`jit`).

Nothing here imports deepspeedlite, or torch: setup.py, the library and env_report all read the one table.
Inside the package this folder is `deepspeedlite.ops.op_builder`.
"""

from .jit import CacheEntry, built, cache_entries, cache_folder, why_not
from .prebuilt import installed_libraries
from .spec import OPS, OpSpec
from .toolchain import OpBuildError

__all__ = [
    "OPS",
    "CacheEntry",
    "OpBuildError",
    "OpSpec",
    "built",
    "cache_entries",
    "cache_folder",
    "installed_libraries",
    "why_not",
]
