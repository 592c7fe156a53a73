"""LLaMA-Factory on deepspeedlite, by the configurations that it ships: the losses of its own data parallelism.

It pins older versions of transformers and TRL than the other clients are tested with, so it has its own environment,
whose Python DSL_LLAMAFACTORY_PYTHON names (`make test-llamafactory` makes one). With DSL_PEER_PYTHON the same trainings
run on the real DeepSpeed too.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from drive import HERE, environment, run

STEPS = 4
KINDS = [("sft", "full"), ("sft", "lora"), ("dpo", "full"), ("dpo", "lora")]
pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(900)]


def needed_python() -> str:
    """Of LLaMA-Factory's environment."""
    python = os.environ.get("DSL_LLAMAFACTORY_PYTHON")
    if not python:
        pytest.skip("needs LLaMA-Factory, whose environment DSL_LLAMAFACTORY_PYTHON names: make test-llamafactory")
    return python


@functools.cache
def losses(engine: str, task: str, tuning: str, stage: int, variant: str = "", bf16: bool = False) -> list[float]:
    """Of the first steps, as LLaMA-Factory logs them."""
    python = needed_python()
    job: dict[str, Any] = {"task": task, "tuning": tuning, "stage": stage, "variant": variant, "bf16": bf16}
    return run("llamafactory", engine, python=python, steps=STEPS, **job)["losses"]


@pytest.mark.parametrize("stage, variant", [(2, ""), (3, ""), (2, "_offload"), (3, "_offload")])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_are_those_without_deepspeed(task, tuning, stage, variant):
    expected = losses("none", task, tuning, 0)
    assert len(expected) == STEPS and len(set(expected)) > 1
    assert losses("lite", task, tuning, stage, variant) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_in_bf16(task, tuning, stage):
    expected = losses("none", task, tuning, 0, bf16=True)
    assert losses("lite", task, tuning, stage, bf16=True) == pytest.approx(expected, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_are_the_real_deepspeed_s(task, tuning, stage):
    if not os.environ.get("DSL_PEER_PYTHON"):
        pytest.skip("needs the real DeepSpeed, whose Python DSL_PEER_PYTHON names")
    assert losses("lite", task, tuning, stage) == pytest.approx(losses("peer", task, tuning, stage), rel=2e-5)


# --- saving -----------------------------------------------------------------------------------------------------------

# Compares folders of safetensors, with what only LLaMA-Factory's environment has; prints the largest difference.
COMPARE = """
import sys
from pathlib import Path
from safetensors.torch import load_file

def weights(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found

mine, other = map(weights, sys.argv[1:])
assert mine and mine.keys() == other.keys(), mine.keys() ^ other.keys()
print(max((mine[name].float() - other[name].float()).abs().max().item() for name in mine))
"""
# What a merged model is, by the definition of LoRA: prints how far it is off, and how far from the base alone.
MERGED = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file

base, adapter, merged = (load_file(next(Path(folder).glob("*.safetensors"))) for folder in sys.argv[1:])
settings = json.loads(Path(sys.argv[2], "adapter_config.json").read_text())
scale, apart, moved = settings["lora_alpha"] / settings["r"], 0.0, 0.0
for name, value in merged.items():
    stem = "base_model.model." + name.removesuffix(".weight")
    down, up = adapter.get(stem + ".lora_A.weight"), adapter.get(stem + ".lora_B.weight")
    expected = base[name] if down is None else base[name] + scale * up @ down
    apart = max(apart, (value.float() - expected).abs().max().item())
    moved = max(moved, (value.float() - base[name]).abs().max().item())
print(json.dumps([apart, moved]))
"""


def said(script: str, *folders: Path) -> Any:
    """What one of these prints."""
    command = [needed_python(), "-c", script, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def trained(engine: str, tuning: str, stage: int, folder: Path, **more: Any) -> list[float]:
    """The losses of a supervised training that leaves its files in a folder."""
    job: dict[str, Any] = {"task": "sft", "tuning": tuning, "stage": stage, "dir": str(folder), **more}
    folder.mkdir(exist_ok=True)
    return run("llamafactory", engine, python=needed_python(), steps=STEPS, **job)["losses"]


@pytest.mark.parametrize("tuning, stage", [("lora", 3), ("full", 2), ("full", 3)])
def test_it_saves_and_resumes(tuning, stage, tmp_path):
    """By `save_steps` and `resume_from_checkpoint`; the model at the end is the real DeepSpeed's, where that is."""
    half = STEPS // 2
    whole = trained("lite", tuning, stage, tmp_path, save_steps=half)
    model, checkpoint = tmp_path / "saved", tmp_path / "saved" / f"checkpoint-{half}"
    assert (checkpoint / "latest").read_text() == f"global_step{half}"
    assert (checkpoint / f"global_step{half}" / "manifest.json").is_file()
    again = trained("lite", tuning, stage, tmp_path / "again", resume=str(checkpoint))
    assert again == pytest.approx(whole[half:], rel=1e-6)
    assert said(COMPARE, tmp_path / "again" / "saved", model) < 1e-6
    if os.environ.get("DSL_PEER_PYTHON"):
        assert trained("peer", tuning, stage, tmp_path / "peer", save_steps=half) == pytest.approx(whole, rel=2e-5)
        assert said(COMPARE, tmp_path / "peer" / "saved", model) < 2e-4
        assert said(COMPARE, tmp_path / "peer" / "saved" / checkpoint.name, checkpoint) < 2e-4


def test_it_saves_the_model_alone(tmp_path):
    """By `save_only_model`: whole weights, nothing of the engine's."""
    trained("lite", "full", 3, tmp_path, save_steps=STEPS, save_only_model=True)
    checkpoint = tmp_path / "saved" / f"checkpoint-{STEPS}"
    assert not (checkpoint / "latest").exists() and not list(checkpoint.glob("global_step*"))
    assert said(COMPARE, checkpoint, tmp_path / "saved") == 0.0


@pytest.mark.parametrize("engine", ["lite", "peer"])
def test_it_merges_and_exports_an_adapter(engine, tmp_path):
    """By its command, `llamafactory-cli export`."""
    if engine == "peer" and not os.environ.get("DSL_PEER_PYTHON"):
        pytest.skip("needs the real DeepSpeed, whose Python DSL_PEER_PYTHON names")
    trained(engine, "lora", 3, tmp_path)
    base, adapter, merged = tmp_path / "prepared", tmp_path / "saved", tmp_path / "merged"
    settings = {"model_name_or_path": base, "adapter_name_or_path": adapter, "export_dir": merged}
    settings |= {"template": "default", "finetuning_type": "lora", "infer_dtype": "float32"}
    (tmp_path / "export.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    (tmp_path / "torchaudio.py").touch()  # as in the trainings; its builds on PyPI want CUDA libraries
    where = environment("none")
    where |= {"DISABLE_VERSION_CHECK": "1", "PYTHONPATH": str(tmp_path)}
    command = [str(Path(needed_python()).parent / "llamafactory-cli"), "export", str(tmp_path / "export.yaml")]
    done = subprocess.run(command, env=where, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    apart, moved = said(MERGED, base, adapter, merged)
    assert apart < 1e-6 < 1e-4 < moved
