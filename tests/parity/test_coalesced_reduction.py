"""`engine.coalesce_grad_reduction()`: several backward passes whose gradients are averaged once, beside plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import nn

import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.utils import safe_get_full_grad
from deepspeedlite.zero.grad_buffer import GradBuffer

LOSSES = 3


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(number: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + rank))


def made(stage: int, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }
    return deepspeedlite.initialize(model=net(), config=settings)[0]


@pytest.mark.parametrize("clipping", [0.0, 0.01])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_passes_add_up_and_are_averaged_once(stage: int, clipping: float) -> None:
    engine, plain, rank = made(stage, gradient_clipping=clipping), net(), dist.get_rank()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    reduced = []
    reduce = GradBuffer.reduce
    GradBuffer.reduce = lambda self, *args, **kwargs: (reduced.append(self), reduce(self, *args, **kwargs))[1]
    try:
        for step in range(3):
            reduced.clear()
            with engine.coalesce_grad_reduction():
                for number in range(LOSSES):
                    engine.backward(engine(batch(LOSSES * step + number, rank)).square().mean())
                assert not reduced
            assert len(reduced) == len(set(reduced)) == len(engine._reducer.units)
            for number in range(LOSSES):
                for other in range(2):
                    (plain(batch(LOSSES * step + number, other)).square().mean() / 2).backward()
            for param, theirs in zip(engine.module.parameters(), plain.parameters()):
                torch.testing.assert_close(safe_get_full_grad(param), theirs.grad, atol=1e-6, rtol=1e-5)
            if clipping:
                nn.utils.clip_grad_norm_(plain.parameters(), clipping)
            engine.step()
            assert len(reduced) == len(engine._reducer.units), "the step reduces nothing again"
            optimizer.step()
            optimizer.zero_grad()
    finally:
        GradBuffer.reduce = reduce
    for name, value in engine.module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
@distributed(world_size=2)
def test_ranks_may_run_different_numbers_of_passes(stage: int) -> None:
    """At stage 3 they cannot: gathering values is collective."""
    engine, plain, rank = made(stage), net(), dist.get_rank()
    with engine.coalesce_grad_reduction():
        for number in range(2 * rank):
            engine.backward(engine(batch(number, rank)).square().mean())
    for number in range(2):
        (plain(batch(number, 1)).square().mean() / 2).backward()
    for param, theirs in zip(engine.module.parameters(), plain.parameters()):
        torch.testing.assert_close(safe_get_full_grad(param), theirs.grad, atol=1e-6, rtol=1e-5)


@distributed(world_size=1)
def test_what_is_not_allowed_in_it() -> None:
    engine = made(1)
    with engine.coalesce_grad_reduction():
        engine.backward(engine(batch(0, 0)).square().mean())
        with pytest.raises(EngineStateError, match="inside"):
            engine.step()
        with pytest.raises(EngineStateError, match="nested"), engine.coalesce_grad_reduction():
            pass
        with pytest.raises(EngineStateError, match="nested"), engine.no_sync():
            pass
    engine.step()
    with pytest.raises(ZeroDivisionError), engine.coalesce_grad_reduction():
        engine.backward(engine(batch(0, 0)).square().mean())
        raise ZeroDivisionError
    engine.zero_grad()
    engine.backward(engine(batch(0, 0)).square().mean())
    engine.step()
    assert engine.global_steps == 2
