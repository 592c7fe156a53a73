"""The largest model by `zero.estimate --fit`, beside the largest that trains, in a part of the device's memory.

A part, since filling all of a large GPU takes minutes; the estimate is asked about the same part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from deepspeedlite.tools.memory_plan import fit
from deepspeedlite.tools.memory_plan.machine import SPARE, Machine
from deepspeedlite.tools.memory_plan.states import PINNED_FACTOR
from tools.gpu_check import gpt
from tools.gpu_check.setting import Rows, Setting
from tools.gpu_check.training import engine_of

PART_BYTES, TINY_PART_BYTES = 8 << 30, 6 << 20  # of all ranks together
LAYERS, CONTEXT, VOCABULARY, HEAD = 8, 1024, 512, 64
SHARES = (1.1, 1.0, 0.9, 0.8, 0.65, 0.5)  # of the estimate, tried until one trains
CLOSE = 0.8  # what of the estimate must train
STAGES = (3, 2)


def rows(setting: Setting) -> Rows:
    """One for each stage."""
    setting.start_group()
    for stage in STAGES:
        yield setting.tried(f"stage {stage}", lambda stage=stage: compared(stage, setting))  # type: ignore[misc]


def compared(stage: int, setting: Setting) -> dict[str, Any]:
    """Estimate, then train. Raises AssertionError where much less trains than was said."""
    part_bytes = TINY_PART_BYTES if setting.tiny else min(PART_BYTES // setting.ranks, setting.device.free_bytes())
    estimated = estimate(stage, part_bytes, setting)
    with limited(part_bytes, setting):
        share = largest_share(lambda share: trains(int(share * estimated), stage, setting), setting)
    figures = {"estimated_Mparams": estimated / 1e6, "trained_Mparams": share * estimated / 1e6, "share": share}
    assert share >= CLOSE, f"of the estimated {estimated:,} parameters {share:.0%} train"
    return {**figures, "part_GiB": part_bytes / 2**30, "ranks": setting.ranks}


def estimate(stage: int, part_bytes: int, setting: Setting) -> int:
    """Parameters that `--fit` thinks to have room for. Its rates, which say how long a step takes, play no part."""
    tokens = 16 if setting.tiny else CONTEXT
    usable, fast = int(part_bytes * (1 - SPARE)), 1e12
    machine = Machine("a part", setting.ranks, usable, 1 << 50, 0, fast, fast, fast, fast, 0.0, 0.0, "")
    training = fit.Training(setting.ranks, 1, "bf16", PINNED_FACTOR, LAYERS, tokens, fast)
    fits = fit.fit_all(training, machine)
    return next(one.params for one in fits if (one.states.stage, one.states.offload) == (stage, "none"))


@contextmanager
def limited(part_bytes: int, setting: Setting) -> Iterator[None]:
    """Let torch's allocator have no more than this, where it can be told so."""
    module: Any = setting.device.module if setting.device.is_accelerator else None
    if module is None or not hasattr(module, "set_per_process_memory_fraction"):
        yield
        return
    total = module.mem_get_info(setting.device.torch_device)[1]
    module.set_per_process_memory_fraction(part_bytes / total, setting.device.torch_device)
    try:
        yield
    finally:
        module.set_per_process_memory_fraction(1.0, setting.device.torch_device)


def largest_share(trains_at: Callable[[float], None], setting: Setting) -> float:
    """The first of SHARES at which it does not run out of memory; 0 for none."""
    for share in SHARES:
        try:
            trains_at(share)
            return share
        except torch.OutOfMemoryError:
            pass  # and its traceback, which holds the model, is gone with the clause
        setting.clear()
    return 0.0


def trains(params: int, stage: int, setting: Setting) -> None:
    """Two steps of a GPT of about so many parameters, blocks recomputed. Raises torch.OutOfMemoryError."""
    import deepspeedlite

    head = 4 if setting.tiny else HEAD
    width = max(head, round(math.sqrt(params / (12 * LAYERS)) / head) * head)
    context = 16 if setting.tiny else CONTEXT
    config = gpt.GPTConfig(VOCABULARY, context, width, LAYERS, width // head)
    zero = gpt.engine_config({"stage": stage, "stage3_param_persistence_threshold": 0}, 1)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        building = deepspeedlite.zero.Init(config_dict_or_path=zero) if stage == 3 else nullcontext()
        with building, setting.device.torch_device:
            model = gpt.fresh(config)
    finally:
        torch.set_default_dtype(usual)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    engine = engine_of(model, {"stage": stage, "stage3_param_persistence_threshold": 0}, 1)
    try:
        tokens, targets = gpt.batch(config, 1, setting)
        for _ in range(2):
            engine.backward(engine(tokens, targets))
            engine.step()
    finally:
        engine.destroy()
