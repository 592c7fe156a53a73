"""Copies of what an engine trains are plain: modules without the library's hooks, parameters that nobody owns.

`copy.deepcopy` and `pickle` ask an object itself how it is to be copied. Modules and parameters that an engine has
taken over answer with what they were before, so that a copy (an average of the weights, a teacher, a file) is a module
like any other. A parameter without values at the moment refuses: its copy would be empty.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from deepspeedlite.runtime.errors import EngineStateError


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in copies that are made entry by entry."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class Hook(functools.partial[Any]):
    """A hook of the library's on a user's module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_nothing, ()


class PlainState:
    """A module's `__getstate__`: its attributes without what the library has put there."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module: Callable[[], Any] = weakref.ref(module)

    def __call__(self) -> Any:
        module = self._module()
        own = getattr(type(module), "__getstate__", None)
        is_own = own is not None and own is not getattr(object, "__getstate__", None)
        state = own(module) if is_own and own is not None else dict(module.__dict__)
        return _without_hooks(state) if isinstance(state, dict) else state

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainState:
        # Of classes that copy their attributes one by one, such as torch's parametrized modules.
        return PlainState(memo.get(id(self._module()), self._module()))


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    hooks = [name for name, value in state.items() if name.startswith("_") and "_hooks" in name and value]
    ours = {key for name in hooks for key, value in state[name].items() if _is_ours(value)}
    kept = {name: type(state[name])((k, v) for k, v in state[name].items() if k not in ours) for name in hooks}
    return {name: kept.get(name, value) for name, value in state.items() if not isinstance(value, PlainState)}


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "hook", hook), Hook)  # torch wraps some


def copy_plainly(module: torch.nn.Module) -> None:
    """From now on, copies of this module (not of those in it) leave the library's hooks out."""
    module.__dict__["__getstate__"] = PlainState(module)


def end_plain_copies(module: torch.nn.Module) -> None:
    """Take back what `copy_plainly` did."""
    module.__dict__.pop("__getstate__", None)


def copy_parameter_plainly(param: torch.Tensor, name_if_empty: Callable[[torch.Tensor], str]) -> None:
    """From now on, copies of this parameter are parameters like any other.

    Args:
        param: a parameter.
        name_if_empty: gives the parameter's full name where its values are away, and a copy is an error; "" otherwise.
    """
    reference = weakref.ref(param)
    param.__dict__["__deepcopy__"] = Hook(_deepcopy, reference, name_if_empty)
    param.__dict__["__reduce_ex__"] = Hook(_reduce, reference, name_if_empty)


def _values_of(reference: Callable[[], Any], name_if_empty: Callable[[torch.Tensor], str]) -> Any:
    param = reference()
    _ = param.data  # which zero.Init makes whole, while it is active
    if name := name_if_empty(param):
        raise EngineStateError(
            f"parameter {name} cannot be copied: its values are sharded over the ranks, and this one has none of them "
            "at the moment. Copy inside deepspeedlite.zero.GatheredParameters(list(module.parameters())), on all ranks"
        )
    return param


def _deepcopy(reference: Callable[[], Any], name_if_empty: Any, memo: dict[int, Any]) -> Any:
    param = _values_of(reference, name_if_empty)
    return type(param).__deepcopy__(param, memo)


def _reduce(reference: Callable[[], Any], name_if_empty: Any, protocol: int) -> tuple[Any, ...]:
    param = _values_of(reference, name_if_empty)
    return torch._utils._rebuild_parameter, (param.data.clone(), param.requires_grad, OrderedDict())
