"""How the table is asked.

A path is a module's name in DeepSpeed without the root: `runtime.engine` for `deepspeed.runtime.engine`. Some of its
modules are whole modules of ours under another name (`SAME_MODULE`); those are looked up under our path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from deepspeedlite.compat.drop_in import release
from deepspeedlite.compat.drop_in.entry import Names, at, no
from deepspeedlite.compat.drop_in.modules import ABSENT_MODULES, INTERNAL, MODULES, ONE_SPARSE_OP

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
    "ops.sparse_attention": no(ONE_SPARSE_OP, "MatMul Softmax"),
    "": at("compat.module_inject", "revert_transformer_layer"),  # where releases of DeepSpeed before this one had it
    "comm": at("metrics.comms_logger", "CommsLogger comms_logger"),
    "comm.logger": at("metrics.comms_logger", "CommsLogger comms_logger OpStats bus_factor"),
    "engine": at("compat.engine", "DeepSpeedEngine"),
    "optim.lr_schedules": at("compat.tuning_arguments", "add_tuning_arguments get_config_from_args")
    | at("schedules", "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR VALID_LR_SCHEDULES")
    | at("optim.schedules", "build_scheduler"),
    "factory": at("compat.initialize", "initialize add_config_arguments"),
}

# Files of ours at paths where DeepSpeed has a module: they answer for its names too. (What MODULES lists need not be.)
BOTH_HAVE = (
    "compat",
    "inference",
    "inference.config",
    "inference.engine",
    "tools.io_tune",
    "ops.aio",
    "ops.sparse_attention",
    "ops.op_builder.builder",
)


def canonical(path: str) -> str:
    """The path under which a module is looked up."""
    for theirs in sorted(SAME_MODULE, key=len, reverse=True):
        if path == theirs or path.startswith(theirs + "."):
            return SAME_MODULE[theirs] + path[len(theirs) :]
    return path


@cache
def modules() -> Mapping[str, Names]:
    """Every module that the table lists, by canonical path."""
    found: dict[str, Names] = {path: {} for path in BOTH_HAVE}
    for path, names in (*MODULES.items(), *MOVED.items()):
        found.setdefault(canonical(path), {}).update(names)
        while "." in path:  # every module's parents are modules too
            path = path.rpartition(".")[0]
            found.setdefault(canonical(path), {})
    return found


@cache
def theirs(path: str) -> tuple[str, ...]:
    """DeepSpeed's modules that a canonical path stands for: none for one that is ours alone, more than one for some."""
    found = [path]
    for other, ours in SAME_MODULE.items():
        if path == ours or path.startswith(ours + "."):
            found.append(other + path[len(ours) :])
    return tuple(one for one in found if release.module(one) is not None and canonical(one) == path)


def is_module(path: str) -> bool:
    """Whether there is a module of this canonical path in the table, or in DeepSpeed."""
    return path in modules() or bool(theirs(path)) or is_gone(path)


def is_gone(path: str) -> bool:
    """Whether a module is one that only releases before this one had: what names it has is not known here."""
    return any((path + ".").startswith(one + ".") for one in _absent_modules() if not theirs(one))


def why_absent(path: str, name: str) -> str:
    """Why `name` of the module of this canonical path is not here, and what to use."""
    entry = modules().get(path, {}).get(name)
    if entry is not None:
        return entry.note
    inside = f"{path}.{name}".lstrip(".")
    while inside:
        if inside in _absent_modules():
            return _absent_modules()[inside]
        inside = inside.rpartition(".")[0]
    return INTERNAL


@cache
def _absent_modules() -> Mapping[str, str]:
    return {canonical(path): why for path, why in ABSENT_MODULES.items()}


def names_of(path: str) -> set[str]:
    """The names that a module of this canonical path answers for, absent ones too."""
    names = set(modules().get(path, ()))
    return names.union(*(release.names_of(one) for one in theirs(path)))
