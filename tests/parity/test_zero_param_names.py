"""What DeepSpeed puts on parameters of stage 3: attributes, a summary, gathering by hand; parameters read elsewhere."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite import zero
from deepspeedlite.compat.zero_params import unregister_external_parameter
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero import ZeroParamStatus


def config(threshold: int = 0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": threshold,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))


def made(under_init: bool, threshold: int = 0) -> tuple[Any, list[Tensor]]:
    """An engine or a module, and the values of its parameters."""
    values = [param.detach().clone() for param in net().parameters()]
    if under_init:
        with zero.Init(config_dict_or_path=config()):
            return net(), values
    return deepspeedlite.initialize(model=net(), config=config(threshold))[0].module, values


@pytest.mark.parametrize("under_init", [True, False])
@distributed(world_size=2)
def test_attributes_and_summary(under_init: bool) -> None:
    module, _ = made(under_init)
    for param, shape in zip(module.parameters(), [(7, 5), (7,), (5, 7), (5,)]):
        assert not param.ds_persist and not param.is_external_param and param.ds_param_type.name == "PARTITIONED"
        assert dist.get_world_size(param.ds_process_group) == param.ds_zero_partition_world_size == 2
        assert dist.get_rank(param.ds_process_group) == param.ds_zero_partition_rank == dist.get_rank()
        assert param.aligned_size() - param.padding_size() == param.ds_numel == torch.Size(shape).numel()
        assert param.aligned_size() % 2 == 0 and param.padding_size() in (0, 1)
        summary = param.ds_summary()
        assert summary.pop("id") == param.ds_id and summary.pop("ds_tensor.shape") == param.ds_tensor.shape
        assert summary == {
            "status": "NOT_AVAILABLE",
            "numel": 0,
            "ds_numel": param.ds_numel,
            "shape": (0,),
            "ds_shape": shape,
            "requires_grad": True,
            "grad_shape": None,
            "persist": False,
            "active_sub_modules": set(),
        }


@distributed(world_size=2)
def test_parameters_that_stay_whole_have_the_same(world_size: int) -> None:
    module, values = made(False, threshold=10)
    assert [param.ds_persist for param in module.parameters()] == [False, True, False, True]
    bias = module[0].bias
    bias.all_gather()
    assert torch.equal(bias, values[1]) and bias.ds_summary()["status"] == "AVAILABLE"
    bias.partition()
    assert torch.equal(bias, values[1]) and dist.get_world_size(bias.ds_process_group) == 2


@pytest.mark.parametrize("under_init", [True, False])
@distributed(world_size=2)
def test_gathering_by_hand(under_init: bool) -> None:
    module, values = made(under_init)
    params = list(module.parameters())
    params[0].all_gather()
    params[0].all_gather()  # again: nothing
    assert torch.equal(params[0], values[0]) and params[2].numel() == 0
    assert params[0].ds_status is ZeroParamStatus.AVAILABLE
    params[0].partition()
    assert params[0].numel() == 0 and params[0].ds_status is ZeroParamStatus.NOT_AVAILABLE
    params[1].all_gather(param_list=set(params))
    assert all(map(torch.equal, params, values))
    kept = params[2].data
    params[3].partition(param_list=params, has_been_updated=False)
    assert all(param.numel() == 0 for param in params)
    params[0].all_gather()
    assert torch.equal(kept, values[2]), "a tensor that somebody keeps keeps its values"
    with torch.no_grad():
        params[0].fill_(3.0)
    params[0].partition(has_been_updated=True)
    with zero.GatheredParameters(params):
        assert params[0].eq(3.0).all() and torch.equal(params[2], values[2])


@distributed(world_size=2)
def test_gathered_by_hand_a_parameter_stays_whole_through_a_pass(world_size: int) -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config())
    weight = engine.module[0].weight
    weight.all_gather()
    engine.backward(engine(torch.ones(2, 5)).square().mean())
    assert weight.shape == (7, 5)
    weight.partition()
    engine.step()
    assert weight.numel() == 0
    engine.backward(engine(torch.ones(2, 5)).square().mean())
    engine.step()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.tensor([2.5])), nn.Linear(3, 3)


@distributed(world_size=2)
def test_a_number_is_read_where_it_is_sharded(world_size: int) -> None:
    with zero.Init(config_dict_or_path=config()):
        module = Scaled()
    assert module.scale.numel() == 0 and module.scale.item() == 2.5 and module.scale.numel() == 0


@distributed(world_size=1)
def test_copies_are_plain_and_nothing_is_kept_alive() -> None:
    module, values = made(True)
    with zero.GatheredParameters(list(module.parameters())):
        copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for copied in copies:
        for param, value in zip(copied.parameters(), values):
            assert torch.equal(param, value) and not hasattr(param, "all_gather")
    reference = weakref.ref(module[0].weight)
    del module, param
    gc.collect()
    assert reference() is None


# --- parameters that are read outside the module that owns them -----------------------------------------------------


class ReturnsBias(nn.Module):
    """As Megatron's: its own parameter is part of what it returns."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.wrap = wrap
        self.weight, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight.t()
        return {"tuple": (y, self.bias), "dict": {"y": y, "b": self.bias}, "nested": (y, [{"b": self.bias}])}[self.wrap]


class UsesBias(nn.Module):
    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.first, self.part, self.head = nn.Linear(5, 5), ReturnsBias(wrap), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(self.first(x))
        y, bias = (found["y"], found["b"]) if isinstance(found, dict) else found
        bias = bias[0]["b"] if isinstance(bias, list) else bias
        return (self.head(y).tanh() + bias).square().mean()  # another module has run meanwhile


class PutAside(nn.Module):
    """DeepSpeed's documentation: one module's weight is handed to another, and here kept in a list before."""

    def __init__(self, register: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 5)
        self.aside = [self.first.weight]
        if register:
            zero.register_external_parameter(self, self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return (self.head(x).tanh() @ self.aside[0]).square().mean()


def trains_as_torch(build: Any) -> None:
    plain = built(build)
    engine, *_ = deepspeedlite.initialize(model=built(build), config=config())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = engine(x[2 * dist.get_rank() :][:2])
        engine.backward(loss)
        engine.step()
        (sum(plain(x[2 * rank :][:2]) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = engine.module.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5)


def built(build: Any) -> nn.Module:
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("wrap", ["tuple", "dict", "nested"])
@distributed(world_size=2)
def test_a_returned_parameter_is_whole_where_it_is_used(wrap: str) -> None:
    trains_as_torch(lambda: UsesBias(wrap))


@distributed(world_size=2)
def test_a_parameter_put_aside_and_registered_is_whole(world_size: int) -> None:
    trains_as_torch(lambda: PutAside(True))


@distributed(world_size=2)
def test_registering_and_its_end(world_size: int) -> None:
    with zero.Init(config_dict_or_path=config()):
        module = net()
    weight = module[0].weight
    for _ in range(2):
        zero.register_external_parameter(module, weight)
    unregister_external_parameter(module, weight)
    with pytest.raises(EngineStateError, match=r"is not registered as an external parameter of this Sequential"):
        unregister_external_parameter(module, weight)
    with pytest.raises(EngineStateError, match=r"needs a torch.nn.Parameter, got Tensor"):
        zero.register_external_parameter(module, torch.ones(1))
