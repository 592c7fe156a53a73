"""`zero_grad` of what was handed to `initialize`: of the module, of any part of it, of the optimizer.

They look for gradients in `param.grad`, where some are not shown, and in parameters that the optimizer no longer
holds; so they are told of it here. What they are called on is theirs: it lives longer than an engine may, is copied and
pickled. An instance attribute hides their method, holds nothing of the engine, and is the plain method in any copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deepspeedlite.zero.grad_reducer import GradReducer


class ModuleClearing:
    """Lets `zero_grad` of a module and its parts clear gradients that `param.grad` does not show.

    Args:
        module: the model; modules that are attached to it later are cleared as parts of it.
        reducer: whose gradients they are.
    """

    def __init__(self, module: torch.nn.Module, reducer: GradReducer) -> None:
        self._planted: list[tuple[weakref.ref[torch.nn.Module], _ZeroGrad]] = []
        self.is_needed = not all(unit.shows_gradients for unit in reducer.units)
        if not self.is_needed:
            return
        for part in module.modules():
            planted = part.__dict__["zero_grad"] = _ZeroGrad(part, reducer)
            self._planted.append((weakref.ref(part), planted))

    def close(self) -> None:
        """Give the modules their own method back."""
        for reference, planted in self._planted:
            part = reference()
            if part is not None and part.__dict__.get("zero_grad") is planted:
                del part.__dict__["zero_grad"]
        self._planted.clear()


class _ZeroGrad:
    """A module's `zero_grad`, and that of the gradients it cannot see."""

    def __init__(self, module: torch.nn.Module, reducer: GradReducer) -> None:
        self._module, self._reducer = module, weakref.ref(reducer)

    def __call__(self, set_to_none: bool = True) -> None:
        type(self._module).zero_grad(self._module, set_to_none)
        reducer = self._reducer()
        if reducer is not None:
            reducer.forget(self._module.parameters())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (type(self._module).zero_grad, self._module)


def clear_with(optimizer: torch.optim.Optimizer, forget: Callable[[], None]) -> None:
    """Let `optimizer.zero_grad()` call `forget`, a method of an object that may go before the optimizer does."""
    method = weakref.WeakMethod(forget)

    def zero_grad(set_to_none: bool = True) -> None:
        call = method()
        if call is not None:
            call()
        else:
            type(optimizer).zero_grad(optimizer, set_to_none)

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
