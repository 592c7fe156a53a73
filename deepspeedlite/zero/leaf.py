"""Leaf modules: unsharded as one by stage 3, whatever runs inside them.

In a mixture of experts each rank runs the experts that its tokens are routed to. Gathering is collective, so the ranks
must not depend on the route: the whole block is unsharded on every rank. `torch.nn.MultiheadAttention` is a leaf
always, because it reads the weights of its output projection without calling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from deepspeedlite.runtime.errors import ConfigError

ALWAYS = (torch.nn.MultiheadAttention,)
# Blocks of transformers that route tokens to experts; the default of zero_optimization.leaf_module.classes.
KNOWN_CLASSES = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")

_MARKED = WeakIdKeyDictionary()


def z3_leaf_module(model: torch.nn.Module) -> bool:
    """Whether a module is a leaf."""
    return bool(_MARKED.get(model, isinstance(model, ALWAYS)))


def set_z3_leaf_module(model: torch.nn.Module, flag: bool) -> None:
    """Make one module a leaf, or no longer one. Has its effect on engines made afterwards."""
    _MARKED[model] = flag


def get_z3_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost leaf modules of a model."""
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if module not in inside and z3_leaf_module(module):
            found.append(module)
            inside.update(module.modules())
    return found


def set_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Make every module of the given classes, or class names, a leaf; returns those modules.

    Raises:
        ConfigError: no module of the model is of these classes.
    """
    return _flag(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """The opposite of `set_z3_leaf_modules`."""
    return _flag(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: torch.nn.Module, module_names: Sequence[str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Make the modules of these full names leaves; returns them.

    Raises:
        ConfigError: the model lacks one of them.
    """
    named = dict(model.named_modules())
    missing = sorted(set(module_names) - named.keys())
    if missing and raise_if_not_found:
        raise ConfigError(f"leaf modules: the model has no module called {', '.join(missing)}")
    found = [named[name] for name in module_names if name in named]
    for module in found:
        set_z3_leaf_module(module, True)
    return found


def set_z3_leaf_modules_by_suffix(
    model: torch.nn.Module, module_name_suffixes: Sequence[str], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Make the modules whose full names end in one of these leaves; returns them.

    Raises:
        ConfigError: no name of a module ends so.
    """
    endings = tuple(module_name_suffixes)
    found = [module for name, module in model.named_modules() if name.endswith(endings)]
    if not found and raise_if_not_found:
        raise ConfigError(f"leaf modules: no module's name ends in {', '.join(endings)}")
    for module in found:
        set_z3_leaf_module(module, True)
    return found


def mark_leaves(
    model: torch.nn.Module,
    classes: Sequence[str] | str | None,
    names: Sequence[str] | str = (),
    suffixes: Sequence[str] | str = (),
) -> None:
    """Make leaves of what the configuration's `leaf_module` section lists; None: the classes known to need it."""
    if classes is None:
        _flag(model, KNOWN_CLASSES, True, raise_if_not_found=False)
    elif classes:
        _flag(model, _listed(classes), True, raise_if_not_found=True)
    set_z3_leaf_modules_by_name(model, _listed(names))
    if suffixes:
        set_z3_leaf_modules_by_suffix(model, _listed(suffixes))


def _flag(
    model: torch.nn.Module, classes: Iterable[type | str], flag: bool, raise_if_not_found: bool
) -> list[torch.nn.Module]:
    wanted = list(classes)
    found = [module for module in model.modules() if any(_is_of(module, one) for one in wanted)]
    if raise_if_not_found and not found:
        shown = ", ".join(one if isinstance(one, str) else one.__name__ for one in wanted)
        raise ConfigError(f"leaf modules: no module of {type(model).__name__} is of class {shown}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _is_of(module: torch.nn.Module, wanted: type | str) -> bool:
    if isinstance(wanted, str):
        kind = type(module)
        return wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return isinstance(module, wanted)


def _listed(value: Sequence[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
