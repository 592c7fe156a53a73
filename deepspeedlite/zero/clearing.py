"""`zero_grad` of what was handed to `initialize`: of the module, of any part of it, of the optimizer.

They look for gradients in `param.grad`, where some are not shown, and in parameters that the optimizer no longer
holds; so they are told of it here. What they are called on is theirs: it lives longer than an engine may, is copied and
pickled. torch has hooks for a step and for a state dict, and none for this: an instance attribute hides their method,
holds nothing of the engine, and is the plain method in any copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from deepspeedlite.zero.grad_reducer import GradReducer

_Parameters = Callable[[], Iterable[torch.Tensor]]


class ClearsUnseen:
    """The `zero_grad` of a module or an optimizer, and that of the gradients it cannot see.

    Args:
        of: the module or optimizer, which has it as an instance attribute from now on.
        reducer: whose gradients they are.
        parameters: gives those whose gradients are meant; None: all are.
    """

    def __init__(self, of: Any, reducer: GradReducer, parameters: _Parameters | None = None) -> None:
        self._of, self._reducer, self._parameters = of, weakref.ref(reducer), parameters
        vars(of)["zero_grad"] = self

    def __call__(self, set_to_none: bool = True) -> None:
        type(self._of).zero_grad(self._of, set_to_none)
        reducer = self._reducer()
        if reducer is not None:
            reducer.forget(self._parameters() if self._parameters is not None else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (type(self._of).zero_grad, self._of)


class ModuleClearing:
    """Lets `zero_grad` of a module and its parts clear gradients that `param.grad` does not show.

    Args:
        module: the model; modules that are attached to it later are cleared as parts of it.
        reducer: whose gradients they are.
    """

    def __init__(self, module: torch.nn.Module, reducer: GradReducer) -> None:
        self.is_needed = not all(unit.shows_gradients for unit in reducer.units)
        self._planted = [
            (weakref.ref(part), ClearsUnseen(part, reducer, part.parameters))
            for part in (module.modules() if self.is_needed else ())
        ]

    def close(self) -> None:
        """Give the modules their own method back."""
        for reference, planted in self._planted:
            part = reference()
            if part is not None and vars(part).get("zero_grad") is planted:
                del vars(part)["zero_grad"]
        self._planted.clear()
