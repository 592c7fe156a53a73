"""How the table is asked.

A path is a module's name in DeepSpeed without the root: `runtime.engine` for `deepspeed.runtime.engine`. Some of its
modules are whole modules of ours under another name (`SAME_MODULE`); those are looked up under our path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from deepspeedlite.compat.drop_in.entry import Names, at
from deepspeedlite.compat.drop_in.modules import ABSENT_MODULES, MODULES

HOME = "deepspeedlite"

# DeepSpeed's path -> ours, for modules that are one and the same object, and everything below them.
SAME_MODULE: Mapping[str, str] = {
    "checkpointing": "activation_checkpointing",
    "runtime.activation_checkpointing.checkpointing": "activation_checkpointing",
    "runtime.zero": "zero",
    "comm.comm": "comm",
    "accelerator.real_accelerator": "accelerator",
    "accelerator.abstract_accelerator": "accelerator",
    # Ours, where they were before: what people type after `python -m`, or import.
    "bench": "tools.bench",
    "drop_in": "compat.drop_in",
    "io": "tools.io_tune",
    "ssh": "launcher.ssh",
    "zero.estimate": "tools.memory_plan.estimate",
    "utils.groups": "compat.groups",
    "utils.zero_to_fp32": "compat.zero_to_fp32",
}

# Names of ours, by the module that they were in before.
MOVED: Mapping[str, Names] = {
    "engine": at("compat.engine", "DeepSpeedEngine"),
    "optim.lr_schedules": at("compat.tuning_arguments", "add_tuning_arguments get_config_from_args"),
    "factory": at("compat.initialize", "initialize add_config_arguments"),
}


def canonical(path: str) -> str:
    """The path under which a module is looked up."""
    for theirs in sorted(SAME_MODULE, key=len, reverse=True):
        if path == theirs or path.startswith(theirs + "."):
            return SAME_MODULE[theirs] + path[len(theirs) :]
    return path


@cache
def modules() -> Mapping[str, Names]:
    """Every module that the table lists, by canonical path."""
    found: dict[str, Names] = {}
    for path, names in (*MODULES.items(), *MOVED.items()):
        found.setdefault(canonical(path), {}).update(names)
        while "." in path:  # every module's parents are modules too
            path = path.rpartition(".")[0]
            found.setdefault(canonical(path), {})
    return found


def why_absent(path: str) -> str:
    """Why there is no module, or name, of this canonical path, and what to use; "" where the table says nothing."""
    parent, _, name = path.rpartition(".")
    entry = modules().get(parent, {}).get(name)
    if entry is not None:
        return "" if entry.home else entry.note
    prefix = path
    while prefix:
        if prefix in ABSENT_MODULES:
            return ABSENT_MODULES[prefix]
        if prefix in modules():
            return ""
        prefix = prefix.rpartition(".")[0]
    return ""
