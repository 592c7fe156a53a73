"""Optimizers and schedules in a configuration: `config check`, without torch, refuses what `initialize` refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import distributed
from test_config import only_fault

import deepspeedlite
from deepspeedlite import schedules as ours
from deepspeedlite.compat.lenient_config import pass_over
from deepspeedlite.config import ConfigError, load_config, recipes
from deepspeedlite.config.load import examine
from deepspeedlite.optim import registry
from deepspeedlite.optim import schedules as by_name
from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError

REFUSED = [
    ({"optimizer": {"type": "AdmaW"}}, 'optimizer.type = "AdmaW": is unknown (did you mean "AdamW"?)'),
    ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.1}}}, 'optimizer.type = "OneBitAdam": compresses'),
    ({"optimizer": {"type": "Muon"}}, 'optimizer.type = "Muon": orthogonalises whole matrices'),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}},
        "optimizer.params.lr: must be a finite number, got '1e-3'",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lrr": 1}}},
        'optimizer.params.lrr: is not a parameter (did you mean "lr"?)',
    ),
    ({"optimizer": {"type": "SGD", "params": {"lr": -1}}}, "optimizer.params.lr: must not be negative"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.5]}}}, "optimizer.params.betas[1]: must be in [0, 1)"),
    ({"optimizer": {"type": "Lion", "params": {"betas": 0.9}}}, "optimizer.params.betas: must be a list of 2 numbers"),
    ({"optimizer": {"type": "Adam", "params": {"amsgrad": 1}}}, "optimizer.params.amsgrad: must be true or false"),
    (
        {"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1}}},
        "optimizer.params.max_grad_norm: is not an optimizer",
    ),
    ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "optimizer.params.nesterov: needs a momentum"),
    (
        {"optimizer": {"type": "Adam", "params": {"bias_correction": False, "amsgrad": True}}},
        "optimizer.params.amsgrad: does not go with bias_correction false",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"fp32_optimizer_states": False}}},
        "optimizer.params.fp32_optimizer_states: false is not done here",
    ),
    ({"scheduler": {"type": "WarmupLr2"}}, 'scheduler.type = "WarmupLr2": is unknown (did you mean "WarmupLR"?)'),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps: is not given"),
    (
        {"scheduler": {"type": "StepLR", "params": {"step": 1, "step_size": 2}}},
        "scheduler.params.step: is not a parameter",
    ),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": "2"}}}, "scheduler.params.step_size: must be a number"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "9"}}},
        "scheduler.params.warmup_num_steps: must",
    ),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2.5}}}, "must be a whole number of steps"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, 'must be "log" or "linear"'),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, "x"]}}},
        "scheduler.params.warmup_max_lr: must",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_momentum": "no"}}},
        "scheduler.params.cycle_momentum: must be true or false",
    ),
]
RIGHT = [
    {"optimizer": {"type": "adamW", "params": {"lr": 1, "betas": [0.9, 0.99], "torch_adam": True, "fused": None}}},
    {"optimizer": {"type": "FusedAdam", "params": {"adam_w_mode": False, "set_grad_none": True}}},
    {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}}},
    {"optimizer": {"type": "RMSprop", "params": {"centered": True}}},
    {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}},
    {"scheduler": {"type": "warmuplr", "params": {"warmup_max_lr": [0.1], "warmup_type": "linear"}}},
    {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 0}}},
    {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": [1.0], "decay_step_size": 5}}},
    {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 5}}},
    {"scheduler": {"type": "MultiStepLR", "params": {"milestones": [2, 4]}}},
]


def build(source):
    """What `initialize` builds of a section."""
    weight = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.AdamW([weight], lr=0.1)
    if "optimizer" in source:
        made = registry.build_optimizer(source["optimizer"]["type"], source["optimizer"].get("params"), [weight])
    if "scheduler" in source:
        by_name.build_scheduler(source["scheduler"]["type"], source["scheduler"].get("params"), made)


@pytest.mark.parametrize(("source", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_built_is_a_fault_with_and_without_torch(monkeypatch, source, said):
    assert said in only_fault(source)
    with pytest.raises((OptimizerError, UnsupportedError)):
        build(source)
    monkeypatch.setattr(recipes, "sys", SimpleNamespace(modules={}))
    assert said in only_fault(source)


@pytest.mark.parametrize("source", RIGHT, ids=[str(source) for source in RIGHT])
def test_what_can_be_built_is_no_fault_with_or_without_torch(monkeypatch, source):
    load_config(source)
    build(source)
    monkeypatch.setattr(recipes, "sys", SimpleNamespace(modules={}))
    load_config(source)


def test_check_loads_no_torch_and_refuses(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}}))
    check = (
        "import sys; from deepspeedlite.config.__main__ import main; status = main(['check', sys.argv[1]]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", check, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "optimizer.params.lr: must be a finite number" in done.stdout, done.stderr


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the tables are torch 2.13's")
def test_the_tables_are_torchs():
    torchs, schedules = recipes.signatures("torch.optim"), recipes.signatures("torch.optim.lr_scheduler")
    for name, cls in registry.TORCH_CLASSES.items():
        assert recipes.accepted_parameters(cls, 1) == torchs[cls.__name__], name
    for cls in by_name._TORCH_SCHEDULES.values():
        assert recipes.accepted_parameters(cls, 1) == schedules[cls.__name__], cls
    assert len(torchs) == len(registry.TORCH_CLASSES)
    assert len(schedules) == len(by_name._TORCH_SCHEDULES)


def test_the_tables_are_ours():
    for name, cls in ours.SCHEDULES.items():
        assert recipes.accepted_parameters(cls, 1) == recipes.signatures("schedules")[name], name
    table = recipes.signatures("deepspeedlite")
    for name, known in recipes.OPTIMIZERS.items():
        if not known.torch:
            accepted = recipes.accepted_parameters(registry.OURS[known.ours], 1)
            assert {key: value for key, value in accepted.items() if key != "max_grad_norm"} == table[known.ours], name


@distributed(world_size=1)
def test_a_section_that_is_not_used_is_not_looked_into():
    """Whoever hands an optimizer over may have another's section in the file, as under DeepSpeed."""
    layer = torch.nn.Linear(2, 1)
    strange = {"optimizer": {"type": "OneBitAdam", "params": {"what": 1}}, "scheduler": {"type": "Mine"}}
    config = {"train_batch_size": 1, **strange}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    deepspeedlite.initialize(model=layer, optimizer=optimizer, lr_scheduler=schedule, config=config)
    with pytest.raises(ConfigError, match=r"optimizer\.type") as caught:
        deepspeedlite.initialize(model=torch.nn.Linear(2, 1), config=config)
    assert "scheduler.type" in str(caught.value)


@pytest.mark.parametrize("flag", [True, False])
def test_a_stage_is_a_number(flag):
    """To Python true is 1; DeepSpeed takes it so, and so does its name here, saying it once."""
    source = {"zero_optimization": {"stage": flag}}
    assert "must be 0, 1, 2 or 3" in only_fault(source)
    _, config, faults = examine(source, pass_over=pass_over)
    assert not faults and config.zero_optimization.stage == int(flag)
    assert config.passed_over == (f"zero_optimization.stage: true or false, taken as {int(flag)}; write the number",)
    assert load_config({"zero_optimization": flag}).zero_optimization.stage == int(flag)
