"""Whole weights out of checkpoints: Hugging Face's layout, DeepSpeed's functions, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
from harness import distributed
from torch import nn

import deepspeedlite
from deepspeedlite.checkpoint import tensors
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.formats.hugging_face.weights import parse_bytes
from deepspeedlite.checkpoint.tensors import write_tensors
from deepspeedlite.compat.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.utils import safe_get_full_fp32_param


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.frozen(self.norm(self.embedding(tokens)))).float().square().mean()


def saved(folder: Path, stage: int):
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 20
    torch.manual_seed(0)
    engine, *_ = deepspeedlite.initialize(model=Net(), config=config)
    engine.backward(engine(torch.arange(4)))
    engine.step()
    engine.save_checkpoint(folder)
    masters = {
        name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters() if param.requires_grad
    }
    return engine, {name: value.float() for name, value in {**engine.module_state_dict(), **masters}.items()}


@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=2)
def test_weights_are_the_masters_and_every_name_is_there(stage, tmp_path):
    engine, expected = saved(tmp_path / "ckpt", stage)
    if engine._parts.group.rank != 0:
        return
    expected["head.weight"] = expected["embedding.weight"]
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ckpt"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.float(), expected[name]), name
        assert value.dtype is (torch.float32 if value.is_floating_point() else torch.int64)
    assert "frozen.weight" not in get_fp32_state_dict_from_zero_checkpoint(
        str(tmp_path / "ckpt"), "global_step1", exclude_frozen_parameters=True
    )
    model = load_state_dict_from_zero_checkpoint(Net(), str(tmp_path / "ckpt"))
    assert torch.equal(model.head.weight, expected["embedding.weight"])


@distributed(world_size=1)
def test_shards_and_index_are_hugging_faces_and_nothing_is_left_after_an_error(tmp_path):
    from safetensors.torch import load_file

    _, expected = saved(tmp_path / "ckpt", 2)
    out = tmp_path / "weights"
    assert command(["to_fp32", str(tmp_path / "ckpt"), str(out), "--max_shard_size", "1KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name: load_file(out / name) for name in set(index["weight_map"].values())}
    assert len(files) > 2 and all(name.startswith("model-0000") for name in files)
    assert index["weight_map"].keys() == expected.keys() - {"head.weight"}
    for name, file in index["weight_map"].items():
        assert torch.equal(files[file][name].float(), expected[name])
    nbytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == nbytes

    assert command(["to_fp32", str(tmp_path / "ckpt" / "global_step1"), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half["norm.weight"].dtype is torch.bfloat16 and half["norm.num_batches_tracked"].dtype is torch.int64

    with redirect_stderr(StringIO()) as words:
        assert command(["to_fp32", str(tmp_path / "ckpt"), str(out)]) == 1
        assert command(["to_fp32", str(tmp_path), str(tmp_path / "other")]) == 1
        assert command(["to_fp32", str(tmp_path / "ckpt"), str(tmp_path / "other"), "--tag", "none"]) == 1
    told = words.getvalue()
    assert "exists already" in told and "has none in it" in told and "there is no checkpoint none in" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "half", "weights"]


@distributed(world_size=1)
def test_files_for_torch_load_have_deepspeeds_names(tmp_path):
    _, expected = saved(tmp_path / "ckpt", 1)
    convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path / "ckpt"), str(tmp_path / "out"))
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(found["norm.weight"], expected["norm.weight"])


@pytest.mark.slow
@distributed(world_size=1)
def test_the_program_beside_a_checkpoint_takes_its_weights_out(tmp_path):
    engine, expected = saved(tmp_path, 2)
    program = tmp_path / "zero_to_fp32.py"
    assert os.access(program, os.X_OK)
    before = program.stat().st_ino
    engine.save_checkpoint(tmp_path, tag="again")
    assert program.stat().st_ino == before, "it was there already"

    def run(*arguments, python=(sys.executable,)):
        command = [*python, program.name, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run(".", "out")
    assert done.returncode == 0 and done.stdout == "the weights are in out\n", done.stderr
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(found["embedding.weight"], expected["embedding.weight"])
    done = run(".", "shards", "--safe_serialization", "--max_shard_size", "1KB", "--tag", "global_step1")
    assert done.returncode == 0 and (tmp_path / "shards" / "model.safetensors.index.json").exists()
    done = run(".", "out")
    assert done.returncode == 1 and done.stderr == "out exists already; name a new folder\n"
    done = run(".", "other", python=(sys.executable, "-I", "-S"))  # no packages: nothing of ours to import
    assert done.returncode == 1 and "cannot import" in done.stderr and "Traceback" not in done.stderr


def test_the_disk_begins_while_a_file_is_being_written_and_the_file_is_the_same(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    whole = {"a": torch.randn(10_001), "b": torch.arange(7), "c": torch.ones(0), "d": torch.randn(3, 5).bfloat16()}
    expected = write_tensors(tmp_path / "plain", whole)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(tensors, "_PIECE_NBYTES", 1000)
    monkeypatch.setattr(tensors, "_BEHIND_NBYTES", 4096)
    monkeypatch.setattr(tensors, "_sync_file_range", lambda fd, start, nbytes, how: begun.append((start, nbytes)))
    assert write_tensors(tmp_path / "begun", whole) == expected == tensors.checksum(tmp_path / "begun")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "begun").read_bytes()
    assert all(torch.equal(value, whole[name]) for name, value in load_file(tmp_path / "begun").items())
    stops = [start + nbytes for start, nbytes in begun]
    assert len(begun) >= 8 and [start for start, _ in begun] == [0, *stops[:-1]] and stops[-1] <= expected.nbytes
    begun.clear()
    write_tensors(tmp_path / "lazy", whole, fsync=False)
    assert not begun


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("5GB", "1.5 MiB", "10kb", 77)] == [5 * 10**9, 3 << 19, 10_000, 77]
    for text in ("", "GB", "-1GB", "5XB", "0"):
        with pytest.raises(CheckpointError, match="is no size"):
            parse_bytes(text)
