"""Engines that share a module, come again or are used in ways that cannot be right.

What trains is compared with the same number of steps of a torch loop: every rank's batch, averaged.
"""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
import torch.distributed as dist
from harness import distributed

import deepspeedlite
from deepspeedlite.runtime import log
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError, UnsupportedError

LR = 0.1
SGD = {"optimizer": {"type": "SGD", "params": {"lr": LR}}}
STAGES = (0, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))


def settings(stage: int, **more) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0, **more}


def start(model: torch.nn.Module, stage: int, **options):
    return deepspeedlite.initialize(model=model, config=settings(stage, **SGD), **options)[0]


def reader(model: torch.nn.Module, stage: int):
    return deepspeedlite.initialize(model=model, config=settings(stage))[0]


def batch(rank: int | None = None) -> torch.Tensor:
    rank = dist.get_rank() if rank is None else rank
    return torch.tensor([[1.0, -2.0, 0.5, rank + 1.0]])


def train(engine, steps: int = 1) -> None:
    for _ in range(steps):
        engine.backward(engine(batch()).square().sum())
        engine.step()


def value(engine) -> torch.Tensor:
    with torch.no_grad():
        return engine(batch(0)).clone()


def expected(steps: int, optimizer_class=torch.optim.SGD) -> torch.Tensor:
    model, world = network(), dist.get_world_size()
    optimizer = optimizer_class(model.parameters(), lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(batch(rank)).square().sum() / world for rank in range(world)).backward()
        optimizer.step()
    return model(batch(0)).detach()


def hooks(module: torch.nn.Module) -> int:
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in module.parameters())


# --- engines that share a module --------------------------------------------------------------------------------------


@every_stage
@distributed(world_size=[1, 2])
def test_a_reference_engine_lives_on_while_another_trains(stage):
    module = network()
    reference = reader(module, stage)
    assert hooks(module) == 0, "an engine that does not train waits for no gradients"
    before = value(reference)
    trained = start(module, stage)
    train(trained, 2)
    torch.testing.assert_close(value(trained), expected(2))
    torch.testing.assert_close(value(reference), value(trained))
    assert not torch.equal(before, value(reference))
    with pytest.raises(EngineStateError, match=r"backward\(\): needs an optimizer"):
        reference.backward(reference(batch()).sum())


@pytest.mark.slow_unless(stage=3)
@every_stage
@distributed(world_size=2)
def test_a_reference_engine_may_come_second(stage, tmp_path):
    module = network()
    trained = start(module, stage)
    train(trained)
    reference = reader(module, stage)
    train(trained)
    torch.testing.assert_close(value(reference), expected(2))
    with pytest.raises(EngineStateError, match="another engine trains its parameters"):
        reference.save_checkpoint(str(tmp_path))
    reference.destroy()
    train(trained)
    torch.testing.assert_close(value(trained), expected(3))


@distributed(world_size=2)
def test_engines_of_different_parameters_leave_each_other_alone(stage=1):
    module = network()
    engines = [start(module, stage, model_parameters=module[place].parameters()) for place in (0, 2)]
    train(engines[0])
    train(engines[1])
    train(engines[0])
    alone, world = network(), dist.get_world_size()
    optimizers = [torch.optim.SGD(alone[place].parameters(), lr=LR) for place in (0, 2)]
    for turn in (0, 1, 0):  # a step clears what it has trained from: the others' gradients add up, as torch's do
        sum(alone(batch(rank)).square().sum() / world for rank in range(world)).backward()
        optimizers[turn].step()
        optimizers[turn].zero_grad()
    torch.testing.assert_close(value(engines[0]), alone(batch(0)).detach())


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=2)
def test_a_shared_submodule_is_named(stage):
    shared = torch.nn.Linear(4, 4)
    first = start(torch.nn.Sequential(shared, torch.nn.Linear(4, 1)), stage)
    with pytest.raises(EngineStateError, match=r"trains .*0\.weight.* has too, along with .*1\.weight"):
        start(torch.nn.Sequential(shared, torch.nn.Linear(4, 2)), stage)
    train(first)  # which the refusal has left as it was
    del first
    train(start(torch.nn.Sequential(shared, torch.nn.Linear(4, 2)), stage))


# --- engines that come again ------------------------------------------------------------------------------------------


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("way", ["kept", "deleted", "destroyed"])
@every_stage
@distributed(world_size=2)
def test_a_model_is_initialised_again(stage, way):
    module = network()
    first = start(module, stage)
    train(first)
    if way == "destroyed":
        first.destroy()
    if way == "deleted":
        del first
    second = start(module, stage)
    train(second, 2)
    torch.testing.assert_close(value(second), expected(3))
    if way == "kept":
        torch.testing.assert_close(value(first), value(second))
        with pytest.raises(EngineStateError, match=r"a later deepspeedlite\.initialize has taken its parameters over"):
            train(first)
        first.destroy()  # and takes nothing from the second
    train(second)
    torch.testing.assert_close(value(second), expected(4))
    whole = second.module.state_dict()["0.weight"]
    assert whole.shape == (6, 4)


@pytest.mark.slow_unless(before=0)
@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (2, 3), (3, 1)])
@distributed(world_size=2)
def test_a_model_is_initialised_again_at_another_stage(before, after):
    module = network()
    first = start(module, before)
    train(first)
    second = start(module, after)
    train(second, 2)
    torch.testing.assert_close(value(second), expected(3))


@distributed(world_size=2)
def test_a_larger_model_takes_a_smaller_ones_engine_over(stage=3):
    module = network()
    train(start(module[0], stage, model_parameters=module[0].parameters()))
    outer = start(module, stage)
    train(outer)
    assert value(outer).isfinite().all()


@every_stage
@distributed(world_size=1)
def test_nothing_keeps_an_engine_that_the_script_let_go(stage):
    module = network()
    engine = start(module, stage)
    train(engine)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert hooks(module) == 0
    torch.testing.assert_close(module(batch(0)).detach(), expected(1))


@every_stage
@distributed(world_size=2)
def test_a_destroyed_engine_that_is_used_again(stage):
    module = network()
    engine = start(module, stage)
    train(engine)
    engine.destroy()
    if stage == 0:
        train(engine, 2)
        torch.testing.assert_close(value(engine), expected(3))
        return
    with pytest.raises(EngineStateError, match=r"forward\(\) after engine.destroy\(\): initialise the model again"):
        train(engine)
    with deepspeedlite.zero.GatheredParameters(list(module.parameters())):
        torch.testing.assert_close(module(batch(0)).detach(), expected(1))


@distributed(world_size=1)
def test_a_destroyed_engine_whose_module_has_another_by_now():
    module = network()
    first = start(module, 0)
    first.destroy()
    second = start(module, 0)
    with pytest.raises(EngineStateError, match=r"destroy\(\): parameter .* is another engine's by now"):
        train(first)
    train(second)
    torch.testing.assert_close(value(second), expected(1))


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2])
@distributed(world_size=2)
def test_a_step_of_the_optimizer_beside_the_engines(stage):
    engine, optimizer, *_ = deepspeedlite.initialize(
        model=network(), config=settings(stage, optimizer={"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}})
    )
    with pytest.raises(EngineStateError, match="no backward pass has brought gradients"):
        optimizer.step()
    train(engine)
    after_one = value(engine)
    log._said.clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("deepspeedlite").addHandler(handler)
    optimizer.step()
    optimizer.optimizer.step()
    logging.getLogger("deepspeedlite").removeHandler(handler)
    assert torch.equal(value(engine), after_one), "no extra step"
    assert dist.get_rank() > 0 or any("optimizer.step() does nothing" in line for line in said)
    engine.backward(engine(batch()).square().sum())
    optimizer.step()
    after_two = value(engine)
    assert not torch.equal(after_two, after_one), "alone it is a step"
    with pytest.raises(EngineStateError, match=r"optimizer\.step\(\) has taken this step"):
        engine.step()
    assert torch.equal(value(engine), after_two)
    train(engine)


@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=1)
def test_an_optimizer_over_another_models_parameters(stage):
    module, other = network(), network()
    with pytest.raises(OptimizerError, match=r"SGD holds 4 parameters .* none of them is the model's \(0\.weight"):
        start(module, stage, optimizer=torch.optim.SGD(other.parameters(), lr=LR))
    with pytest.raises(OptimizerError, match="none of them is the model's"):
        start(module, stage, model_parameters=other.parameters())
    engine = start(module, stage, optimizer=torch.optim.SGD(module.parameters(), lr=LR))
    with pytest.raises(OptimizerError, match="build a new one for every initialize"):
        start(module, stage, optimizer=engine.optimizer)
    train(engine)
    torch.testing.assert_close(value(engine), expected(1))


@pytest.mark.parametrize("threshold", [0, 10_000])
@distributed(world_size=2)
def test_an_optimizer_that_makes_its_state_at_once_over_sharded_parameters(threshold):
    config = settings(3, **SGD)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    with deepspeedlite.zero.Init(config_dict_or_path=config):
        module = network()
    optimizer = torch.optim.Adagrad(module.parameters(), lr=LR, initial_accumulator_value=0.0)
    engine, *_ = deepspeedlite.initialize(model=module, optimizer=optimizer, config=config)
    train(engine, 3)
    torch.testing.assert_close(value(engine), expected(3, torch.optim.Adagrad))
    assert engine.optimizer.optimizer is optimizer


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_stage
@distributed(world_size=1)
def test_a_conversion_after_initialize_is_told_in_its_own_words(stage, dtype):
    engine = start(network(), stage)
    train(engine)
    engine.module.to("cpu")
    engine.module.float()
    train(engine)  # which changed nothing
    engine.module.to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(EngineStateError, match=rf"parameter \d\.\w+ was converted from float32 to {name} \(\.to\(\)"):
        engine.backward(engine(batch().to(dtype)).square().sum())
        engine.step()


@distributed(world_size=1)
def test_modules_that_no_engine_can_take(stage=0):
    with pytest.raises(UnsupportedError, match=r"the model was compiled by torch\.jit"):
        start(torch.jit.script(network()), stage)
    parts = torch.nn.Sequential(torch.jit.script(network()), torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match=r"0 was compiled by torch\.jit.*use stage 0, 1 or 2"):
        start(parts, 3)
    train(start(parts, 1))
    with pytest.raises(UnsupportedError, match="1 is a LazyLinear whose weight has no shape yet"):
        start(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LazyLinear(1)), stage)
    with pytest.raises(UnsupportedError, match="running_mean has no shape yet"):
        start(torch.nn.Sequential(torch.nn.LazyBatchNorm1d(affine=False), torch.nn.Linear(4, 1)), stage)
