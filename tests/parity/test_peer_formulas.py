"""Loss scales and schedules beside DeepSpeed's own classes, step by step, in an environment that has it.

The script below runs in both interpreters: here on our classes, in DSL_PEER_PYTHON on DeepSpeed's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepspeedlite import schedules
from deepspeedlite.optim.precision import LossScaler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("DSL_PEER_PYTHON"),
        reason="needs DSL_PEER_PYTHON: the Python of an environment with DeepSpeed",
    ),
]

STEPS = 60

SHARED = """
import torch

def shown(optimizer):
    groups = optimizer.param_groups
    return [[float(g["lr"]) for g in groups], [list(g["betas"]) if "betas" in g else g["momentum"] for g in groups]]

def make(optimizer, lrs):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    if optimizer == "SGD":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return getattr(torch.optim, optimizer)(groups, lr=0.1, betas=(0.85, 0.95))

def follow(schedules, case):
    optimizer = make(case["optimizer"], case["lrs"])
    scheduler = getattr(schedules, case["type"])(optimizer, **case["params"])
    seen = [shown(optimizer)]
    for step in range(case["steps"]):
        if step == case["resume"]:
            state = scheduler.state_dict()
            optimizer = make(case["optimizer"], case["lrs"])
            scheduler = getattr(schedules, case["type"])(optimizer, **case["params"])
            scheduler.load_state_dict(state)  # ours also writes its rates at once, theirs at the next step
        scheduler.step()
        seen.append(shown(optimizer))
    return seen
"""

PEER = """
import json, sys, types
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.fp16 import loss_scaler
loss_scaler.dist = types.SimpleNamespace(get_rank=lambda: 1)
asked = json.load(sys.stdin)
scales = []
for case in asked["scales"]:
    overflows = case.pop("overflows")
    scaler = loss_scaler.DynamicLossScaler(raise_error_at_min_scale=False, **case)
    scales.append([])
    for overflow in overflows:
        scaler.update_scale(overflow)
        scales[-1].append(scaler.cur_scale)
print("RESULT" + json.dumps({"scales": scales, "schedules": [follow(lr_schedules, c) for c in asked["schedules"]]}))
"""


def ask_peer(**asked: Any) -> dict[str, Any]:
    python = os.environ["DSL_PEER_PYTHON"]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"DS_ACCELERATOR": "cpu"}
    asked = {"scales": [], "schedules": [], **asked}
    done = subprocess.run(
        [python, "-c", SHARED + PEER], input=json.dumps(asked), capture_output=True, text=True, env=environ, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return found


def test_loss_scales():
    dice = random.Random(1)
    cases = [
        {
            "init_scale": 2.0**power,
            "scale_window": window,
            "min_scale": 1.0,
            "delayed_shift": hysteresis,
            "consecutive_hysteresis": consecutive,
            "overflows": [dice.random() < chance for _ in range(120)],
        }
        for power in (3, 16)
        for hysteresis in (1, 2, 3)
        for consecutive in (False, True)
        for window in (1, 2, 3, 10)
        for chance in (0.03, 0.2, 0.5)
    ]
    theirs = ask_peer(scales=cases)["scales"]
    for case, sequence in zip(cases, theirs):
        scaler = LossScaler(
            scale=case["init_scale"],
            dynamic=True,
            window=case["scale_window"],
            min_scale=0.0,  # at DeepSpeed's an overflow is fatal here, as it is there by default
            hysteresis=case["delayed_shift"],
            consecutive_hysteresis=case["consecutive_hysteresis"],
        )
        ours = []
        for overflow in case["overflows"]:
            scaler.update(overflow)
            scaler.scale = max(scaler.scale, 1.0)
            ours.append(scaler.scale)
        assert ours == sequence, {**case, "overflows": None}


WARM = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.1, "warmup_num_steps": 12}
CYCLE = {
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "cycle_first_step_size": 9,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9,
}
CASES = [
    ("LRRangeTest", {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 7, "lr_range_test_step_rate": 0.5}),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": [0.001, 0.1], "lr_range_test_step_size": 5, "lr_range_test_staircase": True},
    ),
    ("OneCycle", CYCLE),
    ("OneCycle", {**CYCLE, "cycle_second_step_size": 14, "decay_step_size": 5, "decay_lr_rate": 0.3}),
    ("OneCycle", {**CYCLE, "decay_step_size": 20, "decay_mom_rate": 0.02, "decay_lr_rate": 0.1}),
    ("OneCycle", {**CYCLE, "cycle_momentum": False}),
    ("OneCycle", {**CYCLE, "cycle_first_stair_count": 3, "cycle_second_stair_count": 4, "cycle_second_step_size": 8}),
    ("WarmupLR", WARM),
    ("WarmupLR", {**WARM, "warmup_type": "linear"}),
    ("WarmupDecayLR", {**WARM, "total_num_steps": 40}),
    ("WarmupDecayLR", {**WARM, "total_num_steps": 40, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 12, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 12, "warmup_type": "linear"}),
    ("OneCycle", {**CYCLE, "last_batch_iteration": 6}),
    ("WarmupLR", {**WARM, "last_batch_iteration": 6}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 12, "last_batch_iteration": 6}),
]


def test_schedules():
    cases = [
        {"type": kind, "params": params, "optimizer": optimizer, "lrs": lrs, "steps": STEPS, "resume": resume}
        for kind, params in CASES
        for optimizer, lrs, resume in (("Adam", [0.3, 0.07], None), ("AdamW", [0.3, 0.07], 17), ("SGD", [0.3, 0.07], 3))
    ]
    scope = SimpleNamespace()
    exec(SHARED, vars(scope))  # the same code there and here
    assert torch is scope.torch
    theirs = ask_peer(schedules=cases)["schedules"]
    unlike = []
    for case, sequence in zip(cases, theirs):
        ours = scope.follow(schedules, case)
        for step, (mine, other) in enumerate(zip(ours, sequence)):
            if case["type"] == "OneCycle" and step == 0:
                mine, other = mine[:1], other[:1]  # whose momentum before the first step is not the formula's
            flat = [torch.tensor(one, dtype=torch.float64).flatten() for one in (*mine, *other)]
            half = len(flat) // 2
            same = all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(flat[:half], flat[half:]))
            if not same:
                unlike.append(f"{case['type']} {case['optimizer']} {case['params']} at {step}: {mine} and {other}")
                break
    assert not unlike, "\n".join(unlike)
