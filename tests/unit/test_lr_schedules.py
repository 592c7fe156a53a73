"""Schedules against their closed formulas, and what clients of DeepSpeed rely on around them."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeedlite import schedules
from deepspeedlite.compat import tuning_arguments
from deepspeedlite.optim.schedules import _TORCH_SCHEDULES, build_scheduler
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.schedules import OneCycle, WarmupCosineLR, WarmupLR


def make_optimizer(cls=torch.optim.AdamW, lrs=(0.3, 0.07)) -> torch.optim.Optimizer:
    return cls([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs], lr=0.1)


def trace(scheduler, steps: int) -> list[list[float]]:
    """The rates in the optimizer at the start and after each step."""
    groups = scheduler.optimizer.param_groups
    seen = [[float(g["lr"]) for g in groups]]
    for _ in range(steps):
        scheduler.step()
        seen.append([float(g["lr"]) for g in groups])
    return seen


def rise(n: int, total: int, kind: str) -> float:
    return math.log(n + 1) / math.log(total) if kind == "log" else n / total


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("asked", [0, 1, 2, 10, 10.0])
def test_warmup(kind, asked):
    total = max(2, int(asked))
    params = {"warmup_min_lr": [0.01, 0.0], "warmup_max_lr": 0.2, "warmup_num_steps": asked, "warmup_type": kind}
    got = trace(build_scheduler("WarmupLR", params, make_optimizer()), 25)
    assert got[0] == [0.01, 0.0]
    for n, pair in enumerate(got[1:]):
        w = rise(n, total, kind) if n < total else 1.0
        assert pair == pytest.approx([0.01 + 0.19 * w, 0.2 * w], rel=1e-13)


def test_warmup_reaches_each_groups_own_rate_by_default():
    assert trace(WarmupLR(make_optimizer(), warmup_num_steps=5), 6)[-1] == pytest.approx([0.3, 0.07])


@pytest.mark.parametrize(("warm", "total"), [(10, 30), (10, 10), (20, 5)])
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_warmup_decay(warm, total, kind):
    params = {"total_num_steps": total, "warmup_min_lr": 0.01, "warmup_num_steps": warm, "warmup_type": kind}
    got = trace(build_scheduler("warmupdecaylr", {**params, "warmup_max_lr": 0.1}, make_optimizer()), 40)
    for n, pair in enumerate(got[1:]):
        w = rise(n, warm, kind) if n < warm else max(0.0, (total - n) / max(1, total - warm))
        assert pair == pytest.approx([0.01 + 0.09 * w] * 2, rel=1e-13)
    assert got[-1] == [0.01, 0.01]


@pytest.mark.parametrize(("warm", "total"), [(10, 30), (20, 5)])
@pytest.mark.parametrize(("low", "end"), [(0.0, 1e-4), (0.1, 0.3)])
def test_warmup_cosine(warm, total, low, end):
    params = {"total_num_steps": total, "warmup_num_steps": warm, "warmup_min_ratio": low, "cos_min_ratio": end}
    got = trace(build_scheduler("WarmupCosineLR", params, make_optimizer()), 40)
    assert got[0] == [0.0, 0.0]
    for n, pair in enumerate(got[1:]):
        x = min(1.0, (n - warm + 1) / max(1, total - warm))
        q = low + (1 - low) * rise(n, warm, "log") if n < warm else end + (1 - end) * (1 + math.cos(math.pi * x)) / 2
        assert pair == pytest.approx([0.3 * q, 0.07 * q], rel=1e-13)
    assert got[-1] == pytest.approx([0.3 * end, 0.07 * end])


@pytest.mark.parametrize("staircase", [True, False])
def test_range_test(staircase):
    params = {"lr_range_test_min_lr": [1e-4, 2e-4], "lr_range_test_step_size": 4, "lr_range_test_step_rate": 5.0}
    got = trace(build_scheduler("LRRangeTest", {**params, "lr_range_test_staircase": staircase}, make_optimizer()), 20)
    assert got[0] == [1e-4, 2e-4]
    for n, pair in enumerate(got[1:]):
        k = (n + 1) // 4 if staircase else (n + 1) / 4
        assert pair == pytest.approx([1e-4 * (1 + 5 * k), 2e-4 * (1 + 5 * k)], rel=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(1, 12),
    second=st.one_of(st.none(), st.integers(0, 12)),
    stairs=st.integers(-1, 5),
    decay_every=st.integers(0, 5),
    decay=st.sampled_from([0.0, 0.5]),
)
def test_one_cycle(first, second, stairs, decay_every, decay):
    scheduler = OneCycle(
        make_optimizer(),
        [0.01, 0.02],
        0.1,
        decay_lr_rate=decay,
        decay_mom_rate=-decay / 100,
        cycle_first_step_size=first,
        cycle_second_step_size=second,
        cycle_first_stair_count=stairs,
        decay_step_size=decay_every,
    )
    group = scheduler.optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.01, (0.9, 0.99)), "the mirror of each other, from the first step on"
    down = first if second is None else second
    for n in range(50):
        scheduler.step()
        i = n + 1
        if n < first + down:
            i = 0 if i == first + down else i
            along, size = (i, first) if i <= first else (first + down - i, down)
            h = (along * stairs // size) / stairs if stairs > 0 else along / size
            lr, mom = 0.01 + 0.09 * h, 0.9 - 0.1 * h
        else:
            d = (i - first - down) / decay_every if decay_every else 0.0
            lr, mom = 0.01 / (1 + decay * d), 0.9 * (1 - decay / 100 * d)
        assert group["lr"] == pytest.approx(lr, rel=1e-12)
        assert group["betas"] == (pytest.approx(mom, rel=1e-12), 0.99)


AT_CONSTRUCTION = [
    ("LRRangeTest", {"lr_range_test_min_lr": [0.01, 0.02]}, [0.01, 0.02], (0.9, 0.999)),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_max_mom": 0.95}, [0.01, 0.01], (0.95, 0.99)),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_momentum": False}, [0.01, 0.01], (0.9, 0.999)),
    ("WarmupLR", {"warmup_min_lr": 0.001}, [0.001, 0.001], (0.9, 0.999)),
    ("WarmupDecayLR", {"warmup_min_lr": [0.001, 0.002], "total_num_steps": 9}, [0.001, 0.002], (0.9, 0.999)),
    ("WarmupCosineLR", {"total_num_steps": 9, "warmup_min_ratio": 0.5}, [0.0, 0.0], (0.9, 0.999)),
]


@pytest.mark.parametrize(("name", "params", "lrs", "betas"), AT_CONSTRUCTION)
def test_what_the_first_step_is_taken_with(name, params, lrs, betas):
    optimizer = make_optimizer()
    scheduler = build_scheduler(name, params, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == lrs == scheduler.lrs_at(-1)
    assert [group["betas"] for group in optimizer.param_groups] == [betas] * 2
    if name == "OneCycle" and params.get("cycle_momentum", True):
        assert scheduler.get_mom() == [betas] * 2


def test_one_cycle_without_betas_leaves_momentum_alone():
    optimizer = make_optimizer(torch.optim.SGD)
    scheduler = OneCycle(optimizer, 0.1, 0.2, cycle_first_step_size=3)
    scheduler.step()
    assert scheduler.get_mom() is None
    assert optimizer.param_groups[0]["momentum"] == 0


def test_one_cycle_stops_before_the_momentum_reaches_one():
    scheduler = OneCycle(make_optimizer(), 0.1, 0.2, cycle_first_step_size=1, decay_step_size=1, decay_mom_rate=0.1)
    with pytest.raises(OptimizerError, match="lower decay_mom_rate"):
        trace(scheduler, 10)


CASES = {
    "WarmupLR": {"warmup_num_steps": 7},
    "WarmupDecayLR": {"warmup_num_steps": 7, "total_num_steps": 20},
    "WarmupCosineLR": {"warmup_num_steps": 7, "total_num_steps": 20},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.4, "cycle_first_step_size": 6, "decay_step_size": 3},
    "LRRangeTest": {"lr_range_test_step_size": 3},
}


def test_the_list_of_names():
    assert set(schedules.VALID_LR_SCHEDULES) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_saved_anywhere_it_goes_on_the_same(name):
    straight = build_scheduler(name, CASES[name], make_optimizer())
    rates = trace(straight, 25)
    for stop in (0, 1, 6, 7, 19):
        before = build_scheduler(name, CASES[name], make_optimizer())
        trace(before, stop)
        after = build_scheduler(name, CASES[name], make_optimizer())
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert after.state_dict() == {"last_batch_iteration": stop - 1}
        assert trace(after, 25 - stop) == rates[stop:]
        jumped = build_scheduler(name, CASES[name], make_optimizer())
        jumped.step(stop)
        assert jumped.get_last_lr() == rates[stop + 1] == jumped.get_lr()


@pytest.mark.parametrize("name", CASES)
def test_last_lr_before_there_is_one(name):
    optimizer = make_optimizer()
    resumed = build_scheduler(name, {**CASES[name], "last_batch_iteration": 4}, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.07]
    with pytest.raises(AssertionError, match="need to call step"):
        resumed.get_last_lr()
    resumed.step()
    assert resumed.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    if name == "OneCycle":
        with pytest.raises(AssertionError, match="need to call step"):
            build_scheduler(name, CASES[name], optimizer).get_last_lr()


def test_tensor_rates_are_filled_in_place_and_wrappers_opened():
    rate = torch.tensor(0.3, dtype=torch.float64)
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate, foreach=False)
    wrapper = argparse.Namespace(optimizer=inner)
    cosine = WarmupCosineLR(wrapper, total_num_steps=20, warmup_num_steps=2)
    for _ in range(3):
        cosine.step()
    assert inner.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.3 * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi / 18)) / 2), rel=1e-12)
    plain = argparse.Namespace(param_groups=[{"lr": 1.0}])
    assert trace(WarmupLR(plain, warmup_num_steps=2, warmup_type="linear"), 3) == [[0.0], [0.0], [0.5], [1.0]]


def test_torch_schedules_by_name():
    scheduler = build_scheduler("StepLR", {"step_size": 2, "gamma": 0.5}, make_optimizer(torch.optim.SGD, (1.0,)))
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert "reducelronplateau" in _TORCH_SCHEDULES


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("WarmupLr2", {}, ["scheduler.type WarmupLr2", 'did you mean "WarmupLR"', "known:"]),
        ("WarmupLR", {"warmup_steps": 3}, ["scheduler.params.warmup_steps", 'did you mean "warmup_num_steps"']),
        ("WarmupLR", {"warmup_max_lr": "auto"}, ["scheduler.params.warmup_max_lr", '"auto"']),
        ("WarmupLR", {"warmup_max_lr": "0.1"}, ["warmup_max_lr", "finite number"]),
        ("WarmupLR", {"warmup_max_lr": [0.1]}, ["warmup_max_lr", "1 values", "2 parameter groups"]),
        ("WarmupLR", {"warmup_num_steps": 2.5}, ["warmup_num_steps", "whole number"]),
        ("WarmupLR", {"warmup_num_steps": -1}, ["warmup_num_steps", "at least 0"]),
        ("WarmupLR", {"warmup_type": "cubic"}, ["warmup_type", "cubic", '"linear"']),
        ("WarmupDecayLR", {}, ["total_num_steps"]),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 0}, ["cycle_first_step_size"]),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_momentum": "no"}, ["cycle_momentum", "true or"]),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, ["lr_range_test_step_size"]),
        ("StepLR", {"step": 2}, ["scheduler.params.step", 'did you mean "step_size"']),
        ("LambdaLR", {"lr_lambda": "x"}, ["LambdaLR"]),
    ],
)
def test_mistakes_are_named(name, params, words):
    optimizer = make_optimizer()
    with pytest.raises(OptimizerError) as caught:
        scheduler = build_scheduler(name, params, optimizer)
        scheduler.step()
    assert all(word in str(caught.value) for word in words), caught.value


def test_not_an_optimizer():
    with pytest.raises(OptimizerError, match="param_groups"):
        WarmupLR(object())


def test_command_line():
    parser = tuning_arguments.add_tuning_arguments(argparse.ArgumentParser())
    assert tuning_arguments.get_config_from_args(parser.parse_args([]))[0] is None
    section, problem = tuning_arguments.get_config_from_args(parser.parse_args(["--lr_schedule", "WarmupLRR"]))
    assert section is None and 'did you mean "WarmupLR"' in str(problem)
    for name in CASES:
        args = parser.parse_args(["--lr_schedule", name, "--warmup_num_steps", "12", "--cycle_max_lr", "0.5"])
        section, problem = tuning_arguments.get_config_from_args(args)
        assert problem is None and section is not None and section["type"] == name
        extra = {"total_num_steps": 50} if "total_num_steps" in CASES[name] else {}
        build_scheduler(name, {**section["params"], **extra}, make_optimizer()).step()
    assert section is not None and section["params"]["lr_range_test_step_size"] == 1000
