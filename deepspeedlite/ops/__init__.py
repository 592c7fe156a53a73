"""Compiled ops and the optimizers made of them. Every op has a counterpart in plain torch, for where it cannot be had.

`load("cpu_adam")` gives the op, compiled when it is first asked for (see `op_builder.jit`). Only that imports torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from deepspeedlite.runtime.errors import OpError
from deepspeedlite.runtime.log import log_once


@cache
def load(name: str, device_type: str = "cpu") -> Any:
    """The op `torch.ops.deepspeedlite.<name>`, for tensors on a `"cpu"` or `"cuda"` device.

    Raises:
        OpError: there is none of that name, or it cannot be compiled or loaded here, or not for that device; the
            message says why.
        ConfigError: of the variable that names an instruction set.
    """
    from deepspeedlite.ops.op_builder import OPS, OpBuildError, load_ops, named_isa  # 6 ms, for who loads none

    spec = next((spec for spec in OPS.values() if name in spec.ops), None)
    if spec is None:
        raise OpError(f"there is no op {name}; the ops are {', '.join(op for spec in OPS.values() for op in spec.ops)}")
    named_isa()
    try:
        op = getattr(load_ops(spec), name)
    except OpBuildError as error:
        raise OpError(f"op {name} is not available: {error}") from error
    import torch

    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"deepspeedlite::{name}", device_type.upper()):
        raise OpError(f"op {name} is not available on {device_type}: it was compiled for the CPU alone")
    return op


@cache
def find_op(name: str, device_type: str = "cpu") -> Any:
    """The op's one overload, quicker to call than what `load` gives; None where `is_available` is false."""
    return load(name, device_type).default if is_available(name, device_type) else None


@cache
def is_available(name: str, device_type: str = "cpu") -> bool:
    """Whether `load` works; says once why not."""
    try:
        load(name, device_type)
    except OpError as error:
        log_once(f"{error}\n  torch does its work instead, more slowly")
        return False
    return True
