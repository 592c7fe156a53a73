"""Models built sharded (`zero.Init`) and parameters made whole for a while (`zero.GatheredParameters`)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import TiedTokenModel, tied_model, tokens

import deepspeedlite
from deepspeedlite import zero
from deepspeedlite.runtime.errors import ConfigError, EngineStateError, UnsupportedError
from deepspeedlite.zero import GatheredParameters, Init, ZeroParamStatus

OPTIMIZER = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}


def config(dtype: str = "fp32", **zero_keys) -> dict:
    more = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": dict(OPTIMIZER)},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero_keys},
        **more,
    }


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with GatheredParameters(list(model.parameters())):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


@distributed(world_size=[1, 2, 3])
def test_a_model_built_sharded_trains_as_one_built_whole():
    plain = tied_model()
    torch.manual_seed(dist.get_rank())  # rank 0's values count, whatever the others draw
    if dist.get_rank() == 0:
        torch.manual_seed(0)
    with Init(config_dict_or_path=config()):
        model = TiedTokenModel()
    for param in model.parameters():
        assert param.numel() == 0 and param.ds_status is ZeroParamStatus.NOT_AVAILABLE
        assert param.ds_tensor.numel() == param.partition_numel() >= -(-param.ds_numel // dist.get_world_size())
    assert model.head.weight is model.embedding.weight and tuple(model.head.weight.ds_shape) == (61, 32)
    for name, value in gathered(model).items():
        assert torch.equal(value, plain.get_parameter(name)), name
    engine, *_ = deepspeedlite.initialize(model=model, config=config())
    optimizer = torch.optim.AdamW(plain.parameters(), **OPTIMIZER)
    for step in range(3):
        loss = engine(*tokens(step, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        (sum(plain(*tokens(step, 0, r)) for r in range(dist.get_world_size())) / dist.get_world_size()).backward()
        optimizer.step()
    for name, value in gathered(model).items():
        assert torch.allclose(value, plain.get_parameter(name), atol=2e-6), name


@distributed(world_size=2)
def test_nested_contexts_disabled_ones_and_what_is_left_behind():
    original = torch.nn.Module.__setattr__
    with Init(dtype=torch.bfloat16):
        first = torch.nn.Linear(4, 4)
        with Init(enabled=False):
            second = torch.nn.Linear(4, 4)
        with Init():
            third = torch.nn.Linear(4, 4)
    fourth = torch.nn.Linear(4, 4)
    assert first.weight.dtype == torch.bfloat16 and first.weight.numel() == 0
    assert second.weight.numel() == 0 and third.weight.numel() == 0 and third.weight.dtype == torch.float32
    assert fourth.weight.numel() == 16 and torch.nn.Module.__setattr__ is original
    with pytest.raises(ValueError, match="inside"), Init():
        raise ValueError("inside")
    assert torch.nn.Module.__setattr__ is original
    with Init(config_dict_or_path={**config(), "zero_optimization": {"stage": 2}}):
        fifth = torch.nn.Linear(4, 4)
    assert fifth.weight.numel() == 16
    with pytest.raises(UnsupportedError, match="remote_device"):
        Init(remote_device="tape")
    with pytest.raises(ConfigError, match=r"needs zero_optimization\.offload_param\.nvme_path"):
        Init(remote_device="nvme")


@distributed(world_size=2)
def test_an_existing_module_and_one_on_the_meta_device():
    model = tied_model(seed=dist.get_rank())
    Init(module=model)
    values = gathered(model)
    expected = dict(tied_model(seed=0).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in values.items())
    torch.manual_seed(5)
    with torch.device("meta"), Init():
        meta = TiedTokenModel()
    assert not any(param.is_meta for param in meta.parameters())
    weights = gathered(meta)
    assert weights["up.0.weight"].std() > 0.01 and torch.equal(weights["norm.weight"], torch.ones(32))
    with pytest.raises(UnsupportedError, match="reset_parameters"), torch.device("meta"), Init():
        model = NoReset()
    with torch.device("meta"):
        tied = TiedTokenModel()
    Init(module=tied)
    assert tied.head.weight is tied.embedding.weight, "what had no memory yet stays tied when it gets some"
    assert not any(param.is_meta for param in tied.parameters()) and gathered(tied)["up.0.weight"].std() > 0.01


class NoReset(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))


@distributed(world_size=2)
def test_the_dtype_must_be_the_trained_one():
    with Init():
        model = TiedTokenModel()
    with pytest.raises(UnsupportedError, match=r"embedding.weight was sharded as torch.float32"):
        deepspeedlite.initialize(model=model, config=config("bf16"))


@distributed(world_size=2)
def test_state_dicts_are_whole_and_load():
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config("bf16"))
    plain = tied_model().bfloat16()
    state = engine.module.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
    assert all(param.numel() == 0 for param in engine.module.parameters())
    other = tied_model(seed=3).bfloat16()
    engine.module.load_state_dict(other.state_dict())
    assert all(torch.equal(value, other.get_parameter(name)) for name, value in gathered(engine.module).items())
    masters = torch.cat([run.master for run in engine.optimizer._runs])
    assert torch.equal(masters.bfloat16(), torch.cat([run.values for run in engine.optimizer._runs]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.module.load_state_dict({**other.state_dict(), "norm.weight": torch.ones(3)})
    assert all(param.numel() == 0 for param in engine.module.parameters())


class ReadsAnothers(torch.nn.Module):
    """The parent reads the parameters of children it does not call, one of them through a name put aside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.second = torch.nn.Linear(6, 6)
        self.third = torch.nn.Linear(6, 6)
        self.aside = [self.third.weight]
        zero.register_external_parameter(self, self.third.weight)

    def forward(self, x):
        x = torch.tanh(self.first(x) @ self.second.weight * self.second.bias)
        return (x @ self.aside[0]).square().mean()


@distributed(world_size=2)
def test_parameters_of_other_modules():
    torch.manual_seed(1)
    model = ReadsAnothers()
    plain = copy.deepcopy(model)
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage3_max_reuse_distance=0))
    optimizer = torch.optim.AdamW(plain.parameters(), **OPTIMIZER)
    data = torch.randn(4, 2, 5, 6, generator=torch.Generator().manual_seed(2))
    for step in range(4):
        loss = engine(data[step, dist.get_rank()])
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        ((plain(data[step, 0]) + plain(data[step, 1])) / 2).backward()
        for param in plain.parameters():  # third.bias is unused: flat optimizers see a gradient of zero
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimizer.step()
        assert all(param.numel() == 0 for param in model.parameters())
    for name, value in gathered(model).items():
        assert torch.allclose(value, plain.get_parameter(name), atol=1e-6), name


@distributed(world_size=2)
def test_generation_has_whole_parameters():
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config())
    with zero.unwrap_model_for_generation(engine) as module:
        assert module is engine.module and all(param.numel() > 0 for param in module.parameters())
        with torch.no_grad():
            module(*tokens(0, 0, 0))
        assert all(param.numel() > 0 for param in module.parameters())
    assert all(param.numel() == 0 for param in engine.module.parameters())


@distributed(world_size=2)
def test_what_an_engine_leaves_when_it_is_destroyed():
    """Sharded parameters, one rank at a time: for who gathers them, for a state dict, for the next engine."""
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config())
    expected, module = tied_model(), engine.module
    if dist.get_rank():
        dist.barrier()
    engine.destroy()
    if not dist.get_rank():
        dist.barrier()
    assert all(param.numel() == 0 for param in module.parameters()) and type(module.norm._parameters) is dict
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in module.state_dict().items())
    with GatheredParameters(list(module.parameters())):
        module(*tokens(0, 0, 0)).backward()
        assert all(torch.equal(param, expected.get_parameter(name)) for name, param in module.named_parameters())
        assert all(param.grad is not None for param in module.parameters())
        module.zero_grad()
    again, *_ = deepspeedlite.initialize(model=module, config=config(stage=0))
    assert all(torch.equal(param, expected.get_parameter(name)) for name, param in again.module.named_parameters())
    again.backward(again(*tokens(0, 0, 0)))
    again.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_weights_on_rank_0_and_in_a_file(stage, tmp_path):
    model = tied_model()
    model.norm.bias.requires_grad_(False)
    keys = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    engine, *_ = deepspeedlite.initialize(model=model, config=config("bf16", **keys))
    expected = tied_model().bfloat16().state_dict()
    state = engine._zero3_consolidated_16bit_state_dict()
    assert (state is None) == (dist.get_rank() != 0)
    if state is not None:
        assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
        assert state["head.weight"] is state["embedding.weight"]
    assert "norm.bias" not in engine.module_state_dict(exclude_frozen_parameters=True)
    assert engine.save_16bit_model(str(tmp_path / "new"), exclude_frozen_parameters=True) is True
    loaded = torch.load(tmp_path / "new" / "pytorch_model.bin", weights_only=True)
    assert set(expected) - set(loaded) == {"norm.bias"} and loaded["up.0.weight"].dtype == torch.bfloat16
    dist.barrier()
    (tmp_path / "file").touch()
    with pytest.raises(EngineStateError, match="could not write"):
        engine.save_16bit_model(str(tmp_path / "file"))


@distributed(world_size=2)
def test_gathering_all_weights_must_be_allowed(tmp_path):
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config())
    assert engine.save_16bit_model(str(tmp_path)) is False and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save"):
        engine._zero3_consolidated_16bit_state_dict()
