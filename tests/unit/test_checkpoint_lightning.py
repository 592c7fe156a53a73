"""Lightning's conversion to fp32, on checkpoints of ours: its steps in our words, and itself where it is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import distributed
from paths import ROOT
from torch import nn

import deepspeedlite
from deepspeedlite.compat import checkpoint_files
from deepspeedlite.compat.checkpoint_files import FilesError, MissingFilesError
from deepspeedlite.compat.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeedlite.launcher.stand_in import with_stand_in

CLIENT_STATE = {"epoch": 3, "pytorch-lightning_version": "2.5", "loops": {"fit": [1, 2]}, "hyper": torch.ones(2)}
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"


def trained(stage: int, folder: Any, layout: str = "deepspeedlite") -> nn.Module:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True, "auto_cast": True},
        "checkpoint": {"format": layout},
    }
    torch.manual_seed(0)
    engine, *_ = deepspeedlite.initialize(model=nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), config=settings)
    engine.backward(engine(torch.ones(2, 5)).square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="checkpoint", client_state=CLIENT_STATE)
    return engine


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_its_steps(stage: int, tmp_path: Path) -> None:
    trained(stage, tmp_path)
    tag = str(tmp_path / "checkpoint")
    (file,) = checkpoint_files.get_optim_files(tag)
    held = torch.load(file, weights_only=False)["optimizer_state_dict"]
    assert held["zero_stage"] == stage and held["partition_count"] == 2
    (same,) = checkpoint_files.get_model_state_files(tag)
    model = checkpoint_files.get_model_state_file(tag, stage)
    assert os.path.basename(model) == os.path.basename(same) == "mp_rank_00_model_states.pt"
    state = torch.load(model, weights_only=False)
    assert torch.equal(state.pop("hyper"), CLIENT_STATE["hyper"])
    assert {name: state[name] for name in CLIENT_STATE if name != "hyper"} == {
        name: value for name, value in CLIENT_STATE.items() if name != "hyper"
    }
    assert (state["global_steps"], state["dp_world_size"], state["mp_world_size"]) == (1, 2, 1)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert {name: tuple(value.shape) for name, value in weights.items()}["0.weight"] == (7, 5)
    with pytest.raises(FilesError, match="no checkpoint in DeepSpeed's layout"):
        checkpoint_files.parse_optim_states([file], tag)
    with pytest.raises(FilesError, match="is no file of weights"):
        checkpoint_files.parse_model_states([model])
    with pytest.raises(MissingFilesError):
        checkpoint_files.get_optim_files(str(tmp_path))  # of tags, and none itself


# Run by an environment that has Lightning.
ITSELF = """
import sys, torch
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
found = convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], *sys.argv[3:])
written = torch.load(sys.argv[2], weights_only=False)
assert written.keys() == found.keys() and written["epoch"] == 3 and written["loops"] == {"fit": [1, 2]}
assert "module" not in written and "optimizer" not in written
print({name: tuple(value.shape) for name, value in written["state_dict"].items()})
print(all(value.dtype is torch.float32 for value in written["state_dict"].values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["deepspeedlite", "deepspeed"])
@pytest.mark.parametrize("stage", [2, 3])
def test_itself(stage: int, layout: str, tmp_path: Path) -> None:
    if not CLIENTS.exists():
        pytest.skip(f"needs Lightning in {CLIENTS}: make test-clients makes it")
    save(stage=stage, layout=layout, tmp_path=tmp_path)
    environ = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT)})
    command = [str(CLIENTS), "-c", ITSELF, str(tmp_path), str(tmp_path / "file.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    shapes = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (3, 7), "1.bias": (3,)}
    assert done.stdout.splitlines()[-2:] == [str(shapes), "True"]


@distributed(world_size=2)
def save(stage: int, layout: str, tmp_path: Path) -> None:
    trained(stage, tmp_path, layout)
