"""State dicts of models that an engine trains, and copies of them: whole, equal, and in memory of their own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import nn

import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError
from deepspeedlite.zero import GatheredParameters

WIDTH = 8


class Renamed(nn.Linear):
    """Saves a view of its weight under another name, and can be told to fail."""

    fails = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fails:
            raise KeyError("on request")
        destination[prefix + "transposed"] = destination.pop(prefix + "weight").t()

    def _load_from_state_dict(self, state, prefix, *args):
        state[prefix + "weight"] = state.pop(prefix + "transposed").t()
        super()._load_from_state_dict(state, prefix, *args)


class Everything(nn.Module):
    """Leaves, blocks in blocks, tied and frozen parameters, a buffer, a module that saves in its own way."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.LayerNorm(WIDTH)))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
        self.lora = nn.Linear(WIDTH, 2, bias=False)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.renamed = Renamed(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first[0].weight
        self.register_buffer("count", torch.ones(3))

    def forward(self, x):
        x = self.layer(self.first(x))
        return self.tied(self.renamed(x + self.frozen(x))).square().mean() + self.lora(x).square().mean()


def engine_of(model, stage, **more):
    return deepspeedlite.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **more,
        },
    )[0]


def step(engine):
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=engine.module.lora.weight.dtype)
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return loss.item()


def saved_nbytes(obj) -> int:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.tell()


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.shape == expected[name].shape and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_every_entry_is_whole_and_in_memory_of_its_own(stage):
    engine, plain = engine_of(Everything(), stage), Everything()
    state = engine.module.state_dict()
    assert_equal(state, plain.state_dict())
    assert_equal(engine.state_dict(), {f"module.{name}": value for name, value in plain.state_dict().items()})
    for name, part in engine.module.named_modules():  # those inside leaves too, each by itself
        other = plain.get_submodule(name)
        assert_equal(part.state_dict(prefix="its."), other.state_dict(prefix="its."))
        asked = part.state_dict(keep_vars=True)
        assert_equal(asked, other.state_dict(keep_vars=True))
        for entry, value in other.state_dict(keep_vars=True).items():
            assert asked[entry].requires_grad == value.requires_grad, (name, entry)
    storages = {value.untyped_storage().data_ptr(): value for value in state.values()}
    assert len(storages) == len(state) - 1  # the tied ones
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    assert saved_nbytes({"lora.weight": state["lora.weight"]}) < 3000 < saved_nbytes(state)
    safetensors = pytest.importorskip("safetensors.torch")
    untied = {name: value.contiguous() for name, value in state.items() if not name.startswith("tied.weight")}
    loaded = safetensors.load(safetensors.save(untied))
    assert_equal(dict(sorted(loaded.items())), dict(sorted(untied.items())))
    before = {name: value.clone() for name, value in state.items()}
    first = step(engine)
    if stage == 3:
        assert_equal(state, before)  # it is nobody else's
    engine.module.load_state_dict(before)
    assert step(engine) == first


@pytest.mark.parametrize("stage", [2, 3])
@distributed(world_size=2)
def test_what_a_submodule_loads_is_trained_on(stage):
    """Also where the optimizer keeps masters of what was loaded, and the module lies inside a leaf."""
    engine, other = engine_of(Everything(), stage, bf16={"enabled": True}), Everything(seed=3).bfloat16()
    for name in ("layer.self_attn.out_proj", "first", "layer.linear1"):
        engine.module.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    step(engine)  # writes the masters into the model
    state = engine.module.state_dict()
    for name in ("layer.self_attn.out_proj.weight", "first.0.weight", "tied.weight", "layer.linear1.bias"):
        assert torch.equal(state[name], other.state_dict()[name.replace("tied", "first.0")]), name


@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=2)
def test_a_state_dict_that_fails_leaves_nothing_behind(stage):
    engine, twin = engine_of(Everything(), stage), engine_of(Everything(), stage)
    for each in (engine, twin):
        step(each)
    engine.module.renamed.fails = True
    for _ in range(2):
        with pytest.raises(KeyError, match="on request"):
            engine.module.state_dict()
    engine.module.renamed.fails = False
    assert_equal(engine.module.renamed.state_dict(), twin.module.renamed.state_dict())
    for _ in range(2):  # on today's values, not on those that the failed call had gathered
        assert step(engine) == step(twin)
    assert_equal(engine.module.state_dict(), twin.module.state_dict())
    assert stage < 3 or not any(param.numel() for param in engine.module.parameters())


def assert_plain_and_independent(twin, engine, gather):
    with gather():
        assert_equal(twin.state_dict(), engine.module.state_dict())
        assert all(a is not b for a, b in zip(twin.parameters(), engine.module.parameters()))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in engine.module.parameters()]
    assert twin.tied.weight is twin.first[0].weight
    for module in twin.modules():
        ours = [name for name, value in vars(module).items() if "_hooks" in name and value]
        assert not ours and "__getstate__" not in vars(module) and type(module._parameters) is dict, ours
    assert not any(vars(param) for param in twin.parameters())
    before = copy.deepcopy(twin.state_dict())
    step(engine)
    assert_equal(twin.state_dict(), before)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(torch.ones(2, 3, WIDTH)).backward()
    optimizer.step()
    assert not torch.equal(twin.lora.weight, before["lora.weight"])


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_copies_are_plain(stage):
    engine = engine_of(Everything(), stage)
    kept = []
    handle = engine.module.lora.register_forward_hook(lambda *_: kept.append(1))
    step(engine)

    def gather():
        return GatheredParameters(list(engine.module.parameters()))

    with gather():
        average = torch.optim.swa_utils.AveragedModel(engine.module)
        assert average.module.lora._forward_hooks, "a hook of the user's is copied"
        handle.remove()
        twin = copy.deepcopy(engine.module)
        part = copy.deepcopy(engine.module.layer.self_attn)
        file = io.BytesIO()
        torch.save(engine.module, file)
        average.update_parameters(engine.module)
    assert_equal(part.state_dict(), twin.layer.self_attn.state_dict())
    assert_plain_and_independent(twin, engine, gather)
    assert_plain_and_independent(copy.deepcopy(engine.module) if stage < 3 else _again(engine, gather), engine, gather)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_equal(loaded.state_dict(), average.module.state_dict())
    assert type(loaded.lora._parameters) is dict and not loaded.lora._forward_hooks


def _again(engine, gather):
    with gather():
        return pickle.loads(pickle.dumps(engine.module))


@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=2)
def test_what_cannot_be_copied_says_so_and_nothing_breaks(stage):
    engine = engine_of(Everything(), stage)
    step(engine)
    with pytest.raises(EngineStateError, match=r"engine\.module"):
        copy.deepcopy(engine)
    with pytest.raises(EngineStateError, match="save_checkpoint"):
        pickle.dumps(engine)
    with pytest.raises(OptimizerError, match="state_dict"):
        copy.deepcopy(engine.optimizer)
    if stage == 3:
        for copying in (copy.deepcopy, torch.optim.swa_utils.AveragedModel, pickle.dumps):
            with pytest.raises(EngineStateError, match=r"parameter first\.0\.weight cannot .*GatheredParameters"):
                copying(engine.module)
        with pytest.raises(EngineStateError, match=r"layer\.self_attn\.in_proj_weight"):
            copy.deepcopy(engine.module.layer.self_attn)
    dist.barrier()
    step(engine)
    step(engine_of(Everything(), stage))
    copy.deepcopy(engine.lr_scheduler)


@distributed(world_size=1)
def test_a_parametrized_module_copies_as_it_did():
    """Attribute by attribute: torch copies such modules so."""
    model = Everything()
    nn.utils.parametrizations.weight_norm(model.lora)
    engine = engine_of(model, 2)
    step(engine)
    twin = copy.deepcopy(engine.module)
    assert_equal(twin.state_dict(), engine.module.state_dict())
    assert torch.equal(copy.deepcopy(twin).lora.weight, engine.module.lora.weight)
    before = twin.lora.weight.detach().clone()
    step(engine)
    assert torch.equal(twin.lora.weight, before)
    twin(torch.ones(2, 3, WIDTH)).backward()
