"""What may be done with a sharded parameter while its values are not here, and what is refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero import GatheredParameters, Init
from deepspeedlite.zero.missing import ShardedParameter, ShardedTensor


def engine_of(model: torch.nn.Module, **zero: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
    }
    return deepspeedlite.initialize(model=model, config=settings)[0]


def pair() -> torch.nn.Sequential:
    """An adapter's two matrices and a layer between them, of which torch would make 0 or nothing without a word."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 8, bias=False))


# By what torch does with the empty tensors: nothing, a wrong number, an error of shapes that does not say why.
REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "in place": lambda a, b: a.add_(1.0),
    "in place by an operator": lambda a, b: a.__imul__(2.0),
    "in place in the data": lambda a, b: a.data.mul_(0.5),
    "in place in the data, by an operator": lambda a, b: a.data.__iadd__(b.data @ a.data),
    "in place in what was detached": lambda a, b: a.detach().zero_(),
    "copied into": lambda a, b: a.copy_(torch.ones(1)),
    "copied from": lambda a, b: torch.ones(0).copy_(a),
    "many at once": lambda a, b: torch._foreach_mul_([a, b], 2.0),
    "initialised": lambda a, b: torch.nn.init.normal_(a),
    "product of two": lambda a, b: b @ a,
    "product of their transposes": lambda a, b: a.data.mT @ b.data.mT,
    "product with a tensor": lambda a, b: torch.nn.functional.linear(torch.ones(3, 8), a),
    "arithmetic": lambda a, b: 1.0 - a,
    "norm": lambda a, b: torch.linalg.vector_norm(a),
    "sum": lambda a, b: a.sum(),
    "compared": lambda a, b: torch.equal(a, b),
    "joined": lambda a, b: torch.cat([a.flatten(), b.flatten()]),
    "cloned": lambda a, b: a.clone(),
    "indexed": lambda a, b: a[0],
    "converted": lambda a, b: a.data.half().numpy(),
    "saved": lambda a, b: torch.save(a.data, io.BytesIO()),
}


@distributed(world_size=2)
def test_what_needs_values_names_the_parameter_and_the_remedy():
    engine, expected = engine_of(pair()), pair().state_dict()
    first, second = engine.module[0].weight, engine.module[1].weight
    for what, action in REFUSED.items():
        with pytest.raises(EngineStateError, match=r"[01]\.weight is sharded.*GatheredParameters"), torch.no_grad():
            warnings.simplefilter("ignore")
            raise AssertionError(f"{what} gave {action(first, second)!r}")
    with GatheredParameters([first, second]):
        assert all(torch.equal(value, expected[name]) for name, value in engine.module.named_parameters())


@distributed(world_size=2)
def test_an_adapter_is_merged_inside_gathered_parameters():
    engine, plain = engine_of(pair()), pair()
    first, second = engine.module[0].weight, engine.module[1].weight
    with pytest.raises(EngineStateError, match=r"1\.weight.*modifier_rank"):
        second.data += second.data @ first.data @ second.data
    with GatheredParameters([first, second], modifier_rank=0):
        second.data += second.data @ first.data @ second.data
    expected = plain[1].weight + plain[1].weight @ plain[0].weight @ plain[1].weight
    with GatheredParameters([second]):
        assert torch.allclose(second, expected)


@distributed(world_size=2)
def test_what_needs_no_values_is_as_ever():
    engine = engine_of(tied_model())
    module, weight = engine.module, engine.module.head.weight
    assert type(weight) is ShardedParameter and isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.numel(), weight.dim(), len(weight)) == ((0,), 0, 1, 0) and weight.ds_shape == (61, 32)
    assert (weight.dtype, weight.device.type, weight.grad) == (torch.float32, "cpu", None)
    assert weight.is_leaf and weight.is_contiguous() and torch.is_floating_point(weight) and weight.data_ptr() == 0
    assert weight in {weight} and weight in list(module.parameters()) and hash(weight) == id(weight)
    assert "embedding.weight" in repr(weight) and "embedding.weight" in f"{weight.data}"
    assert weight.requires_grad_(False) is weight and not weight.requires_grad
    weight.requires_grad = True
    weight.register_hook(print).remove()
    assert type(weight.data) is type(weight.detach()) is type(weight.half()) is ShardedTensor
    assert weight.cpu() is weight and torch.ones(2).to(weight).sum() == 2
    for made in (torch.empty_like(weight), torch.zeros_like(weight), weight.new_zeros(0), type(weight)(torch.ones(0))):
        assert type(made) in (torch.Tensor, torch.nn.Parameter) and made.shape == (0,)
    for optimizer in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW):
        optimizer(module.parameters(), lr=0.1)
    module.to("cpu").zero_grad()
    assert all(type(value) is torch.Tensor and value.numel() for value in module.state_dict().values())
    assert deepspeedlite.utils.safe_get_full_fp32_param(weight).shape == (61, 32)


@pytest.mark.parametrize("reuse", [0, 1_000_000_000])
@distributed(world_size=2)
def test_a_parameter_is_a_plain_one_while_its_values_are_here(reuse):
    engine = engine_of(tied_model(), stage3_max_reuse_distance=reuse)
    weight, seen = engine.module.up[0].weight, []
    engine.module.up[0].register_forward_hook(lambda module, *_: seen.append(type(module.weight)))
    weight.register_hook(lambda grad: seen.append(type(weight)))
    for step in range(3):
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()
        assert type(weight) is ShardedParameter
    assert len(seen) == 6 and set(seen) == {torch.nn.Parameter}
    with GatheredParameters([weight]):
        assert type(weight) is torch.nn.Parameter and weight.norm() > 0
    engine.destroy()
    assert type(weight) is ShardedParameter
    deepspeedlite.initialize(model=engine.module, config={"train_batch_size": 2})
    assert type(weight) is torch.nn.Parameter and weight.shape == weight.ds_shape


class OwnParameter(torch.nn.Parameter):
    """A client's class of its own, which stays what it is."""


@distributed(world_size=2)
def test_of_zero_init_and_of_a_class_of_its_own():
    with Init():
        layer = torch.nn.Linear(4, 4)
        layer.weight.data.mul_(0.0)  # inside, values are brought to whoever touches them
    with pytest.raises(EngineStateError, match=r"Linear\.weight is sharded.*GatheredParameters"):
        layer.weight.data.add_(1.0)
    with GatheredParameters([layer.weight]):
        assert not layer.weight.any()
    model = pair()
    model[0].weight = OwnParameter(model[0].weight.data)
    engine = engine_of(model)
    assert type(engine.module[0].weight) is OwnParameter and type(engine.module[1].weight) is ShardedParameter
