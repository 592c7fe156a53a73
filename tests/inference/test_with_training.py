"""Inference engines of models that are trained: before, while and after `initialize` has an engine for them."""

from __future__ import annotations

import torch
from harness import distributed

import deepspeedlite


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def batch() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def trained(model: torch.nn.Module, stage: int, world_size: int) -> deepspeedlite.DeepSpeedEngine:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": zero,
    }
    return deepspeedlite.initialize(model=model, config=config)[0]


def step(engine: deepspeedlite.DeepSpeedEngine) -> None:
    engine.backward(engine(batch()).square().mean())
    engine.step()


@distributed(world_size=2)
def test_training_afterwards():
    model = net()
    before = deepspeedlite.init_inference(model, dtype="fp32")(batch())
    model.train()
    engine = trained(model, 1, 2)
    step(engine)
    after = deepspeedlite.init_inference(engine, dtype="fp32")(batch())
    assert not torch.equal(before, after) and engine.module.training
    engine.destroy()


def _of_engine(stage: int, world_size: int) -> None:
    """In the trained dtype the weights are shared, and follow the training; in another one they are of their time."""
    engine = trained(net(), stage, world_size)
    step(engine)
    with torch.no_grad():
        now = engine.module(batch())
    shared = deepspeedlite.init_inference(engine.module, dtype="fp32")
    halved = deepspeedlite.init_inference(engine.module, dtype="bf16")
    assert shared.module is engine.module and halved.module is not engine.module
    torch.testing.assert_close(shared(batch()), now, rtol=0, atol=0)
    torch.testing.assert_close(halved(batch().bfloat16()).float(), now, rtol=2e-2, atol=2e-2)
    assert [tuple(param.shape) for param in halved.module.parameters()] == [(16, 8), (16,), (4, 16), (4,)]
    old = halved(batch().bfloat16())
    step(engine)
    assert not torch.equal(shared(batch()), now) and torch.equal(halved(batch().bfloat16()), old)
    step(engine)
    engine.destroy()


@distributed(world_size=2)
def test_engine_of_a_trained_engine_stage_0():
    _of_engine(0, 2)


@distributed(world_size=2)
def test_engine_of_a_trained_engine_stage_2():
    _of_engine(2, 2)


@distributed(world_size=2)
def test_engine_of_a_trained_engine_stage_3():
    _of_engine(3, 2)
