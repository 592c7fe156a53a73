"""Compiled ops and the optimizers made of them. Every op has a counterpart in plain torch, for where it cannot be had.

`load("cpu_adam")` gives the op, compiled when it is first asked for (see `op_builder.jit`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from deepspeedlite.errors import OpError
from deepspeedlite.log import log_once
from deepspeedlite.ops.op_builder import OPS, OpBuildError, built


@cache
def load(name: str) -> Any:
    """The op `torch.ops.deepspeedlite.<name>`.

    Raises:
        OpError: it cannot be compiled or loaded here; the message says why.
    """
    try:
        torch.ops.load_library(str(built(OPS[name])))
    except (OpBuildError, OSError) as error:
        raise OpError(f"op {name} is not available: {error}") from error
    # All ops write into their arguments and return nothing, so a fake one has nothing to do.
    torch.library.register_fake(f"deepspeedlite::{name}", lambda *args: None)
    return getattr(torch.ops.deepspeedlite, name)


@cache
def is_available(name: str) -> bool:
    """Whether `load` works; says once why not."""
    try:
        load(name)
    except OpError as error:
        log_once(f"{error}\n  torch does its work instead, more slowly")
        return False
    return True
