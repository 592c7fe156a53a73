"""torch's compiler, imported when something is compiled and not as soon as an optimizer is made.

torch keeps its compiler (torch._dynamo) out of some methods of every optimizer, and imports it to do so: a second of
every process that makes one, whether it compiles anything or not. Until somebody else has imported it there is nothing
to keep out, and the methods run as they are written. (torch's own optimizers import it once more with their first step,
and torch's activation checkpointing does: of ours, and of what they stand for in a configuration, it is true.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

_DISABLED = "__dynamo_disable"  # where torch keeps what it has made of a function (torch/_compile.py)
_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def import_compiler_late() -> None:
    """Have optimizers import the compiler no more. Those of a torch that does it otherwise stay as they are."""
    for name in _METHODS:
        wrapper = getattr(Optimizer, name)
        written = getattr(wrapper, "__wrapped__", None)
        if written is not None and not hasattr(written, _DISABLED):
            setattr(written, _DISABLED, _until_imported(wrapper, written))


def _until_imported(wrapper: Callable[..., Any], written: Callable[..., Any]) -> Callable[..., Any]:
    """What `wrapper` is to call: `written`, until the compiler is there; then torch's own way is restored."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return written(*args, **kwargs)
        if getattr(written, _DISABLED, None) is call:  # another thread may have restored it meanwhile
            delattr(written, _DISABLED)
        return wrapper(*args, **kwargs)

    return call
