"""Leaf modules under DeepSpeed's names; what they are is told in `zero.leaf`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.zero.leaf import is_leaf, leaf_modules, mark_leaf, modules_ending, modules_named, modules_of

z3_leaf_module = is_leaf
get_z3_leaf_modules = leaf_modules
set_z3_leaf_module = mark_leaf


def set_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Make every module of the given classes, or class names, a leaf; returns those modules.

    Raises:
        ConfigError: no module of the model is of these classes.
    """
    return _marked(modules_of(model, leaf_module_classes, raise_if_not_found), True)


def unset_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """The opposite of `set_z3_leaf_modules`."""
    return _marked(modules_of(model, leaf_module_classes, raise_if_not_found), False)


def set_z3_leaf_modules_by_name(
    model: torch.nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[torch.nn.Module], list[str]]:
    """Make the modules of these full names leaves, or (`flag`) no longer; returns them, and the names of none.

    Raises:
        ConfigError: the model lacks one of them.
    """
    found = _marked(modules_named(model, module_names, raise_if_not_found), flag)
    known = dict(model.named_modules())
    return found, [name for name in module_names if name not in known]


def set_z3_leaf_modules_by_suffix(
    model: torch.nn.Module, module_name_suffixes: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[torch.nn.Module], list[str]]:
    """Make the modules whose full names end so leaves, or (`flag`) no longer; returns them, and endings of none.

    Raises:
        ConfigError: no name of a module ends in one of them.
    """
    by_suffix = {suffix: modules_ending(model, [suffix], required=False) for suffix in module_name_suffixes}
    missing = [suffix for suffix, found in by_suffix.items() if not found]
    if missing and raise_if_not_found:
        raise ConfigError(f"leaf modules: no module's name ends in {', '.join(missing)}")
    return _marked(modules_ending(model, module_name_suffixes, required=False), flag), missing


def _marked(modules: list[torch.nn.Module], flag: bool) -> list[torch.nn.Module]:
    for module in modules:
        set_z3_leaf_module(module, flag)
    return modules
