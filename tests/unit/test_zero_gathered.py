"""What `zero.GatheredParameters` takes, whose edits count, and how its ranks leave it together."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero import GatheredParameters, Init


def engine_of(model: torch.nn.Module, stage: int = 3, bf16: bool = False, persistent: int = 0):
    return deepspeedlite.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "bf16": {"enabled": bf16},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
        },
    )[0]


def values_of(*params: torch.Tensor) -> list[torch.Tensor]:
    with GatheredParameters(params):
        return [param.detach().clone() for param in params]


def is_everywhere(tensor: torch.Tensor, expected: float) -> bool:
    """Whether all elements are the same number, on every rank."""
    wrong = torch.tensor(float((tensor != expected).any()))
    dist.all_reduce(wrong)
    return not wrong


@pytest.mark.parametrize("persistent", [0, 200])
@distributed(world_size=2)
def test_the_modifier_s_values_reach_every_rank_and_the_masters(persistent):
    engine = engine_of(tied_model(), bf16=True, persistent=persistent)
    weight, bias = engine.module.up[0].weight, engine.module.up[0].bias
    assert (bias.numel() > 0) == (persistent > bias.ds_numel)
    with GatheredParameters([weight, bias], modifier_rank=1), torch.no_grad():
        if dist.get_rank() == 1:
            weight.fill_(0.25)
            bias.fill_(0.5)
    with GatheredParameters([bias]), GatheredParameters(iter([weight, bias])):
        assert weight.shape == (97, 32) and (weight == 0.25).all() and (bias == 0.5).all()
    for unit, runs in zip(engine._reducer.units, engine.optimizer._runs_of_units):
        for (_, values, _), run in zip(unit.runs(), runs):
            assert torch.equal(run.master.bfloat16(), values)
    engine.backward(engine(*tokens(0, 0, dist.get_rank())))
    engine.step()
    with GatheredParameters(weight):
        assert ((weight.float() - 0.25).abs() < 0.01).all() and not (weight == 0.25).all()


@distributed(world_size=2)
def test_every_rank_may_edit_where_one_is_the_modifier():
    engine = engine_of(tied_model())
    weight = engine.module.norm.weight
    for modifier in (0, 1):
        with GatheredParameters(weight, modifier_rank=modifier):
            torch.nn.init.constant_(weight, 2.0 + dist.get_rank())
        assert is_everywhere(values_of(weight)[0], 2.0 + modifier)
    with (
        pytest.raises(EngineStateError, match=r"modifier_rank=7.*held by ranks \[0, 1\]"),
        GatheredParameters(weight, modifier_rank=7),
    ):
        raise AssertionError("entered")
    assert weight.numel() == 0


@pytest.mark.parametrize("persistent", [0, 100])
@pytest.mark.parametrize("editor", [0, 1, None])
@distributed(world_size=2)
def test_an_edit_without_a_modifier_is_one_error_on_all_ranks_and_is_dropped(editor, persistent):
    engine = engine_of(tied_model(), persistent=persistent)
    weight = engine.module.norm.weight
    before = values_of(weight)[0]
    said = r"parameter norm.weight was changed on rank " + (r"0.*on rank 1" if editor is None else str(editor))
    with pytest.raises(EngineStateError, match=said), GatheredParameters([engine.module.norm.bias, weight]):
        if editor in (None, dist.get_rank()):
            weight.data[0], weight.data[1] = 5.0, 7.0
    assert torch.equal(values_of(weight)[0], before)


@distributed(world_size=2)
def test_two_elements_that_change_places_are_an_edit():
    engine = engine_of(tied_model())
    weight, bias = engine.module.up[0].weight, engine.module.up[0].bias
    for param in (weight, bias):
        with pytest.raises(EngineStateError, match=r"up\.0\."), GatheredParameters(param):
            param.data.copy_(param.data.flip(0))
    with pytest.raises(EngineStateError, match=r"up\.0\.weight"), GatheredParameters(weight):
        weight.data.copy_(weight.data.flip(1))


@distributed(world_size=2)
def test_the_class_is_named_where_no_name_is_known():
    with Init():
        layer = torch.nn.Linear(4, 4)
    with (
        pytest.raises(EngineStateError, match=r"parameter (Linear\.)?weight was changed"),
        GatheredParameters(layer.weight),
    ):
        layer.weight.data.zero_()


@pytest.mark.parametrize("stage", [0, 1, 2, None])
@distributed(world_size=2)
def test_where_nothing_is_sharded_nothing_happens(stage):
    model = tied_model()
    if stage is not None:
        engine_of(model, stage)
    if dist.get_rank() == 1:  # alone: nobody waits
        with GatheredParameters(model.parameters()), torch.no_grad():
            model.norm.weight.fill_(3)
        with GatheredParameters(model.parameters(), modifier_rank=0), torch.no_grad():
            model.norm.bias.fill_(4)
        assert (model.norm.weight == 3).all() and (model.norm.bias == 4).all()


@distributed(world_size=2)
def test_what_may_be_given():
    model = tied_model()
    engine_of(model)
    weight, bias = model.norm.weight, model.norm.bias
    named = dict(model.named_parameters())
    for given in (weight, [weight, None], (bias, weight, weight), named.values(), (p for p in named.values())):
        with GatheredParameters(given, modifier_rank=0):
            assert weight.numel() == 32
        assert weight.numel() == 0
    buffer = torch.ones(2)
    for nothing in (None, [None], [], iter(()), [buffer], torch.nn.Parameter(buffer)):
        for modifier in (None, 0):
            with GatheredParameters(nothing, modifier_rank=modifier):
                assert weight.numel() == 0
    with GatheredParameters(weight, modifier_rank=0, enabled=False):
        assert weight.numel() == 0
    for wrong in (named, [weight, "norm.bias"], [3]):
        with pytest.raises(EngineStateError, match=r"takes parameters, got (str|int)"):
            GatheredParameters(wrong)
    again = GatheredParameters([weight], modifier_rank=0)
    for value in (1.0, 2.0):
        with again, torch.no_grad():
            weight.fill_(value)
        assert is_everywhere(values_of(weight)[0], value)


@distributed(world_size=2)
def test_tensors_kept_beyond_the_context_have_their_values():
    model, plain = tied_model(), tied_model()
    engine_of(model)
    layer = model.up[0]
    with GatheredParameters(layer.parameters()):
        kept, array = layer.weight.data, layer.bias.detach().numpy()
        y = layer(torch.ones(3, 32))
    with GatheredParameters(layer.parameters()):
        pass
    assert layer.weight.numel() == 0
    assert torch.equal(kept, plain.up[0].weight) and (array == plain.up[0].bias.detach().numpy()).all()
    with GatheredParameters(layer.weight, modifier_rank=0):
        layer.weight.data.fill_(2)
        inside = layer.weight.data
    assert torch.equal(kept, plain.up[0].weight) and (inside == 2).all()
    assert is_everywhere(values_of(layer.weight)[0], 2) and torch.isfinite(y).all()


@distributed(world_size=2)
def test_another_shape_on_one_rank_is_an_error_on_all():
    model = tied_model()
    engine_of(model)
    weight = model.norm.weight
    said = r"parameter norm\.weight of shape \(32,\) was given a tensor of shape \(40,\) on rank 0"
    with pytest.raises(EngineStateError, match=said), GatheredParameters(weight, modifier_rank=0):
        if dist.get_rank() == 0:
            weight.data = torch.ones(40)
    with GatheredParameters(weight, modifier_rank=1):
        if dist.get_rank() == 1:
            weight.data = torch.full((32,), 3.0)
    assert weight.numel() == 0 and is_everywhere(values_of(weight)[0], 3)


@distributed(world_size=2)
def test_the_order_given_may_differ_between_ranks():
    model = tied_model()
    engine_of(model)
    params = list(model.parameters())
    given = params[:: 1 if dist.get_rank() == 0 else -1]
    with GatheredParameters(given, modifier_rank=1):
        for number, param in enumerate(params):
            param.data.fill_(number + 10 * dist.get_rank())
    for number, value in enumerate(values_of(*params)):
        assert is_everywhere(value, number + 10)
    with pytest.raises(EngineStateError, match=r"changed on rank 0"), GatheredParameters(given):
        if dist.get_rank() == 0:
            params[0].data.zero_()


@distributed(world_size=2)
def test_nested_contexts_and_engines():
    model, other = tied_model(), tied_model(seed=1)
    engine_of(model)
    engine_of(other)
    weight, theirs = model.norm.weight, other.norm.weight
    with GatheredParameters([weight, theirs]):  # sees what a context inside keeps
        with GatheredParameters([theirs, weight], modifier_rank=1), torch.no_grad():
            weight.fill_(dist.get_rank() + 5)
            theirs.fill_(9)
        assert weight.numel() == theirs.numel() == 32
        with GatheredParameters(weight):
            assert (weight == 6).all()
    assert weight.numel() == theirs.numel() == 0
    assert is_everywhere(values_of(weight)[0], 6) and is_everywhere(values_of(theirs)[0], 9)


@pytest.mark.parametrize("modifier", [None, 0, 1])
@distributed(world_size=2)
def test_an_exception_on_one_rank_leaves_the_others_in_step(modifier):
    engine = engine_of(tied_model())
    weight = engine.module.norm.weight
    started = time.monotonic()
    for failing in (0, 1):
        try:
            with GatheredParameters(weight, modifier_rank=modifier), torch.no_grad():
                if modifier is not None:
                    weight.fill_(failing + 2.0)
                if dist.get_rank() == failing:
                    raise ValueError("inside")
        except ValueError:
            assert dist.get_rank() == failing
        assert weight.numel() == 0
        assert is_everywhere(values_of(weight)[0], failing + 2.0 if modifier is not None else 1.0)
    with pytest.raises(KeyboardInterrupt), GatheredParameters(weight, modifier_rank=modifier):
        raise KeyboardInterrupt
    assert weight.numel() == 0 and time.monotonic() - started < 20
    engine.backward(engine(*tokens(0, 0, dist.get_rank())))
    engine.step()
