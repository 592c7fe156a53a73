"""Leaf modules: unsharded as one by stage 3, whatever runs inside them.

In a mixture of experts each rank runs the experts that its tokens are routed to. Gathering is collective, so the ranks
must not depend on the route: the whole block is unsharded on every rank. `torch.nn.MultiheadAttention` is a leaf
always, because it reads the weights of its output projection without calling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from deepspeedlite.config.sections.zero import KNOWN_LEAVES
from deepspeedlite.runtime.errors import ConfigError

ALWAYS = (torch.nn.MultiheadAttention,)
KNOWN_CLASSES = tuple(name.rpartition(".")[2] for name in KNOWN_LEAVES)  # wherever a copy of one is defined

_MARKED = WeakIdKeyDictionary()


def is_leaf(model: torch.nn.Module) -> bool:
    """Whether a module is a leaf."""
    return bool(_MARKED.get(model, isinstance(model, ALWAYS)))


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile makes one graph of a module, which hooks inside would cut into pieces."""
    return module not in _MARKED and (module._compiled_call_impl is not None or hasattr(module, "_orig_mod"))


def mark_leaf(model: torch.nn.Module, flag: bool) -> None:
    """Make one module a leaf, or no longer one. Has its effect on engines made afterwards."""
    _MARKED[model] = flag


def leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost leaf modules of a model, and parts of it that are compiled; a whole model is too large for one."""
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if module not in inside and (is_leaf(module) or (module is not model and _is_compiled(module))):
            found.append(module)
            inside.update(module.modules())
    return found


def mark_leaves(
    model: torch.nn.Module,
    classes: Sequence[str] | str | None,
    names: Sequence[str] | str = (),
    suffixes: Sequence[str] | str = (),
) -> None:
    """Make leaves of what the section `leaf_module` lists; None, or its default: the classes known to need it."""
    if classes is None or tuple(classes) == KNOWN_LEAVES:
        found = modules_of(model, KNOWN_CLASSES, required=False)
    else:
        found = modules_of(model, _listed(classes)) if classes else []
    found += modules_named(model, _listed(names))
    found += modules_ending(model, _listed(suffixes)) if suffixes else []
    for module in found:
        mark_leaf(module, True)


def modules_of(model: torch.nn.Module, classes: Iterable[type | str], required: bool = True) -> list[torch.nn.Module]:
    """The modules of these classes, or classes of these names; ConfigError if there must be one and is none."""
    wanted = list(classes)
    found = [module for module in model.modules() if any(_is_of(module, one) for one in wanted)]
    if required and not found:
        shown = ", ".join(one if isinstance(one, str) else one.__name__ for one in wanted)
        raise ConfigError(f"leaf modules: no module of {type(model).__name__} is of class {shown}")
    return found


def modules_named(model: torch.nn.Module, names: Sequence[str], required: bool = True) -> list[torch.nn.Module]:
    """The modules of these full names; ConfigError if one is not there that must be."""
    named = dict(model.named_modules())
    missing = sorted(set(names) - named.keys())
    if missing and required:
        raise ConfigError(f"leaf modules: the model has no module called {', '.join(missing)}")
    return [named[name] for name in names if name in named]


def modules_ending(model: torch.nn.Module, suffixes: Sequence[str], required: bool = True) -> list[torch.nn.Module]:
    """The modules whose full names end in one of these; ConfigError if there must be one and is none."""
    found = [module for name, module in model.named_modules() if name.endswith(tuple(suffixes))]
    if not found and required:
        raise ConfigError(f"leaf modules: no module's name ends in {', '.join(suffixes)}")
    return found


def _is_of(module: torch.nn.Module, wanted: type | str) -> bool:
    if isinstance(wanted, str):
        kind = type(module)
        return wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return isinstance(module, wanted)


def _listed(value: Sequence[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
