"""Parameters that a model is given after `initialize`: an adapter, another head, a parameter assigned to a module.

They are plain tensors, whole on every rank, and the model uses them as they are. What may go wrong with them is looked
for only when something was attached, of which torch tells: that `zero.Init` has sharded them, so that nobody unshards
them, and that a loss trains them while no optimizer knows them, which would go unnoticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero.flat_params import make_whole
from deepspeedlite.zero.plain import Hook
from deepspeedlite.zero.prefetch import is_prefetched
from deepspeedlite.zero.unit import unit_of
from deepspeedlite.zero.wrap import NamedParameter


class Attached:
    """The parameters of one model that no optimizer steps: those of `initialize`, and those attached since.

    Args:
        root: the model.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        self._root = root
        named = list(root.named_parameters())
        # By id, with the parameters, so that no other can have it: what could have been trained from the start.
        self._frozen = {id(param): (name, param) for name, param in named if not param.requires_grad}
        self._left_out = {id(p): p for _, p in named if p.requires_grad and unit_of(p) is None}
        self._new: dict[int, tuple[str, torch.Tensor]] = {}
        self._modules = {id(module) for module in root.modules()}
        self._handles: list[Any] = []
        self._check: Any = None  # the hook that looks through the model before its next pass
        for register in (register_module_parameter_registration_hook, register_module_module_registration_hook):
            self._handles.append(register(_weakly(self)))
            weakref.finalize(self, self._handles[-1].remove)

    def note(self, module: torch.nn.Module, value: Any) -> None:
        """A module somewhere was given a parameter or a module."""
        if self._check is not None or id(module) not in self._modules or value is None:
            return
        if isinstance(value, torch.Tensor) or any(True for _ in value.parameters()):
            self._check = self._root.register_forward_pre_hook(Hook(self._before_forward), prepend=True)

    def _before_forward(self, *args: Any) -> None:
        self._look()

    def _look(self) -> None:
        """Find what is new. Collective where `zero.Init` has sharded some of it."""
        if self._check is None:
            return
        self._check.remove()
        self._check = None
        self._modules = {id(module) for module in self._root.modules()}
        found = dict(self._root.named_parameters())
        make_whole(param for param in found.values() if not is_prefetched(param))
        self._new = {
            id(param): (name, param)
            for name, param in found.items()
            if unit_of(param) is None and id(param) not in (self._frozen | self._left_out)
        }

    def verify_trained(self, waiting: Collection[NamedParameter]) -> None:
        """A parameter that no optimizer group knows would be left as it is, unnoticed.

        Args:
            waiting: parameters of the optimizer's groups that are to be trained later.

        Raises:
            EngineStateError: one requires grad since `initialize`, or was attached since and has a gradient.
        """
        self._look()
        known = {id(entry.param) for entry in waiting}
        for key, (name, param) in self._frozen.items():
            if param.requires_grad and key not in known and unit_of(param) is None:
                raise _untrained(name, "did not require grad in initialize, does so in step()")
        for name, new in self._new.values():
            if new.grad is not None and unit_of(new) is None:
                raise _untrained(name, "was attached to the model after initialize, has a gradient in step()")

    def close(self) -> None:
        """Remove the hooks."""
        for handle in [*self._handles, *([self._check] if self._check is not None else [])]:
            handle.remove()


def _weakly(attached: Attached) -> Any:
    """A hook for every module of the process, which does not keep the model alive."""
    reference = weakref.ref(attached)

    def hook(module: torch.nn.Module, name: str, value: Any) -> None:
        found = reference()
        if found is not None:
            found.note(module, value)

    return hook


def _untrained(name: str, what: str) -> EngineStateError:
    return EngineStateError(
        f"parameter {name} {what}, and belongs to no group of the optimizer: train it from now on with "
        'optimizer.add_param_group({"params": [...]}), or freeze it again'
    )
