"""A configuration that a client has not filled in yet: who reads it early leaves "auto" open, `initialize` does not.

Under our own name what is still "auto" in `initialize` is a fault; under the name deepspeed it means the default, and
unknown keys at the top level are passed over, both said once.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from harness import distributed
from test_config import faults_of, only_fault

import deepspeedlite
from deepspeedlite.config import load_config
from deepspeedlite.config.__main__ import main
from deepspeedlite.config.load import examine
from deepspeedlite.launcher import stand_in

BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
# The keys that published examples have, by whose documentation shows them.
PUBLISHED = {
    "transformers, stage 2": {
        **BATCH,
        "fp16": FP16,
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "transformers, stage 3": {
        **BATCH,
        "bf16": {"enabled": "auto"},
        "fp16": FP16,
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
        "zero_optimization": {
            **ZERO3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
    },
    "LLaMA-Factory, stage 3": {
        **BATCH,
        "zero_allow_untested_optimizer": True,
        "fp16": FP16,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {**ZERO3, "overlap_comm": False},
    },
    "axolotl, stage 3": {
        **BATCH,
        "bf16": {"enabled": True},
        "fp16": {**FP16, "auto_cast": False, "initial_scale_power": 32},
        "zero_optimization": ZERO3,
        "wall_clock_breakdown": False,
    },
    "accelerate, a file of its own": {
        **BATCH,
        "bf16": {"enabled": "auto"},
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {
            "stage": "auto",
            "offload_param": {"device": "auto", "nvme_path": "auto"},
            "offload_optimizer": {"device": "auto", "nvme_path": "auto"},
            "stage3_gather_16bit_weights_on_model_save": "auto",
        },
    },
}


def leaves(tree, path=""):
    for name, value in tree.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from leaves(value, where)
        else:
            yield where, value


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_peek_leaves_what_is_auto_and_takes_the_rest(name):
    published = copy.deepcopy(PUBLISHED[name])
    config = load_config(published, world_size=8, peek=True)
    assert published == PUBLISHED[name]
    auto = [path for path, value in leaves(published) if value == "auto"]
    assert sorted(config.left_open) == sorted(auto)
    assert config.zero_optimization.stage == (0 if "zero_optimization.stage" in auto else published_stage(published))
    assert config.zero_optimization.stage3_param_persistence_threshold == 100_000
    assert len(faults_of(published)) == len(auto)  # where the values count, each of them is a fault


def published_stage(published):
    return published["zero_optimization"]["stage"]


def test_a_peek_finds_what_is_wrong_all_the_same():
    wrong = {**PUBLISHED["transformers, stage 3"], "zero_optimisation": {}, "gradient_clipping": "high"}
    _, _, faults = examine(wrong, peek=True)
    assert sorted(fault.path for fault in faults) == [("gradient_clipping",), ("zero_optimisation",)]
    _, _, faults = examine({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, 2, peek=True)
    assert "train_batch_size" in faults[0].line()


def test_rules_wait_for_the_values():
    """A contradiction with a key that is "auto" is none yet."""
    zero = {"stage": "auto", "offload_param": {"device": "cpu"}}
    assert load_config({"zero_optimization": zero}, peek=True).left_open == ("zero_optimization.stage",)
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "auto"}}
    assert load_config({"zero_optimization": nvme}, peek=True).left_open == (
        "zero_optimization.offload_param.nvme_path",
    )


def test_auto_in_a_list_and_in_place_of_a_name():
    half_filled = {"type": "auto", "params": {"betas": ["auto", 0.99]}}
    config = load_config({"optimizer": half_filled}, peek=True)
    assert config.left_open == ("optimizer.type", "optimizer.params.betas") and config.optimizer is None
    assert "optimizer.type" in only_fault({"optimizer": {"type": "auto"}})


def test_check_says_what_is_left(tmp_path, capsys):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 8, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}))
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"OK {path}\nbatch on 1 rank: train_batch_size 8")
    assert 'left for the client to fill in ("auto"): gradient_clipping, bf16.enabled' in said
    path.write_text(json.dumps(PUBLISHED["transformers, stage 3"]))
    assert main(["check", str(path)]) == 0
    assert "train_batch_size, train_micro" in capsys.readouterr().out
    path.write_text(json.dumps({"gradient_clipping": "auto"}))
    assert main(["check", str(path)]) == 1 and "neither is given" in capsys.readouterr().out


@distributed(world_size=2)
def test_init_reads_a_configuration_before_it_is_filled():
    config = copy.deepcopy(PUBLISHED["transformers, stage 3"])
    config["zero_optimization"].pop("offload_param")
    config["zero_optimization"].pop("offload_optimizer")
    deepspeedlite.comm.init_distributed(config=config)
    with deepspeedlite.zero.Init(config_dict_or_path=config):
        net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))
    assert net[0].weight.numel() == 0  # sharded
    config.update(train_batch_size=4, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2)
    config.update(gradient_clipping=1.0, bf16={"enabled": False}, fp16={"enabled": False})
    config["optimizer"]["params"] = {"lr": 1e-3}
    config["scheduler"]["params"] = {"warmup_num_steps": 2, "total_num_steps": 10}
    config["zero_optimization"].update(
        reduce_bucket_size=256, stage3_prefetch_bucket_size=230, stage3_param_persistence_threshold=160
    )
    engine, *_ = deepspeedlite.initialize(model=net, model_parameters=net.parameters(), config=config)
    for _ in range(4):
        engine.backward(engine(torch.ones(1, 16)).square().mean())
        engine.step()
    assert engine.global_steps == 2


def test_a_dotted_key_is_explained():
    line = only_fault({"zero_optimization.reduce_bucket_size": 4096})
    assert "reduce_bucket_size goes into the object zero_optimization" in line


UNDER_THE_NAME = """
import torch
import deepspeed

zero = {"stage": STAGE, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
dotted = {"zero_optimization.stage3_prefetch_bucket_size": 100, "zero_optimisation": {"stage": 9}}
config = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": "auto", "gradient_clipping": "auto"}
for _ in range(2):
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(4, 4), config={**config, "bf16": {"enabled": "auto"}, "zero_optimization": zero, **dotted}
    )
with torch.no_grad():
    engine(torch.ones(1, 4))
sgd = {"type": "SGD", "params": {"lr": 0.5, "momentum": "auto"}}
warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 4, "warmup_type": "linear"}}
engine, optimizer, _, schedule = deepspeed.initialize(
    model=torch.nn.Linear(4, 4), config={**config, "optimizer": sgd, "scheduler": warmup}
)
assert optimizer.param_groups[0]["momentum"] == 0 and schedule.max_lrs == [0.5], optimizer.param_groups
assert engine.gradient_clipping() == 1.0
engine, *_ = deepspeed.initialize(
    model=torch.nn.Linear(4, 4), config={**config, "zero_optimization": {"stage": True}, "optimizer": sgd}
)
assert engine.zero_optimization_stage() == 1
try:
    deepspeed.initialize(model=torch.nn.Linear(4, 4), config={"zero_optimization": {"bogus": 1}})
except deepspeed.errors.ConfigError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_under_the_name_deepspeed_auto_is_the_default(stage):
    """What DeepSpeed 0.19.8 does with these keys in its sections, and does not survive in params and batch sizes."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_THE_NAME.replace("STAGE", str(stage))],
        env=stand_in.with_stand_in({**os.environ, "DSL_LOG_LEVEL": "info"}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count('zero_optimization.stage3_prefetch_bucket_size"]: unknown key, passed over') == 1
    assert said.count("zero_optimisation: unknown key, passed over; did you mean zero_optimization?") == 1
    assert said.count('zero_optimization.stage3_prefetch_bucket_size: still "auto", so the default counts') == 1
    assert 'optimizer.params.momentum, scheduler.params.warmup_max_lr: still "auto"' in said
    assert said.count("zero_optimization.stage: true or false, taken as 1; write the number") == 1
    assert "zero_optimization.bogus = 1: unknown key" in said
