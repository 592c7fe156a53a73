"""What DeepSpeed's `git_version_info` tells: the release whose names are served, and this machine's torch."""

from __future__ import annotations

from typing import Any

import torch

from deepspeedlite.compat.accelerator import get_accelerator
from deepspeedlite.compat.drop_in import STANDS_IN_FOR, VERSION

version, git_hash, git_branch = VERSION, "unknown", "unknown"
__version_major__, __version_minor__, __version_patch__ = (int(part) for part in STANDS_IN_FOR.split("."))
__git_hash__, __git_branch__ = git_hash, git_branch

torch_info: dict[str, Any] = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "cuda_version": ".".join((torch.version.cuda or "0.0").split(".")[:2]),
    "hip_version": ".".join((torch.version.hip or "0.0").split(".")[:2]),
}


def __getattr__(name: str) -> Any:
    if name == "installed_ops":  # op -> whether it was compiled when this package was built
        from deepspeedlite.ops.op_builder import OPS, installed_libraries

        found = " ".join(str(path) for path in installed_libraries())
        return {op: op in found for op in OPS}
    if name == "accelerator_name":
        return get_accelerator().device_name()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
