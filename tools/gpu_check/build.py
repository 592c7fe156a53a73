"""Compile every row of the table of ops, for the GPUs that are here, and load it."""

from __future__ import annotations

import os
from typing import Any

from deepspeedlite.ops.op_builder import OPS, OpSpec, compiled, load_ops, why_not
from tools.gpu_check.setting import NotHereError, Rows, Setting

TINY = ("utils",)


def rows(setting: Setting) -> Rows:
    """One for each library, those with kernels first."""
    if setting.device.type == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "native")
        os.environ.setdefault("PYTORCH_ROCM_ARCH", "native")
    specs = [spec for spec in OPS.values() if not setting.tiny or spec.name in TINY]
    for spec in sorted(specs, key=lambda spec: not spec.gpu):
        yield setting.tried(spec.name, lambda spec=spec: built(spec, setting))  # type: ignore[misc]


def built(spec: OpSpec, setting: Setting) -> dict[str, Any]:
    """Compile and load it; a GPU's kernels must be in it."""
    import torch

    if error := why_not(spec):
        if setting.device.is_accelerator:
            raise error
        raise NotHereError(str(error))
    was_there = compiled(spec) is not None
    load_ops(spec)
    library = compiled(spec)
    assert library is not None, f"{spec.name} was loaded, and is nowhere"
    figures: dict[str, Any] = {"MB": library.stat().st_size / 1e6, "was_compiled_before": was_there}
    if spec.gpu and setting.device.type == "cuda":
        key = f"deepspeedlite::{spec.ops[0]}"
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(key, "CUDA"), f"{key} has no kernel for GPUs"
    return figures
