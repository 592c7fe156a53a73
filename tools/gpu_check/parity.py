"""Training on this device, by its own backend, beside the unsharded loop of tests/helpers/unsharded.py on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tools.gpu_check.setting import ROOT, NotHereError, Rows, Setting

CPU = {"device": "cpu"}
PINNED = {"device": "cpu", "pin_memory": True}
ORDER_OF_SUMS = 20.0  # times what the tests allow in fp32 on a CPU: a GPU's products sum in orders of their own
TINY = (("fp32", 0, "none"), ("bf16", 2, "optimizer"), ("fp32", 3, "all"))


class Case(NamedTuple):
    """One way to train."""

    dtype: str
    stage: int
    offload: str

    @property
    def zero(self) -> dict[str, Any]:
        """The section `zero_optimization`."""
        more: dict[str, Any] = {}
        if self.offload != "none":
            more["offload_optimizer"] = PINNED
        if self.offload == "all":
            more["offload_param"] = CPU
        return {
            "stage": self.stage,
            "reduce_bucket_size": 4000,
            "stage3_param_persistence_threshold": 64,
            "stage3_prefetch_bucket_size": 4000,
            "stage3_max_reuse_distance": 0,
            **more,
        }


def cases() -> Iterator[Case]:
    """Those that say most first."""
    for offload in ("none", "optimizer", "all"):
        for stage in (3, 2, 1, 0):
            if (offload == "none" or stage) and (offload != "all" or stage == 3):
                for dtype in ("fp32", "bf16", "fp16"):
                    yield Case(dtype, stage, offload)


def rows(setting: Setting) -> Rows:
    """One for each case."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    setting.start_group()
    for case in cases():
        if not setting.tiny or tuple(case) in TINY:
            what = f"stage {case.stage}, {case.dtype}" + (f", {case.offload} on the host" * (case.offload != "none"))
            yield setting.tried(what, lambda case=case: equal(case, setting))  # type: ignore[misc]


def equal(case: Case, setting: Setting) -> dict[str, Any]:
    """How far losses and final weights are from the reference's. Raises AssertionError for too far, on every rank."""
    import models
    import unsharded

    import deepspeedlite
    from deepspeedlite.utils import safe_get_full_fp32_param

    if case.dtype == "bf16" and setting.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise NotHereError(f"{setting.device.name} has no bf16")
    device = setting.device.torch_device
    config = unsharded.engine_config(case.dtype, 2, True, zero_optimization=case.zero)
    engine, *_ = deepspeedlite.initialize(model=models.tied_model(), config=config)
    losses = []
    for step in range(unsharded.STEPS):
        mine = []
        for micro in range(2):
            loss = engine(*(one.to(device) for one in models.tokens(step, micro, setting.rank)))
            engine.backward(loss)
            engine.step()
            mine.append(loss.detach())
        losses.append(float(sum(mine)) / 2)
    weights = {}
    for name, param in engine.module.named_parameters():
        found = safe_get_full_fp32_param(param)
        assert found is not None, f"{name} has no fp32 value"
        weights[name] = found.cpu()
    engine.destroy()
    wanted, exact = unsharded.reference(case.dtype, 2, True, setting.ranks, str(device))
    # The reference's losses are rank 0's.
    off = max(abs(one - other) for one, other in zip(losses, wanted)) if setting.rank == 0 else 0.0
    worst = max(float((weights[name] - value.cpu()).abs().max()) for name, value in exact.items())
    times = ORDER_OF_SUMS if case.dtype == "fp32" and setting.device.is_accelerator else 1.0
    figures = {"loss_off": off, "weights_off": worst, "loss_moved": abs(wanted[-1] - wanted[0]), "ranks": setting.ranks}
    allowed = times * unsharded.LOSS_ATOL[case.dtype], times * unsharded.WEIGHT_ATOL[case.dtype]
    right = off <= allowed[0] and worst <= allowed[1]  # what is not a number is not
    verdicts = torch.tensor([float(right)], device=device)
    dist.all_reduce(verdicts, op=dist.ReduceOp.MIN)
    assert verdicts.item(), f"off by {figures} on rank {setting.rank}, and allowed are {allowed}"
    assert exact.keys() == weights.keys(), "other parameters than the reference's"
    return figures
