"""Calls that one rank makes alone: nobody waits for long, nobody is paired with one that has left, and all is said."""

from __future__ import annotations

import contextlib
import io
import random
import time

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.comm import Group, roll_call
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.zero import GatheredParameters


@contextlib.contextmanager
def patience(seconds: float):
    before = roll_call.PATIENCE_S, roll_call._NOTICE_S
    roll_call.PATIENCE_S, roll_call._NOTICE_S = seconds, seconds / 2
    try:
        yield
    finally:
        roll_call.PATIENCE_S, roll_call._NOTICE_S = before


@distributed(world_size=3)
def test_ranks_meet_or_hear_who_is_missing():
    group, me = Group(), dist.get_rank()
    for _ in range(3):
        assert group.roll_call("call()", "one", weight=1) == ""
    with patience(0.4):
        if me != 1:
            assert group.roll_call("call()", "one", weight=1) == "rank 1"
        dist.barrier()
        if me == 1:  # too late: there is nobody any more
            assert group.roll_call("call()", "one", weight=1) == "rank 0, 2"
        dist.barrier()
    assert group.roll_call("call()", "one", weight=1) == ""  # and nothing is left of it
    with patience(0.3):
        assert group.roll_call("call()", f"another of {me}") != ""
        pair = Group(dist.new_group([0, 2])) if me != 1 else dist.new_group([0, 2])
        if me != 1:
            assert pair.roll_call("call()", "one") == ""
    assert group.roll_call("call()", "one", weight=1) == ""


@distributed(world_size=2)
def test_of_two_calls_that_wait_for_each_other_the_lighter_is_given_up():
    """At once, whichever came first; and it is short of patience where it was left alone before."""
    group, me = Group(), dist.get_rank()
    for late in (0, 1):
        dist.barrier()
        if me == late:
            time.sleep(0.3)
        start = time.monotonic()
        if me == 0:
            assert group.roll_call("part()", f"part {late}", weight=1) == "rank 1"
            assert time.monotonic() - start < 2
        assert group.roll_call("whole()", "whole", weight=2) == ""
    if me == 0:
        start = time.monotonic()
        assert group.roll_call("part()", "part 0", weight=1) == "rank 1"
        assert time.monotonic() - start < roll_call.PATIENCE_S - 1


@pytest.mark.slow
@distributed(world_size=3)
def test_whoever_meets_does_so_with_all():
    """Ranks that come and go at random: each has met as often as the others, at the same time."""
    group, me = Group(), dist.get_rank()
    draw = random.Random(me)
    met = []
    with patience(0.03):
        for _ in range(40):
            time.sleep(draw.random() * 0.08)
            start = time.monotonic()
            if not group.roll_call("call()", "at random"):
                met.append((start, time.monotonic()))
    everyone = group.all_gather_objects(met)
    assert len({len(each) for each in everyone}) == 1 and 0 < len(met) < 40
    for spans in zip(*everyone):
        assert max(start for start, _ in spans) <= min(end for _, end in spans)


def engine_of(**zero):
    return deepspeedlite.initialize(
        model=tied_model(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        },
    )[0]


def step(engine) -> float:
    loss = engine(*tokens(0, 0, dist.get_rank()))
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.slow_unless(alone=1)
@pytest.mark.parametrize("alone", [0, 1])
@distributed(world_size=2)
def test_a_state_dict_on_one_rank(alone):
    """Names and shapes at once; values say what to do. The others train on meanwhile, and it is as if nothing was."""
    engine, twin = engine_of(), engine_of()
    assert step(engine) == step(twin)
    if dist.get_rank() == alone:
        with patience(0.5):
            for module in (engine.module, engine.module.up):
                started = time.monotonic()
                state = module.state_dict(prefix="its.")
                assert time.monotonic() - started < 5
                whole = (
                    tied_model().get_submodule("up" if module is not engine.module else "").state_dict(prefix="its.")
                )
                assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in whole.items()}
        value = state["its.0.weight"]
        assert value.dtype == torch.float32 and value.detach().t().contiguous().half().shape == value.t().shape
        wants = [
            lambda: value.sum().item(),
            lambda: value.cpu(),
            lambda: value.numpy(),
            lambda: torch.zeros(value.shape).copy_(value),
            lambda: torch.save(state, io.BytesIO()),
        ]
        for want in wants:
            with pytest.raises(
                DistributedError, match=rf"state_dict\(\) of up .*rank {alone}.* not on rank {1 - alone}"
            ):
                want()
        with patience(0.2), pytest.raises(RuntimeError, match="GatheredParameters"):
            tied_model().up.load_state_dict(engine.module.up.state_dict())
    assert [step(engine) for _ in range(2)] == [step(twin) for _ in range(2)]
    one, other = engine.module.state_dict(), twin.module.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@distributed(world_size=2)
def test_what_one_rank_may_do_alone():
    engine = engine_of()
    step(engine)
    if dist.get_rank() == 1:
        with patience(0.5), pytest.raises(DistributedError, match=r"load_state_dict\(\) of the model .*not on rank 0"):
            engine.module.load_state_dict(tied_model().state_dict())
        for name, param in engine.module.named_parameters():
            assert param.numel() == 0, name
    step(engine)
    with GatheredParameters(list(engine.module.parameters())):
        if dist.get_rank() == 0:  # as scripts save: nothing is to be gathered any more
            state = engine.module.state_dict()
            assert all(value.untyped_storage().nbytes() for value in state.values())
    if dist.get_rank() == 0:
        assert torch.isfinite(sum(value.float().sum() for value in state.values()))
        engine.destroy()
    dist.barrier()
    engine.destroy()


@pytest.mark.slow
@distributed(world_size=2, timeout_s=90)
def test_a_gather_that_one_rank_makes_while_the_other_trains_is_an_error_on_both():
    engine = engine_of()
    step(engine)
    started = time.monotonic()
    with pytest.raises(DistributedError, match="out of step"):
        if dist.get_rank() == 0:
            with GatheredParameters(engine.module.norm.weight):
                pass
        else:
            step(engine)
    assert time.monotonic() - started < 30
