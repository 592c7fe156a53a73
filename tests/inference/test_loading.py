"""Checkpoints into models on the meta device: the values of the model that was saved, in no more memory than that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import distributed
from paths import ROOT
from safetensors.torch import load_file, save_file
from tiny_transformers import FAMILIES, logits_of, tiny

import deepspeedlite
from deepspeedlite.runtime.errors import CheckpointError, InferenceError

pytest.importorskip("transformers")


def on_meta(family: str) -> Any:
    with torch.device("meta"):
        return tiny(family)


def saved(family: str, folder: Path) -> Any:
    """A model, after it was saved in several files."""
    model = tiny(family)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def _as_saved(family: str, folder: Path, size: int, **keywords: Any) -> None:
    whole = tiny(family)
    engine = deepspeedlite.init_inference(
        on_meta(family), dtype=torch.float32, mp_size=size, checkpoint=str(folder), **keywords
    )
    with torch.no_grad():
        expected = logits_of(whole, family)
    torch.testing.assert_close(logits_of(engine, family), expected, rtol=1e-5, atol=1e-5)
    assert not any(tensor.is_meta for tensor in engine.module.state_dict().values())


@pytest.mark.slow_unless(family=["llama-tied", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder(family, tmp_path):
    saved(family, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _as_saved(family, tmp_path, 1)


@pytest.mark.slow_unless(family=["gpt2"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "falcon-7b", "bloom", "t5", "qwen2", "gemma"])
@distributed(world_size=2, timeout_s=120)
def test_folder_over_two_ranks(family, tmp_path):
    import torch.distributed as dist

    if dist.get_rank() == 0:
        saved(family, tmp_path)
    dist.barrier()
    _as_saved(family, tmp_path, 2)


@pytest.mark.parametrize("kind", ["file", "list", "dict", "json", "elsewhere", "index", "bin", "base_dir"])
def test_ways_to_name_it(kind, tmp_path, monkeypatch):
    model = saved("gpt2", tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    values = {name: value.clone() for one in files for name, value in load_file(tmp_path / one).items()}
    given: dict[str, Any] = {"base_dir": str(tmp_path)}
    if kind == "file":
        save_file(values, tmp_path / "one.safetensors")
        given = {"checkpoint": tmp_path / "one.safetensors"}
    elif kind == "bin":  # as DeepSpeed's descriptions of checkpoints name them
        torch.save(values, tmp_path / "weights.bin")
        given["checkpoint"] = {"type": "BLOOM", "checkpoints": ["weights.bin"], "version": 1.0}
    elif kind == "json":
        (tmp_path / "description.json").write_text(json.dumps({"checkpoints": files}))
        given = {"checkpoint": str(tmp_path / "description.json")}
    elif kind == "elsewhere":  # as scripts for BLOOM write it: beside themselves, with names alone
        beside = tmp_path / "scripts"
        beside.mkdir()
        monkeypatch.chdir(beside)
        (beside / "checkpoints.json").write_text(json.dumps({"type": "BLOOM", "checkpoints": files, "version": 1.0}))
        given["checkpoint"] = "checkpoints.json"
    elif kind == "index":
        given = {"checkpoint": str(tmp_path / "model.safetensors.index.json")}
    elif kind == "base_dir":
        given = {"checkpoint": tmp_path.name, "ckpt_config": {"base_dir": str(tmp_path.parent)}}
    else:
        given["checkpoint"] = files if kind == "list" else {"checkpoints": files}
    engine = deepspeedlite.init_inference(on_meta("gpt2"), dtype=torch.float32, **given)
    torch.testing.assert_close(logits_of(engine, "gpt2"), logits_of(model, "gpt2").detach(), rtol=1e-5, atol=1e-5)


@distributed(world_size=2)
def test_saved_for_later_and_loaded(tmp_path):
    """As DeepSpeed's tests do: by one engine on two ranks, then into a model on the meta device, split or not."""
    config = {"dtype": torch.float32, "tensor_parallel": {"tp_size": 2}}
    wanted = logits_of(tiny("gpt2"), "gpt2").detach()
    folder = tmp_path / "shards"
    deepspeedlite.init_inference(tiny("gpt2"), config={**config, "save_mp_checkpoint_path": str(folder)})
    assert sorted(path.name for path in folder.iterdir()) == ["ds_inference_config.json", "pytorch_model.bin"]
    described = str(folder / "ds_inference_config.json")
    for more in ({}, {"tensor_parallel": {"tp_size": 1}, "replace_with_kernel_inject": True}):
        loading = {**config, **more, "checkpoint": described, "save_mp_checkpoint_path": str(tmp_path / "none")}
        engine = deepspeedlite.init_inference(on_meta("gpt2"), config=loading)
        torch.testing.assert_close(logits_of(engine, "gpt2"), wanted, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "none").exists()


def test_names_with_and_without_the_models_prefix(tmp_path):
    """A file of the model inside, into the model around it, and the reverse; types are those that are asked for."""
    model = saved("gpt2", tmp_path)
    inner = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    save_file(inner, tmp_path / "inner.safetensors")
    engine = deepspeedlite.init_inference(on_meta("gpt2"), dtype="bf16", checkpoint=tmp_path / "inner.safetensors")
    assert engine.module.lm_head.weight is engine.module.transformer.wte.weight
    torch.testing.assert_close(engine.module.lm_head.weight, model.lm_head.weight.detach().bfloat16())
    inside = deepspeedlite.init_inference(on_meta("gpt2").transformer, dtype="fp32", checkpoint=str(tmp_path))
    torch.testing.assert_close(inside.module.wte.weight, model.lm_head.weight)


def test_into_a_model_with_values(tmp_path):
    saved("gpt2", tmp_path)
    model = tiny("gpt2")
    kept = model.lm_head.weight
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    engine = deepspeedlite.init_inference(model, dtype="fp32", checkpoint=str(tmp_path))
    assert engine.module.lm_head.weight is kept and kept.abs().sum() > 0


@distributed(world_size=2)
def test_checkpoint_of_a_training(tmp_path):
    """Whatever the number of ranks and the stage that it was saved with."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    config["optimizer"] = {"type": "Adam", "params": {"lr": 0.1}}
    engine, *_ = deepspeedlite.initialize(model=net, config=config)
    x = torch.ones(4, 8)
    engine.backward(engine(x).square().mean())
    engine.step()
    engine.save_checkpoint(str(tmp_path), tag="one")
    with torch.no_grad():
        expected = engine(x)
    engine.destroy()
    for folder in (tmp_path, tmp_path / "one"):
        with torch.device("meta"):
            fresh = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        for size in (1, 2):
            loaded = deepspeedlite.init_inference(fresh, dtype="fp32", mp_size=size, checkpoint=str(folder))
            torch.testing.assert_close(loaded(x), expected)
            with torch.device("meta"):
                fresh = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def test_what_does_not_fit_is_named(tmp_path, capfd):
    saved("gpt2", tmp_path)
    values = {name: value for one in tmp_path.glob("*.safetensors") for name, value in load_file(one).items()}
    del values["transformer.h.0.ln_1.weight"], values["transformer.h.1.mlp.c_fc.bias"]
    values["transformer.wpe.weight"] = torch.zeros(3, 64)
    values["more"] = torch.zeros(2)
    values["transformer.h.0.attn.masked_bias"] = torch.zeros(1)  # which old files have, and nobody wants
    save_file(values, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError) as told:
        deepspeedlite.init_inference(on_meta("gpt2"), dtype="fp32", checkpoint=tmp_path / "one.safetensors")
    said = str(told.value)
    assert "2 tensors are missing: transformer.h.0.ln_1.weight, transformer.h.1.mlp.c_fc.bias" in said
    assert "transformer.wpe.weight is (3, 64) in the files and (64, 64) in the model" in said
    assert "1 tensor is in the files alone: more" in said
    whole = saved("gpt2", tmp_path / "whole").state_dict()
    save_file({**{k: v.clone() for k, v in whole.items()}, "more": torch.zeros(2)}, tmp_path / "two.safetensors")
    deepspeedlite.init_inference(on_meta("gpt2"), dtype="fp32", checkpoint=tmp_path / "two.safetensors")
    assert "1 tensor is in the files alone, and are left out: more" in capfd.readouterr().err


@pytest.mark.parametrize(
    "checkpoint, said",
    [
        ("nowhere", "nowhere does not exist; give a folder"),
        ("empty", "has neither safetensors, nor files of torch's, nor a checkpoint"),
        (["a.safetensors", "b.safetensors"], r"2 files are missing: .*a.safetensors"),
        ({"checkpoints": {"tp": []}}, "must have a list of files as `checkpoints`"),
        ("short.safetensors", "short.safetensors is damaged"),
        ("evil.bin", "evil.bin is no file of tensors that torch.load reads safely"),
        (7, "checkpoint must be a path, a list of files or a dict; got int"),
    ],
)
def test_checkpoints_that_are_none(checkpoint, said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{}")
    torch.save(Path("x"), tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match=said):
        deepspeedlite.init_inference(on_meta("gpt2"), dtype="fp32", checkpoint=checkpoint, base_dir=tmp_path)


def test_buffers_that_nobody_can_compute(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.register_buffer("scale", torch.ones(2), persistent=False)

    save_file({"linear.weight": torch.ones(2, 2), "linear.bias": torch.ones(2)}, tmp_path / "one.safetensors")
    with torch.device("meta"):
        net = Net()
    with pytest.raises(InferenceError, match=r"1 buffers of the model have no values, .*: scale"):
        deepspeedlite.init_inference(net, dtype="fp32", checkpoint=tmp_path / "one.safetensors")


_MEASURED = """
import json, resource, sys, torch, transformers, deepspeedlite
from deepspeedlite.comm import Group
folder, size, more = sys.argv[-3], int(sys.argv[-2]), sys.argv[-1]
config = transformers.LlamaConfig.from_pretrained(folder)
if size > 1:
    deepspeedlite.init_distributed(verbose=False)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
    whole = sum(param.numel() for param in model.parameters())
torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
engine = deepspeedlite.init_inference(model, dtype=torch.bfloat16, checkpoint=folder, mp_size=size, **json.loads(more))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
held = [*engine.module.parameters(), *engine.module.buffers()]
share = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
assert share < 2 * whole / size * (0.45 if "quant" in more else 1.02), (share, whole)
print(f"share {share / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
assert peak <= 1.15 * share + 200e6, f"share {share / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"
ids = torch.arange(6).view(1, 6)
assert torch.isfinite(engine(ids).logits).all()
"""


_FOUR_BITS = {"quant": {"weight": {"num_bits": 4}}}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a model of 560 MB."""
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1280, intermediate_size=3456, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=16, dtype="bfloat16", pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    values = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(values, folder / "model.safetensors")
    config.save_pretrained(folder)
    del values
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, more", [(1, {}), (2, {}), (1, _FOUR_BITS), (1, {**_FOUR_BITS, "replace_with_kernel_inject": True})]
)
def test_peak_memory(size, more, large, tmp_path):
    """A rank needs its share of the weights, and no copy of it or of the whole on the way."""
    script = tmp_path / "measured.py"
    script.write_text(_MEASURED)
    command = [sys.executable, str(script), str(large), str(size), json.dumps(more)]
    if size > 1:
        command = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", str(size), *command[1:]]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.count("share") == size
