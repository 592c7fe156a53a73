"""A checkpoint that two ranks wrote before the package was divided into rooms: it loads, and its program runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import distributed

import deepspeedlite
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

EARLIER = Path(__file__).parent / "checkpoint_of_two_ranks"  # of stages 2 and 3, in bf16, three steps of AdamW
# The sums of each parameter's master and first moment, as the run that saved them saw them.
SAVED = {
    "stage2": {
        "first.weight": (-0.3575173281133175, -0.01578896341379732),
        "first.bias": (-1.0197599679231644, 0.0007371213359873674),
        "norm.weight": (2.992887020111084, 0.07138324808329344),
        "norm.bias": (-0.01288751419633627, 0.10772356949746609),
        "last.weight": (-1.1333166062831879, -0.2995002690004185),
        "last.bias": (-0.6613310277462006, -0.210258349776268),
    },
    "stage3": {
        "first.weight": (-0.3575173313729465, -0.015788961725775152),
        "first.bias": (-1.0197599679231644, 0.0007371213723672554),
        "norm.weight": (2.992887020111084, 0.0713832441251725),
        "norm.bias": (-0.012887513265013695, 0.10772356390953064),
        "last.weight": (-1.1333166062831879, -0.29950025235302746),
        "last.bias": (-0.6613310277462006, -0.210258349776268),
    },
}


def net() -> torch.nn.Module:
    model = torch.nn.Module()
    model.first, model.norm = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
    model.frozen, model.last = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 2)
    return model


@pytest.mark.parametrize("tag", SAVED)
@pytest.mark.parametrize("stage", [1, 3])
@distributed(world_size=[1, 2])
def test_what_two_ranks_saved_earlier_loads(tag, stage, tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 4},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    }
    engine, _, _, scheduler = deepspeedlite.initialize(model=net(), config=config)
    path, client_state = engine.load_checkpoint(EARLIER, tag=None if tag == "stage3" else tag)
    assert path == str(EARLIER / tag) and client_state == {"epoch": 3, "best": torch.tensor([0.5])}
    assert engine.global_steps == 3 and scheduler.get_last_lr() == [0.006826061944859854]
    for name, (master, moment) in SAVED[tag].items():
        param = engine.module.get_parameter(name)
        found = [safe_get_full_fp32_param(param), safe_get_full_optimizer_state(param, "exp_avg")]
        assert [value.double().sum().item() for value in found] == pytest.approx([master, moment], rel=1e-12), name
    assert engine.module.norm.num_batches_tracked == 3


@pytest.mark.slow
def test_the_program_that_was_left_beside_it_still_runs(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "ckpt")
    words = [sys.executable, str(tmp_path / "ckpt" / "zero_to_fp32.py"), str(tmp_path / "ckpt"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(deepspeedlite.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert weights.keys() == net().state_dict().keys()
    for name, (master, _) in SAVED["stage3"].items():
        assert weights[name].double().sum().item() == pytest.approx(master, rel=1e-12)
    assert command(["verify", str(tmp_path / "ckpt")]) == 0
