"""A plug-in of `config.load`: older spellings that DeepSpeed still takes, as data: where a key was, where it is now.

`modernise` rewrites a configuration in place and returns where each rewritten key came from, so that messages name
the key as the user wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deepspeedlite.config.faults import MISSING, Fault, KeyPath, Origin, dotted


class Renamed(NamedTuple):
    """`old` is read as `new` in the same object, its value passed through `convert` (MISSING: drop the key)."""

    parent: KeyPath
    old: str
    new: str
    convert: Callable[[Any], Any] | None = None
    doc: str = ""


def _to_cpu(value: Any) -> Any:
    """`true` meant "to the CPU", `false` meant nothing; other types are left for the type check to name."""
    if isinstance(value, int) and value in (0, 1):
        return {"device": "cpu"} if value else MISSING
    return value


ZERO = ("zero_optimization",)
_STAGE3_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

RENAMED: tuple[Renamed, ...] = (
    Renamed((), "bfloat16", "bf16"),
    Renamed(ZERO, "cpu_offload", "offload_optimizer", _to_cpu, 'true is {"device": "cpu"}'),
    Renamed(ZERO, "cpu_offload_param", "offload_param", _to_cpu, 'true is {"device": "cpu"}'),
    Renamed(ZERO, "cpu_offload_params", "offload_param", _to_cpu, 'true is {"device": "cpu"}'),
    Renamed(ZERO, "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    *(Renamed(ZERO, name, f"stage3_{name}") for name in _STAGE3_NAMES),
    Renamed(("aio",), "thread_count", "intra_op_parallelism"),
    Renamed(("tensor_parallel",), "tensor_parallel", "tp"),
    Renamed(("tensor_parallel",), "replace_with_kernel_inject", "kernel_inject"),
)

LEGACY_ZERO_DOC = (
    '`"zero_optimization": true` is `{"stage": 1}` and `false` is `{}`; beside it, a top-level `allgather_size` is '
    "`allgather_bucket_size`"
)


def older_names(parent: KeyPath) -> set[str]:
    """The older spellings of an object's keys."""
    return {rename.old for rename in RENAMED if rename.parent == parent}


def modernise(tree: dict[str, Any], faults: list[Fault]) -> dict[KeyPath, Origin]:
    """Rewrite older spellings in `tree`. Returns {path now: as written}; a key given both ways is a fault."""
    moved: dict[KeyPath, Origin] = {}
    if isinstance(tree.get("zero_optimization"), bool):
        on = tree["zero_optimization"]
        tree["zero_optimization"] = {"stage": 1} if on else {}
        moved[("zero_optimization", "stage")] = Origin(ZERO, on)
        if "allgather_size" in tree:
            size = tree.pop("allgather_size")
            if on:
                tree["zero_optimization"]["allgather_bucket_size"] = size
                moved[("zero_optimization", "allgather_bucket_size")] = Origin(("allgather_size",))
    for rename in RENAMED:
        parent: Any = tree
        for name in rename.parent:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and rename.old in parent:
            _rename(parent, rename, faults, moved)
    return moved


def _rename(parent: dict[str, Any], rename: Renamed, faults: list[Fault], moved: dict[KeyPath, Origin]) -> None:
    was, now = (*rename.parent, rename.old), (*rename.parent, rename.new)
    value = parent.pop(rename.old)
    if rename.new in parent:
        problem = f"is the older spelling of {dotted(now)}, which is given too"
        faults.append(Fault(was, value, problem, f"keep only {rename.new}"))
        return
    converted = rename.convert(value) if rename.convert else value
    if converted is not MISSING:
        parent[rename.new] = converted
        moved[now] = Origin(was, MISSING if converted is value else value)
