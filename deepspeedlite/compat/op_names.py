"""The ops by name, as scripts look them up: `deepspeed.ops.__compatible_ops__["async_io"]`, `all_ops.ALL_OPS`."""

from __future__ import annotations

from typing import Any

from deepspeedlite.compat.op_builders import BUILDERS


def __getattr__(name: str) -> Any:
    builders = [builder() for builder in BUILDERS.values()]
    if name == "ALL_OPS":  # op -> its builder
        return {builder.NAME: builder for builder in builders}
    if name == "compatible_ops":  # op -> whether it can be had here; nothing is compiled
        return {builder.NAME: builder.is_compatible() for builder in builders}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
