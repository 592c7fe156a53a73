"""Checkpoints load exactly at any world size and stage, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens
from pairwise import covering
from torch.optim import lr_scheduler as lr

import deepspeedlite
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

WORLDS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
PAIRS = [*itertools.product(WORLDS, STAGES)]
LOADS = {  # (world and stage that load, world and stage that have saved)
    "fp32": {(*loads, *saved) for loads in PAIRS for saved in PAIRS},
    "bf16": set(covering({"world": WORLDS, "stage": STAGES, "saved_world": WORLDS, "saved_stage": STAGES}, 2)),
}
DTYPES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}}}


def config(stage: int, dtype: str = "fp32", optimizer: str = "AdamW", **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 40},
        **DTYPES[dtype],
        **more,
    }


def engine_of(model, settings, **more):
    return deepspeedlite.initialize(model=model, config=settings, **more)[0]


def train(engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(*tokens(step, 0, dist.get_rank() if dist.is_initialized() else 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def everything(engine, states: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Masters and optimizer states of all parameters, whole; on every rank."""
    found = {f"weight {name}": value for name, value in engine.module_state_dict().items()}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[f"master {name}"] = safe_get_full_fp32_param(param)
            for state in states:
                found[f"{state} {name}"] = safe_get_full_optimizer_state(param, state)
    return {key: value.detach().clone() for key, value in found.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@distributed(world_size=4, init_process_group=False, timeout_s=240)
def test_all_pairs_of_world_sizes_and_stages(tmp_path, dtype):
    """In bf16 every two of the two worlds and stages meet."""
    me = int(os.environ["RANK"])

    def worlds(what):
        for world in (1, 2, 3, 4):
            if me < world:
                store = dist.FileStore(str(tmp_path / f"{what}{world}"), world)
                dist.init_process_group("gloo", store=store, rank=me, world_size=world)
                yield world
                dist.barrier()
                dist.destroy_process_group()

    states = ("exp_avg", "exp_avg_sq")
    for world in worlds("save"):
        for stage in range(4):
            engine = engine_of(tied_model(), config(stage, dtype))
            train(engine, range(10 * stage + world, 10 * stage + world + 2))
            expected = everything(engine, states)
            engine.save_checkpoint(tmp_path / "ckpt", tag=f"{world}.{stage}")
            if me == 0:
                torch.save(expected, tmp_path / f"expected{world}.{stage}")
            engine.destroy()
    for world in worlds("load"):
        for stage in range(4):
            engine = engine_of(tied_model(seed=1), config(stage, dtype))
            for saved_world, saved_stage in PAIRS:
                if (world, stage, saved_world, saved_stage) not in LOADS[dtype]:
                    continue
                tag = f"{saved_world}.{saved_stage}"
                while not (tmp_path / f"expected{tag}").exists():
                    pytest.fail(f"{tag} was not saved")
                path, _ = engine.load_checkpoint(tmp_path / "ckpt", tag=tag)
                assert path is not None and engine.global_steps == 2
                assert_same(everything(engine, states), torch.load(tmp_path / f"expected{tag}"))
                assert engine.module.head.weight is engine.module.embedding.weight
            engine.destroy()


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = torch.nn.Linear(8, 33), torch.nn.Linear(33, 1)
        self.norm = torch.nn.BatchNorm1d(33)

    def forward(self, x):
        noise = random.random() * 1e-2 + float(np.random.rand()) * 1e-2
        return self.lin2(torch.nn.functional.dropout(self.norm(self.lin1(x)), 0.3)).square().mean() + noise


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, stage):
    data = torch.utils.data.TensorDataset(torch.randn(64, 8, generator=torch.Generator().manual_seed(3)))
    settings = config(stage, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}})

    def start():
        torch.manual_seed(5)
        engine = engine_of(Dropping(), settings, training_data=data)
        torch.manual_seed(dist.get_rank())
        random.seed(dist.get_rank())
        np.random.seed(dist.get_rank())
        return engine

    def run(engine, until, on_step=lambda: None):
        losses = []
        while engine.global_steps < until:
            for (x,) in engine.training_dataloader:
                loss = engine(x)
                engine.backward(loss)
                engine.step()
                on_step()
                losses.append((loss.item(), engine.get_lr()[0]))
                if engine.global_steps >= until:
                    break
        return losses

    engine = start()
    saved = []

    def save_once():
        if engine.global_steps == 5:
            saved.append(engine.save_checkpoint(tmp_path, client_state={"note": [1, (2.5, None)], "t": torch.ones(2)}))

    whole = run(engine, 13, save_once)
    expected = everything(engine, ("exp_avg", "exp_avg_sq"))
    engine.destroy()
    resumed = start()
    torch.manual_seed(99)
    path, client = resumed.load_checkpoint(tmp_path)
    assert saved and path == str(tmp_path / "global_step5")
    assert client["note"] == [1, (2.5, None)] and torch.equal(client["t"], torch.ones(2))
    assert run(resumed, 13) == whole[5:]
    assert_same(everything(resumed, ("exp_avg", "exp_avg_sq")), expected)


OPTIMIZERS = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "Adagrad": ("sum",),
    "Lion": ("exp_avg",),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@distributed(world_size=2, timeout_s=120)
def test_every_optimizer_goes_on_as_it_was(tmp_path, dtype):
    for name, states in OPTIMIZERS.items():
        settings = config(2, dtype, name)
        if name == "SGD":
            settings["optimizer"]["params"]["momentum"] = 0.9
        engine = engine_of(tied_model(), settings)
        train(engine, range(3))
        engine.save_checkpoint(tmp_path, tag=name)
        losses = train(engine, range(3, 6))
        expected = everything(engine, states)
        settings["zero_optimization"]["stage"] = 1  # the same reductions, another owner of the gradients
        resumed = engine_of(tied_model(seed=1), settings)
        resumed.load_checkpoint(tmp_path, tag=name)
        assert train(resumed, range(3, 6)) == losses, name
        assert_same(everything(resumed, states), expected)
        engine.destroy(), resumed.destroy()


class Falling:
    """A function of LambdaLR's that has a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls)


def _plateau(optimizer):
    return lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def _sequence(optimizer):
    parts = [lr.LinearLR(optimizer, 0.1, 1.0, 3), lr.ExponentialLR(optimizer, 0.9)]
    return lr.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES = {
    **{
        name: {"type": name, "params": params}
        for name, params in {
            "WarmupLR": {"warmup_num_steps": 8},
            "WarmupDecayLR": {"warmup_num_steps": 2, "total_num_steps": 9},
            "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 9},
            "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 3, "decay_lr_rate": 0.1},
            "LRRangeTest": {"lr_range_test_step_size": 2},
        }.items()
    },
    "LambdaLR": lambda optimizer: lr.LambdaLR(optimizer, Falling()),
    "MultiStepLR": lambda optimizer: lr.MultiStepLR(optimizer, [2, 6, 6, 8]),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "OneCycleLR": lambda optimizer: lr.OneCycleLR(optimizer, 0.1, total_steps=12),
    "CyclicLR": lambda optimizer: lr.CyclicLR(optimizer, 0.01, 0.1, 3, cycle_momentum=False),
    "ReduceLROnPlateau": _plateau,
    "SequentialLR": _sequence,
    "ChainedScheduler": lambda optimizer: lr.ChainedScheduler(
        [lr.StepLR(optimizer, 2), lr.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@distributed(world_size=1)
def test_every_schedule_goes_on_as_it_was(tmp_path, name):
    schedule = SCHEDULES[name]

    def start():
        if isinstance(schedule, dict):
            return engine_of(tied_model(), config(1, scheduler=schedule))
        return engine_of(tied_model(), config(1), lr_scheduler=schedule)

    def run(engine, steps):
        rates = []
        for step in steps:
            engine.backward(engine(*tokens(step, 0, 0)))
            engine.step({"metrics": float(step % 3)} if name == "ReduceLROnPlateau" else None)
            rates.append(engine.optimizer.param_groups[0]["lr"])
        return rates

    engine = start()
    run(engine, range(4))
    engine.save_checkpoint(tmp_path)
    expected = run(engine, range(4, 10))
    resumed = start()
    resumed.load_checkpoint(tmp_path)
    assert run(resumed, range(4, 10)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_groups_frozen_parameters_and_adapters(tmp_path, stage):
    def start(seed):
        model = tied_model(seed)
        model.embedding.weight.requires_grad_(False)
        model.up[0].weight.requires_grad_(False)
        named = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": named[:3], "lr": 0.1}, {"params": named[3:], "lr": 0.01}]
        return engine_of(model, config(stage), model_parameters=groups)

    engine = start(0)
    train(engine, range(2))
    expected = everything(engine, ("exp_avg",))
    engine.save_checkpoint(tmp_path, tag="whole")
    engine.save_checkpoint(tmp_path, tag=7, exclude_frozen_parameters=True)
    other = start(1)
    frozen = other.module_state_dict()["embedding.weight"].clone()
    other.load_checkpoint(tmp_path, tag="7")
    assert torch.equal(other.module_state_dict()["embedding.weight"], frozen)
    other.load_checkpoint(tmp_path, tag="whole")
    assert_same(everything(other, ("exp_avg",)), expected)
    assert other.get_lr() == [0.1, 0.01]


@distributed(world_size=2)
def test_a_changed_model_is_told_at_once_and_the_rest_can_be_loaded(tmp_path):
    engine = engine_of(tied_model(), config(3))
    train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    changed = tied_model(seed=1)
    changed.up[0] = torch.nn.Linear(32, 12)
    changed.down[0] = torch.nn.Linear(12, 32)
    changed.norm = torch.nn.LayerNorm(32, bias=False)
    changed.extra = torch.nn.Linear(3, 3)
    other = engine_of(changed, config(3))
    before = everything(other, ())
    with pytest.raises(CheckpointError) as told:
        other.load_checkpoint(tmp_path)
    for name in (
        "up.0.weight has shape",
        "down.0.weight has",
        "norm.bias is in the checkpoint and",
        "extra.bias is in",
    ):
        assert name in str(told.value)
    assert_same(everything(other, ()), before)
    path, _ = other.load_checkpoint(tmp_path, load_module_strict=False)
    assert path and len(other.load_mismatches) == 6
    assert_same(
        {"w": safe_get_full_fp32_param(other.module.up[1].weight)},
        {"w": safe_get_full_fp32_param(engine.module.up[1].weight)},
    )


@distributed(world_size=2)
def test_parts_of_a_checkpoint(tmp_path):
    engine = engine_of(tied_model(), config(3, "bf16"))
    assert engine.load_checkpoint(tmp_path) == (None, {})
    with pytest.raises(CheckpointError, match=r"there is no checkpoint none in .*; it has none"):
        engine.load_checkpoint(tmp_path, tag="none")
    train(engine, range(2))
    expected = everything(engine, ())
    engine.save_checkpoint(tmp_path, client_sd={"epoch": 3}, save_latest=False)
    with pytest.raises(CheckpointError, match=r"has no file 'latest' .* has some: global_step2; pass one as tag"):
        engine.load_checkpoint(tmp_path)
    other = engine_of(tied_model(seed=1), config(1, "bf16"))
    _, client = other.load_checkpoint(tmp_path, tag="global_step2", load_module_only=True)
    assert client == {"epoch": 3} and other.global_steps == 0 and not other.optimizer.state
    assert_same(everything(other, ()), expected)
    third = engine_of(tied_model(seed=2), config(3, "bf16", "Lion"))
    with pytest.raises(CheckpointError, match="load_optimizer_states=False"):
        third.load_checkpoint(tmp_path, tag="global_step2")
    third.load_checkpoint(
        tmp_path,
        tag="global_step2",
        load_optimizer_states=False,
        custom_load_fn=lambda src, dst: dst.load_state_dict(src),
    )
    assert third.global_steps == 2
    weights = {key: value.float() for key, value in everything(third, ()).items() if key.startswith("weight")}
    assert_same(weights, {key: value.float() for key, value in expected.items() if key.startswith("weight")})
