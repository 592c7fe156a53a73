"""The ops by name, as scripts look them up: `deepspeed.ops.__compatible_ops__["async_io"]`, `all_ops.ALL_OPS`."""

from __future__ import annotations

from typing import Any

from deepspeedlite.ops import op_builder


def __getattr__(name: str) -> Any:
    builders = {spec.name: spec.builder for spec in op_builder.OPS.values()}
    if name == "ALL_OPS":  # op -> its builder
        return {op: getattr(op_builder, builder)() for op, builder in builders.items()}
    if name == "compatible_ops":  # op -> whether it can be had here; nothing is compiled
        return {op: getattr(op_builder, builder)().is_compatible() for op, builder in builders.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
