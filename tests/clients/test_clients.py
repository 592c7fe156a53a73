"""Clients of DeepSpeed on deepspeedlite: losses of their own data parallelism, checkpoints, resuming, saved models.

`make test-clients` runs these in an environment with the clients' packages; elsewhere they skip by name. Each training
is two processes of a script, see drive.py. With DSL_PEER_PYTHON the same scripts run on the real DeepSpeed too, and
losses are compared with its.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from drive import run

CLIENTS = {
    "trainer": ("transformers", "accelerate"),
    "accelerate": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "fabric": ("lightning",),
    "peft": ("transformers", "accelerate", "peft"),
    "trl": ("transformers", "accelerate", "trl", "datasets"),
}
STEPS = 6
pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(900)]


def need(client: str) -> None:
    missing = [name for name in CLIENTS[client] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-clients makes an environment that has them")


@functools.cache
def trained(client: str, engine: str, stage: int, bf16: bool = False) -> dict[str, Any]:
    """What a plain training reports, done once for all tests that ask."""
    return run(client, engine, stage=stage, steps=STEPS, bf16=bf16)


def close(ours: list[float], theirs: list[float], relative: float) -> None:
    assert len(ours) == len(theirs) and ours == pytest.approx(theirs, rel=relative)


WHOLE = ("trainer", "accelerate", "lightning", "fabric")
WHERE_IT_APPLIES = [*((client, stage) for client in WHOLE for stage in range(4)), ("peft", 3), ("trl", 2), ("trl", 3)]


@pytest.mark.parametrize("client, stage", WHERE_IT_APPLIES)
def test_losses_are_those_without_deepspeed(client, stage):
    need(client)
    ours, plain = trained(client, "lite", stage), trained(client, "none", 0)
    close(ours["losses"], plain["losses"], 2e-5)
    for what in ("evaluated", "reloaded", "generated", "unwrapped"):
        if isinstance(plain.get(what), float):
            assert ours[what] == pytest.approx(plain[what], rel=2e-5)
        else:
            assert ours.get(what) == plain.get(what)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_trl_s_preferences_and_rewards(task, stage, tmp_path):
    """By a configuration of "auto" throughout, on a model that `from_pretrained` loads where TRL shards it."""
    need("trl")
    job = {"steps": 4, "task": task, "auto": True, "pretrained": str(tmp_path / "model")}
    plain = run("trl", "none", stage=0, **job)
    assert len(set(plain["losses"])) == 4
    close(run("trl", "lite", stage=stage, **job)["losses"], plain["losses"], 2e-5)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("client", ["trainer", "accelerate", "lightning", "fabric"])
def test_a_resumed_run_equals_the_uninterrupted_one(client, stage, tmp_path):
    """Through the client's own checkpoint, in files where it looks for them. Lightning's equals its own resumed run."""
    need(client)
    half = STEPS // 2
    where = tmp_path / "state.ckpt"
    if client == "trainer":
        first = run(client, "lite", stage=stage, steps=STEPS, ds_optimizer=True, dir=str(tmp_path), save_steps=half)
        resume = tmp_path / f"checkpoint-{half}"
        assert (resume / "latest").read_text() == f"global_step{half}"
        assert (resume / f"global_step{half}" / "manifest.json").is_file()
        again = run(
            client, "lite", stage=stage, steps=STEPS, ds_optimizer=True, dir=str(tmp_path / "b"), resume=str(resume)
        )
    else:
        first = run(client, "lite", stage=stage, steps=STEPS, save_at=half, save=str(where))
        again = run(client, "lite", stage=stage, steps=STEPS, save_at=half, resume=str(where))
    if client == "lightning":  # which draws its second epoch's data anew when it resumes: what it does by itself counts
        ddp = str(tmp_path / "ddp.ckpt")
        run(client, "none", stage=0, steps=STEPS, save_at=half, save=ddp)
        first = run(client, "none", stage=0, steps=STEPS, save_at=half, resume=ddp)
    close(again["losses"][-half:], first["losses"][-half:], 2e-5 if client == "lightning" else 1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_saved_models_are_whole(stage, tmp_path):
    """The Trainer's model and PEFT's adapter, saved from a sharded run, are those of a run without DeepSpeed."""
    need("peft")
    from safetensors.torch import load_file

    for client, name in (("trainer", "model.safetensors"), ("peft", "adapter_model.safetensors")):
        files = []
        for engine in ("none", "lite"):
            folder = tmp_path / client / engine
            run(client, engine, stage=stage, steps=3, save_model=str(folder))
            files.append(load_file(Path(folder, name)))
        assert files[0].keys() == files[1].keys()
        for key, value in files[0].items():
            assert files[1][key].shape == value.shape
            assert (files[1][key] - value).abs().max() < 2e-4, key


@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_and_bf16(stage):
    """Accelerate counts micro-batches itself and tells the engine; in bf16 the losses stay within its precision."""
    need("accelerate")
    plain = run("accelerate", "none", stage=0, steps=STEPS, accumulation=2)
    close(run("accelerate", "lite", stage=stage, steps=STEPS, accumulation=2)["losses"], plain["losses"], 2e-5)
    close(run("fabric", "lite", stage=stage, steps=STEPS, bf16=True)["losses"],
          run("fabric", "none", stage=0, steps=STEPS)["losses"], 2e-2)  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("client, stage", WHERE_IT_APPLIES)
def test_losses_are_the_real_deepspeed_s(client, stage, bf16):
    """In no more memory, too; a tiny model's says little, nor do its times: see benchmarks/clients.py.

    In bf16 DeepSpeed's stage 0 has no fp32 masters, its other stages and all of ours have.
    """
    need(client)
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    ours, theirs = trained(client, "lite", stage, bf16), trained(client, "peer", max(stage, int(bf16)), bf16)
    close(ours["losses"], theirs["losses"], 5e-3 if bf16 else 2e-5)
    assert ours["peak_rss_bytes"] <= 1.02 * theirs["peak_rss_bytes"]


@pytest.mark.parametrize("way, stage, gathers", [
    *(("accelerate", stage, True) for stage in range(4)),
    ("trainer", 0, True), ("trainer", 3, True), ("trainer", 3, False), ("peft", 2, True), ("peft", 3, True),
])  # fmt: skip
def test_the_documented_ways_of_saving(way, stage, gathers, tmp_path):
    """With a persistence threshold of 0, on ranks that save and ranks that ask only: none waits for long."""
    need("peft")
    found = run("saving", "lite", stage=stage, way=way, gathers=gathers, dir=str(tmp_path))
    assert all(seconds < 60 for times in found["times_s"] for seconds in times.values()), found["times_s"]
    weights = {name.removesuffix(".default"): value for name, value in found["state"].items()}
    if way == "accelerate":
        assert found["pretrained"] == found["saved"] == {n: weights[n] for n in found["saved"]}
        assert weights.keys() - found["saved"].keys() == {"lm_head.weight"}  # tied
        assert found["again"] == pytest.approx(found["losses"][2:], rel=1e-6)
    elif not gathers:
        assert not found["saved"] and "latest" in found["folders"]
    else:
        assert found["saved"] == found["again"] and found["saved"]
        held = sorted(found["state"].values())
        assert all(any(value == pytest.approx(other) for other in held) for value in found["saved"].values())
