"""Checkpoints between the real DeepSpeed and this: both read the other's exactly, and the losses go on as they would.

In fp32 the losses of both agree to 1e-5 of their value, in 16 bit to 2e-3: gradients are summed in another order.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ds_peer import CLIENT_STATE, STATES, Job, configuration, peer_model, run_peer, train
from harness import distributed
from pairwise import covering

import deepspeedlite
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed.pickles import load_inert
from deepspeedlite.compat.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("DSL_PEER_PYTHON"),
        reason="needs DSL_PEER_PYTHON: the Python of an environment with DeepSpeed",
    ),
]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("plain", "mixed")
# At stage 0 the files of each are different; above, any two of a kind's properties meet.
KINDS = [(dtype, 0, variant) for dtype in TOLERANCE for variant in VARIANTS]
KINDS += covering({"dtype": TOLERANCE, "stage": (1, 2, 3), "variant": VARIANTS}, 2)
OTHERS = {
    "bf16.2.sgd.plain": ({"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}, ["momentum_buffer"]),
    "bf16.2.adagrad.plain": ({"type": "Adagrad", "params": {"lr": 0.01}}, ["sum"]),
}
# With it DeepSpeed's own functions read other parameters' masters and states: the weights and losses are compared.
ROUND_ROBIN = configuration(2, "bf16", zero_optimization={"stage": 2, "round_robin_gradients": True})
NEEDS_GROUPS = ("fp32", 0, "mixed")  # DeepSpeed's file does not say which parameter a state belongs to


def name_of(dtype, stage, variant):
    return f"{dtype}.{stage}.{variant}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """DeepSpeed's checkpoints of all kinds and what it told about them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    jobs = [Job(name_of(d, s, v), configuration(s, d), v, save=str(folder / name_of(d, s, v))) for d, s, v in KINDS]
    separate = configuration(1, "bf16", data_types={"grad_accum_dtype": "fp32"})  # another optimizer of DeepSpeed's
    jobs.append(Job("bf16.1.separate", separate, "mixed", save=str(folder / "bf16.1.separate")))
    elastic = configuration(2, "bf16", zero_optimization={"stage": 2, "elastic_checkpoint": True})
    jobs.append(Job("bf16.2.elastic", elastic, "mixed", save=str(folder / "bf16.2.elastic")))
    old_format = configuration(3, "bf16", checkpoint={"checkpoint_serialization": False})
    jobs.append(Job("bf16.3.unzipped", old_format, "mixed", save=str(folder / "bf16.3.unzipped")))
    for stage in (2, 3):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        offloaded = configuration(stage, "bf16", zero_optimization=zero, zero_force_ds_cpu_optimizer=False)
        jobs.append(Job(f"bf16.{stage}.offload", offloaded, "mixed", save=str(folder / f"bf16.{stage}.offload")))
    for name, (section, states) in OTHERS.items():
        config = configuration(2, "bf16", optimizer=section, zero_allow_untested_optimizer=True)
        jobs.append(Job(name, config, "plain", save=str(folder / name), states=states))
    jobs.append(Job("bf16.2.robin", ROUND_ROBIN, "mixed", save=str(folder / "bf16.2.robin")))
    run_peer(folder, jobs)
    return folder


def states_of(engine):
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[f"master {name}"] = safe_get_full_fp32_param(param)
            found.update({f"{kind} {name}": safe_get_full_optimizer_state(param, kind) for kind in STATES})
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def engine_of(variant, config, seed=1):
    model, groups = peer_model(variant, seed)
    return deepspeedlite.initialize(model=model, model_parameters=groups, config=config)[0]


def test_all_that_is_in_them_is_read_to_the_bit(saved, tmp_path):
    names = [name_of(*kind) for kind in KINDS if kind != NEEDS_GROUPS]
    names += ["bf16.1.separate", "bf16.2.elastic", "bf16.3.unzipped", "bf16.2.offload", "bf16.3.offload", *OTHERS]
    for name in names:
        expected = torch.load(saved / f"{name}.out")["tensors"]
        assert command(["import", str(saved / name), str(tmp_path / name)]) == 0
        assert command(["verify", str(tmp_path / name)]) == 0
        assert command(["diff", str(saved / name), str(tmp_path / name)]) == 0
        for folder in (saved, tmp_path):
            with open_checkpoint(folder / name) as reader:
                pairs = {key: key.split(" ") for key in expected}
                found = {key: reader.read(reader.parameters[n], kind) for key, (kind, n) in pairs.items()}
                assert_same(found, {key: value.flatten() for key, value in expected.items()})
                assert reader.parameters["embedding.weight"].tied == ["head.weight"]
                assert [p.name for p in reader.manifest.parameters if p.buffer] == ["temperature"]
                frozen = [p.name for p in reader.manifest.parameters if not p.trainable and not p.buffer]
                assert frozen == ([] if "plain" in name else ["up.0.weight", "norm.bias"])
                client = reader.state("client_state")
                assert client.keys() == CLIENT_STATE.keys() and torch.equal(client["noise"], CLIENT_STATE["noise"])
        weights = get_fp32_state_dict_from_zero_checkpoint(str(saved / name))
        masters = {key.split(" ")[1]: value for key, value in expected.items() if key.startswith("master ")}
        assert_same({key: weights[key] for key in masters}, masters)
        assert torch.equal(weights["head.weight"], weights["embedding.weight"])
        if "plain" not in name:
            initial = peer_model("mixed")[0].up[0].weight.detach()
            assert torch.equal(weights["up.0.weight"], initial.to(TORCH_DTYPES[name[:4]]).float())


@distributed(world_size=2, timeout_s=300)
def test_training_goes_on_at_every_stage(saved: Path):
    rank = dist.get_rank()
    for dtype, stage, variant in KINDS:
        expected = torch.load(saved / f"{name_of(dtype, stage, variant)}.out")
        for other in {stage, (stage + 1) % 4, (stage + 2) % 4}:
            engine = engine_of(variant, configuration(other, dtype))
            path, client = engine.load_checkpoint(saved / name_of(dtype, stage, variant))
            assert path is not None and client["epoch"] == 3 and client["note"] == ["a", (1, 2.5)]
            assert engine.global_steps == 3 and engine.global_samples == 24
            assert_same(states_of(engine), expected["tensors"])
            losses = train(engine, [3, 6])
            assert losses == pytest.approx(expected["more_losses"][rank], rel=TOLERANCE[dtype]), (dtype, stage, other)
            assert engine.get_lr() == pytest.approx(expected["lr"])
            engine.destroy()


@distributed(world_size=2)
def test_other_optimizers_go_on(saved: Path):
    for name, (section, _) in OTHERS.items():
        expected = torch.load(saved / f"{name}.out")["more_losses"][dist.get_rank()]
        engine = engine_of("plain", configuration(1, "bf16", optimizer=section))
        engine.load_checkpoint(saved / name)
        assert train(engine, [3, 6]) == pytest.approx(expected, rel=TOLERANCE["bf16"]), name
        engine.destroy()


@distributed(world_size=2)
def test_parameters_that_were_dealt_out_come_back(saved: Path):
    expected = torch.load(saved / "bf16.2.robin.out")
    with open_checkpoint(saved / "bf16.2.robin") as reader:
        weights = load_inert(reader.path / "mp_rank_00_model_states.pt")["module"]
        found = {p.name: reader.read(p, "weight").view(p.shape) for p in reader.manifest.parameters}
        assert_same(found, {name: weights[name] for name in found})
    engine = engine_of("mixed", configuration(1, "bf16"))
    engine.load_checkpoint(saved / "bf16.2.robin")
    assert train(engine, [3, 6]) == pytest.approx(expected["more_losses"][dist.get_rank()], rel=TOLERANCE["bf16"])


@distributed(world_size=3, timeout_s=300)
def test_other_numbers_of_ranks_load_them_too(saved: Path):
    for dtype, stage, variant in KINDS:
        engine = engine_of(variant, configuration((stage + 1) % 4, dtype))
        engine.load_checkpoint(saved / name_of(dtype, stage, variant))
        assert_same(states_of(engine), torch.load(saved / f"{name_of(dtype, stage, variant)}.out")["tensors"])
        engine.destroy()


@distributed(world_size=2, timeout_s=580)
def test_deepspeed_goes_on_from_what_is_exported(tmp_path):
    """Trained here at one stage, exported for another, and for one rank."""
    jobs, expected = [], {}
    kinds = [(d, s, v, configuration((s + 2) % 4, d), configuration(s, d)) for d, s, v in KINDS]
    for dtype, stage, variant, mine, theirs in [*kinds, ("bf16", 2, "mixed", ROUND_ROBIN, ROUND_ROBIN)]:
        name = name_of(dtype, stage, variant) + (".robin" if theirs is ROUND_ROBIN else "")
        engine = engine_of(variant, mine, seed=0)
        train(engine, [0, 3])
        engine.save_checkpoint(tmp_path / "ours" / name, client_state=CLIENT_STATE)
        tensors, losses = states_of(engine), [None, None]
        dist.all_gather_object(losses, train(engine, [3, 6]))
        engine.destroy()
        expected[name] = (tensors, losses, TOLERANCE[dtype])
        jobs.append(Job(name, theirs, variant, str(tmp_path / "out" / name), None, [3, 3], [3, 6], seed=1))
    if dist.get_rank() == 0:
        alone = [Job(f"{job.name}.alone", job.config, job.variant, f"{job.load}.alone", None, [3, 3]) for job in jobs]
        for job in jobs:
            source, stage = str(tmp_path / "ours" / job.name), str(job.config["zero_optimization"]["stage"])
            assert command(["export", source, job.load, "--stage", stage]) == 0
            assert command(["export", source, f"{job.load}.alone", "--stage", stage, "--world", "1"]) == 0
        answers = run_peer(tmp_path / "peer", jobs)
        answers |= run_peer(tmp_path / "peer1", alone, world=1)
        for name, (tensors, losses, tolerance) in expected.items():
            assert answers[name]["client_state"].keys() == CLIENT_STATE.keys()
            if "robin" not in name:
                assert_same(answers[name]["tensors"], tensors)
                assert_same(answers[f"{name}.alone"]["tensors"], tensors)
            for mine, theirs in zip(losses, answers[name]["more_losses"]):
                assert theirs == pytest.approx(mine, rel=tolerance), name
    dist.barrier()


@distributed(world_size=2, timeout_s=580)
def test_deepspeed_goes_on_from_what_is_saved_in_its_layout(tmp_path):
    """By `checkpoint.format: deepspeed`; what its own functions then take out of the files is compared too."""
    jobs, expected, masters = [], {}, {}
    for dtype, stage, variant in KINDS:
        name, config = name_of(dtype, stage, variant), configuration(stage, dtype)
        engine = engine_of(variant, {**config, "checkpoint": {"format": "deepspeed"}}, seed=0)
        train(engine, [0, 3])
        engine.save_checkpoint(tmp_path / name, client_state=CLIENT_STATE)
        tensors, losses = states_of(engine), [None, None]
        dist.all_gather_object(losses, train(engine, [3, 6]))
        engine.destroy()
        expected[name] = (tensors, losses, TOLERANCE[dtype])
        if stage > 0:
            masters[name] = {key[7:]: value for key, value in tensors.items() if key.startswith("master ")}
        jobs.append(Job(name, config, variant, str(tmp_path / name), None, [3, 3], [3, 6], seed=1))
    if dist.get_rank() == 0:
        for name, answer in run_peer(tmp_path / "peer", jobs).items():
            tensors, losses, tolerance = expected[name]
            assert answer["client_state"].keys() == CLIENT_STATE.keys()
            assert_same(answer["tensors"], tensors)
            for mine, theirs in zip(losses, answer["more_losses"]):
                assert theirs == pytest.approx(mine, rel=tolerance), name
        code = (
            "import sys, torch\n"
            "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as get\n"
            "folder = sys.argv[1]\n"
            "found = {name: get(f'{folder}/{name}') for name in sys.argv[2:]}\n"
            "torch.save(found, f'{folder}/fp32.pt')"
        )
        python = os.environ["DSL_PEER_PYTHON"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [python, "-c", code, str(tmp_path), *masters], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for name, weights in torch.load(tmp_path / "fp32.pt").items():
            assert_same({key: weights[key] for key in masters[name]}, masters[name])
    dist.barrier()


@distributed(world_size=2, timeout_s=580)
def test_groups_that_fused_adam_flattens(tmp_path):
    """At stage 0 DeepSpeed's files depend on whether its optimizer is its FusedAdam, which its environment compiles."""
    jobs = []
    for dtype in TOLERANCE:
        config = configuration(0, dtype)
        del config["optimizer"]["params"]["torch_adam"]
        jobs.append(Job(dtype, config, "mixed", save=str(tmp_path / "theirs" / dtype)))
    answers: list = [run_peer(tmp_path / "peer", jobs) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answers)
    for job in jobs:
        expected = answers[0][job.name]
        engine = engine_of("mixed", {**job.config, "zero_optimization": {"stage": 2}})
        engine.load_checkpoint(job.save)
        assert_same(states_of(engine), expected["tensors"])
        engine.save_checkpoint(tmp_path / "ours" / job.name)
        losses = train(engine, [3, 6])
        assert losses == pytest.approx(expected["more_losses"][dist.get_rank()], rel=TOLERANCE[job.name])
        engine.destroy()
    if dist.get_rank() == 0:
        again = [Job(j.name, j.config, "mixed", str(tmp_path / "out" / j.name), None, [3, 3], [3, 6], 1) for j in jobs]
        for job in again:
            assert command(["export", str(tmp_path / "ours" / job.name), job.load, "--stage", "0"]) == 0
        for name, answer in run_peer(tmp_path / "peer2", again).items():
            assert_same(answer["tensors"], answers[0][name]["tensors"])
            for mine, theirs in zip(answers[0][name]["more_losses"], answer["more_losses"]):
                assert theirs == pytest.approx(mine, rel=TOLERANCE[name])
    dist.barrier()
