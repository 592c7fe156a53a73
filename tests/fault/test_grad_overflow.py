"""A gradient that is not finite: no step, on any rank, in any precision; and how long finite gradients are."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from harness import distributed

import deepspeedlite
from deepspeedlite.runtime.log import logger
from deepspeedlite.utils import safe_get_full_fp32_param, safe_set_full_grad

ADAMW = {"type": "AdamW", "params": {"lr": 0.1}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 1.0}},
}


class Told(logging.Handler):
    """What the library says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Told:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)


def make(stage: int = 0, offload: bool = False, **config: Any) -> Any:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {"train_micro_batch_size_per_gpu": 2, "optimizer": ADAMW, "zero_optimization": zero}
    return deepspeedlite.initialize(model=model, config={**settings, **config})[0]


def data(engine: Any) -> torch.Tensor:
    rank = engine._parts.group.rank
    dtype = next(iter(engine.module.parameters())).dtype
    return (torch.arange(8.0).view(2, 4) / 8 + rank).to(dtype)


def values(engine: Any) -> list[torch.Tensor]:
    return [safe_get_full_fp32_param(param) for param in engine.module.parameters()]


@pytest.mark.parametrize(
    "stage, precision, clipping, offload, ranks",
    [
        (0, "fp32", 0, False, 2),
        (0, "autocast", 1.0, False, 1),
        (1, "bf16", 0, False, 2),
        (1, "fp32", 1.0, True, 1),
        (2, "fp32", 1.0, False, 2),
        (2, "autocast", 0, True, 2),
        (2, "fp32", 0, False, 1),
        (3, "fp32", 0, False, 2),
        (3, "bf16", 1.0, True, 2),
        (3, "fp16", 0, False, 2),
    ],
)
def test_no_step_is_taken_from_gradients_that_are_not_finite(
    stage: int, precision: str, clipping: float, offload: bool, ranks: int
) -> None:
    on_ranks = {1: skips_on_one_rank, 2: skips_on_two_ranks}[ranks]
    on_ranks(stage=stage, precision=precision, clipping=clipping, offload=offload)


@distributed(world_size=1)
def skips_on_one_rank(stage: int, precision: str, clipping: float, offload: bool) -> None:
    check_skipping(stage, precision, clipping, offload)


@distributed(world_size=2)
def skips_on_two_ranks(stage: int, precision: str, clipping: float, offload: bool) -> None:
    check_skipping(stage, precision, clipping, offload)


def check_skipping(stage: int, precision: str, clipping: float, offload: bool) -> None:
    engine = make(stage, offload, gradient_clipping=clipping, **PRECISIONS[precision])
    rank, last = engine._parts.group.rank, engine._parts.group.size - 1
    before = values(engine)
    with Told() as told:
        for bad in (math.inf, math.nan):  # on one rank alone, and of one parameter alone
            engine.backward(engine(data(engine)).sum() * (bad if rank == last else 1.0))
            engine.step()
            assert not engine.was_step_applied()
    assert engine.skipped_steps == 2 and engine.global_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, values(engine)))
    said = [line for line in told.lines if "not finite" in line]
    assert len(said) == 1 and "2.bias" in said[0] and "skipped" in said[0]
    engine.backward(engine(data(engine)).sum())
    engine.step()
    assert engine.was_step_applied() and engine.skipped_steps == 2
    after = values(engine)
    assert all(value.isfinite().all() and not torch.equal(value, old) for value, old in zip(after, before))


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@distributed(world_size=1)
def test_a_key_takes_such_steps_all_the_same(precision: str) -> None:
    engine = make(check_grad_overflow=False, gradient_clipping=0, **PRECISIONS[precision])
    engine.backward(engine(data(engine)).sum() * math.inf)
    engine.step()
    assert engine.skipped_steps == 0 and not values(engine)[0].isfinite().all()


@distributed(world_size=1)
def test_fp16_looks_for_overflows_whatever_the_key_says() -> None:
    engine = make(check_grad_overflow=False, gradient_clipping=0, fp16={"enabled": True, "initial_scale_power": 4})
    before = values(engine)
    engine.backward(engine(data(engine)).sum() * math.inf)
    engine.step()
    assert engine.skipped_steps == 1 and all(torch.equal(a, b) for a, b in zip(before, values(engine)))


@pytest.mark.parametrize("stage", [0, 2])
@distributed(world_size=2)
def test_large_gradients_are_finite_though_their_squares_are_not(stage: int) -> None:
    engine = make(stage, gradient_clipping=1.0)
    before = values(engine)
    engine.backward(engine(data(engine)).sum() * 1e30)
    engine.step()
    norm = engine.get_global_grad_norm()
    assert engine.skipped_steps == 0 and 1e30 < norm < 1e32
    assert not torch.equal(before[0], values(engine)[0]) and values(engine)[0].isfinite().all()


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"), (0, "bf16")])
@distributed(world_size=2)
def test_norms_are_those_of_an_unsharded_model(stage: int, dtype: str) -> None:
    """Also of gradients that were changed after their reduction, and of a second pass on top of an average."""
    engine = make(stage, gradient_clipping=1e9, **PRECISIONS[dtype])
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    alone = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))

    def expected(passes: int) -> float:
        alone.zero_grad()
        for param, value in zip(alone.parameters(), values(engine)):
            param.data = value.clone()
        for _ in range(passes):
            (sum(alone(torch.arange(8.0).view(2, 4) / 8 + rank).sum() for rank in range(2)) / 2).backward()
        return float(torch.nn.utils.get_total_norm([param.grad for param in alone.parameters()]))

    for passes, change in ((1, 1.0), (2, 1.0), (1, 3.0)):
        norm = expected(passes)
        for _ in range(passes):
            engine.backward(engine(data(engine)).sum())
        if change != 1.0:
            for param, own in zip(engine.module.parameters(), alone.parameters()):
                safe_set_full_grad(param, change * own.grad)
        engine.step()
        assert math.isclose(engine.get_global_grad_norm(), change * norm, rel_tol=tolerance)


@distributed(world_size=2)
def test_ranks_decide_alike_when_one_of_them_spoils_its_gradients() -> None:
    engine = make(0, gradient_clipping=0)
    engine.backward(engine(data(engine)).sum())
    if engine._parts.group.rank == 1:
        engine.module[2].weight.grad.data[0, 0] = math.nan
    with Told() as told:
        engine.step()
    assert engine.skipped_steps == 1 and "2.weight" in " ".join(told.lines)


@distributed(world_size=2)
def test_accumulated_gradients_are_measured_once_a_step() -> None:
    """Where every pass is reduced, those before the last one take no norm."""
    engine = make(2, gradient_accumulation_steps=3)
    for micro in range(3):
        engine.backward(engine(data(engine)).sum())
        assert [unit.grads._norms is not None for unit in engine._reducer.units] == [micro == 2]
        engine.step()
    assert engine.was_step_applied()
