"""What may change around a sharded training: parameters added or thawed, masters in bf16, compiled modules."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import WIDTH, tied_model, tokens
from torch._dynamo.utils import counters

import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError
from deepspeedlite.zero import GatheredParameters

HYPER = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.1}


def config(stage: int, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": dict(HYPER)},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 3000,
        },
        **more,
    }


def train_beside(engine, plain, optimizer, step: int) -> None:
    engine.backward(engine(*tokens(step, 0, dist.get_rank())))
    engine.step()
    optimizer.zero_grad()
    world_size = dist.get_world_size()
    (sum(plain(*tokens(step, 0, rank)) for rank in range(world_size)) / world_size).backward()
    optimizer.step()


def assert_same(model, plain) -> None:
    with GatheredParameters(list(model.parameters())):
        for name, param in model.named_parameters():
            assert torch.allclose(param, plain.get_parameter(name), atol=2e-6), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_gradual_unfreezing(stage):
    """A frozen layer is thawed after two steps, with a learning rate of its own; a new tensor joins with it."""
    models = tied_model(), tied_model()
    for model in models:
        model.up[1].requires_grad_(False)
    model, plain = models
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], **HYPER)
    for step in range(2):
        train_beside(engine, plain, optimizer, step)
    for part, add in ((plain, optimizer.add_param_group), (model, engine.optimizer.add_param_group)):
        part.up[1].requires_grad_(True)
        add({"params": list(part.up[1].parameters()), "lr": 1e-2})
    assert len(engine.optimizer.param_groups) == 2 and engine.get_lr() == [2e-3, 1e-2]
    for step in range(2, 5):
        train_beside(engine, plain, optimizer, step)
    assert_same(model, plain)
    with pytest.raises(OptimizerError, match=r"up.1.weight is trained already"):
        engine.optimizer.add_param_group({"params": model.up[1].weight})
    engine.backward(engine(*tokens(9, 0, dist.get_rank())))
    with pytest.raises(EngineStateError, match="middle of a batch"):
        engine.optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(3))})


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_thawing_without_the_optimizer_is_an_error(stage):
    model = tied_model()
    model.norm.bias.requires_grad_(False)
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage))
    model.norm.bias.requires_grad_(True)
    engine.backward(engine(*tokens(0, 0, dist.get_rank())))
    with pytest.raises(EngineStateError, match=r"norm.bias did not require grad .*add_param_group"):
        engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=[1, 2])
def test_bf16_masters_and_states(stage, world_size):
    """No fp32 copy of anything; alone, and unfused, the result is torch's on bf16 parameters to the bit."""
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    settings = config(stage, bf16=bf16)
    settings["optimizer"]["params"] |= {"fused": False, "foreach": False}
    model, plain = tied_model(), tied_model().bfloat16()
    engine, wrapped, *_ = deepspeedlite.initialize(model=model, config=settings)
    optimizer = torch.optim.AdamW(plain.parameters(), **HYPER, foreach=False)
    losses = []
    for _ in range(6):
        loss = engine(*tokens(0, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        optimizer.zero_grad()
        plain(*tokens(0, 0, dist.get_rank())).backward()
        optimizer.step()
    kept = [p for group in wrapped.param_groups for p in group["params"]]
    kept += [v for state in wrapped.state.values() for k, v in state.items() if k != "step"]
    assert kept and all(tensor.dtype == torch.bfloat16 for tensor in kept)
    assert losses[-1] < losses[0] - 0.1
    if world_size == 1:
        with GatheredParameters(list(model.parameters())):
            for name, param in model.named_parameters():
                assert torch.equal(param, plain.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@distributed(world_size=2)
def test_a_compiled_module_trains(stage):
    model, plain = tied_model(), tied_model()
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage))
    engine.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(plain.parameters(), **HYPER)
    for step in range(3):
        train_beside(engine, plain, optimizer, step)
    assert_same(model, plain)


def _in_six_steps(engine) -> tuple[list[float], list[tuple[int, int]], list[bool]]:
    """Losses; graphs and graph breaks so far, after each step; what was unsharded ahead of its use."""
    prefetcher, ahead = engine._prefetcher, []
    unshard_ahead = prefetcher._unshard_ahead
    prefetcher._unshard_ahead = lambda coming: ahead.append(coming.uses == 0) or unshard_ahead(coming)
    losses, compiled = [], []
    for step in range(6):
        loss = engine(*tokens(step, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        compiled.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return losses, compiled, ahead


class _ReadsAnothersWeight(torch.nn.Module):
    """Token embedding and a linear layer; the embedding's weight is read for the logits."""

    def __init__(self) -> None:
        super().__init__()
        whole = tied_model()
        self.embedding, self.up = whole.embedding, torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH)])

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up[0](self.embedding(tokens)))
        logits = torch.nn.functional.linear(x, self.embedding.weight)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("make", [tied_model, _ReadsAnothersWeight], ids=["tied", "read"])
@pytest.mark.parametrize("how", ["by the engine", "before", "its blocks before"])
@distributed(world_size=2)
def test_a_compiled_module_trains_at_stage_3(how, make):
    """As the module itself does, with its look-ahead, and with nothing compiled anew after the second step."""
    torch._dynamo.reset()
    model = make()
    twin = copy.deepcopy(model)
    plain, *_ = deepspeedlite.initialize(model=twin, config=config(3))
    if how == "before":
        model = torch.compile(model, backend="aot_eager")
    if how == "its blocks before":
        for block in model.up:
            block.compile(backend="aot_eager")
    engine, *_ = deepspeedlite.initialize(model=model, config=config(3))
    if how == "by the engine":
        engine.compile(backend="aot_eager")
    expected, _, ahead = _in_six_steps(plain)
    counters.clear()
    losses, compiled, ahead_compiled = _in_six_steps(engine)
    assert losses == pytest.approx(expected, abs=1e-5)
    (graphs, breaks), modules = compiled[1], sum(1 for _ in engine.module.modules())
    assert 0 < graphs <= 2 * modules
    assert breaks <= modules
    if how == "its blocks before":  # leaves, each of which stays one graph
        assert breaks == 0
    assert compiled[-1] == compiled[1]
    assert ahead_compiled == ahead
    assert any(ahead)


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_an_unused_parameter_can_be_an_error(stage):
    model = tied_model()
    model.spare = torch.nn.Linear(3, 3)
    settings = config(stage)
    settings["zero_optimization"]["ignore_unused_parameters"] = False
    engine, *_ = deepspeedlite.initialize(model=model, config=settings)
    engine.backward(engine(*tokens(0, 0, dist.get_rank())))
    with pytest.raises(EngineStateError, match=r"no gradient reached spare.bias, spare.weight"):
        engine.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=3)
def test_an_all_reduce_in_place_of_the_reduce_scatter(stage):
    model, plain = tied_model(), tied_model()
    settings = config(stage)
    settings["zero_optimization"]["reduce_scatter"] = False
    engine, *_ = deepspeedlite.initialize(model=model, config=settings)
    optimizer = torch.optim.AdamW(plain.parameters(), **HYPER)
    for step in range(3):
        train_beside(engine, plain, optimizer, step)
    assert_same(model, plain)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dropped", "destroyed"])
@pytest.mark.parametrize("stage", [0, 1, 3])
@distributed(world_size=2)
def test_an_engine_that_is_over_frees_its_memory(stage, how):
    model = tied_model()
    engine = deepspeedlite.initialize(model=model, config=config(stage))[0]
    for step in range(2):
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()
    kept = [weakref.ref(model), *(weakref.ref(unit) for unit in engine._reducer.units)]
    if how == "destroyed":
        engine.destroy()
    del engine, model
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)
