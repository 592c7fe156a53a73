"""Compile every row of the table of ops, for the GPUs that are here, and load it."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from deepspeedlite.ops.op_builder import OPS, OpSpec, built, compiled, load_ops, why_not
from tools.gpu_check.setting import NotHereError, Rows, Setting

TINY = ("utils",)
CORES_OF_ONE = 4  # a library's sources are compiled beside each other, few of them for long


def rows(setting: Setting) -> Rows:
    """One for each library, those with kernels first; some are compiled beside each other."""
    specs = [spec for spec in OPS.values() if not setting.tiny or spec.name in TINY]
    specs.sort(key=lambda spec: not spec.gpu)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // CORES_OF_ONE)) as pool:
        begun = {spec.name: pool.submit(compile_s, spec) for spec in specs if why_not(spec) is None}
        for spec in specs:
            yield setting.tried(spec.name, lambda spec=spec: loaded(spec, begun.get(spec.name), setting))  # type: ignore[misc]


def compile_s(spec: OpSpec) -> float:
    """Seconds; 0 where it was compiled before."""
    if compiled(spec) is not None:
        return 0.0
    begun_s = time.monotonic()
    built(spec)
    return time.monotonic() - begun_s


def loaded(spec: OpSpec, begun: Future[float] | None, setting: Setting) -> dict[str, Any]:
    """Wait for the compiler and load it; a GPU's kernels must be in it."""
    if begun is None:
        error = why_not(spec)
        if error is not None and setting.device.is_accelerator:
            raise error
        raise NotHereError(str(error))
    seconds = begun.result()
    load_ops(spec)
    library = built(spec)
    if spec.gpu and setting.device.type == "cuda":
        key = f"deepspeedlite::{spec.ops[0]}"
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(key, "CUDA"), f"{key} has no kernel for GPUs"
    return {"compile_s": seconds, "MB": library.stat().st_size / 1e6}
