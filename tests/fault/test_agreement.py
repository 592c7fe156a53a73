"""Ranks that are not configured alike: one error on all of them, before anything is built, that says what differs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from programs import needs

import deepspeedlite
from deepspeedlite.comm import Group
from deepspeedlite.config import ConfigError, load_config
from deepspeedlite.config.agreement import must_agree
from deepspeedlite.preflight.verify_model import load_alike
from deepspeedlite.runtime.errors import DistributedError

BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4}},
}


def changed(**sections):
    return {**BASE, **sections}


# What rank 1 has instead, and what every rank is told.
DIFFERENT = {
    "lr": (
        changed(optimizer={"type": "SGD", "params": {"lr": 0.5}}),
        "optimizer.params.lr is 0.1 on rank 0 and 0.5 on",
    ),
    "decay": (
        changed(optimizer={"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.1}}),
        "optimizer.params.weight_decay is not there on rank 0 and 0.1 on rank 1",
    ),
    "type": (
        changed(optimizer={"type": "Adam", "params": {"lr": 0.1}}),
        'optimizer.type is "SGD" on rank 0 and "Adam"',
    ),
    "clip": (changed(gradient_clipping=0.5), "gradient_clipping is 1 on rank 0 and 0.5 on rank 1"),
    "schedule": (
        changed(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 5}}),
        "scheduler.params.warmup_num_steps is 4 on rank 0 and 5 on rank 1",
    ),
    "accumulation": (
        changed(gradient_accumulation_steps=2),
        "gradient_accumulation_steps is null on rank 0 and 2 on",
    ),
    "stage": (changed(zero_optimization={"stage": 3}), "zero_optimization.stage is 0 on rank 0 and 3 on rank 1"),
    "bucket": (changed(zero_optimization={"reduce_bucket_size": 9}), "zero_optimization.reduce_bucket_size is null on"),
    "dtype": (changed(bf16={"enabled": True}), "bf16.enabled is false on rank 0 and true on rank 1"),
    "a fault": (changed(gradient_clipping="high"), "rank 1: configuration: 1 fault\n  - gradient_clipping"),
    "several": (
        changed(gradient_clipping=0.5, gradient_accumulation_steps=2),
        "gradient_accumulation_steps is null on rank 0 and 2 on rank 1 (and so do gradient_clipping)",
    ),
}


@distributed(world_size=2)
def test_one_error_on_every_rank():
    """All in one go: an error that not every rank raised would leave the next comparison to hang."""
    for name, (other, said) in DIFFERENT.items():
        config = other if dist.get_rank() else BASE
        with pytest.raises(ConfigError) as caught:
            deepspeedlite.initialize(model=torch.nn.Linear(4, 1), config=config)
        assert said in str(caught.value), name


MAY_DIFFER = {
    "steps_per_print": [1, 5],
    "wall_clock_breakdown": [False, True],
    "dump_state": [True, False],
    "csv_monitor": [{"enabled": False}, {"enabled": False, "job_name": "b"}],
    "tensorboard": [{}, {"output_path": "elsewhere"}],
    "comms_logger": [{"enabled": True}, {"enabled": False}],
    "aio": [{}, {"block_size": 4096}],
    "timers": [{}, {"throughput": {"enabled": False}}],
    "memory_breakdown": [False, True],
    "fp16": [{"enabled": False}, {"enabled": False, "loss_scale": 128}],
    "optimizer": [BASE["optimizer"], {"params": {"lr": 0.1}, "type": "SGD"}],
    "gradient_predivide_factor": [1, 1.0],
}


@needs("c++")
@distributed(world_size=2)
def test_what_may_differ(tmp_path):
    rank = dist.get_rank()
    offload = {"device": "nvme", "nvme_path": str(tmp_path / f"drive{rank}")}
    (tmp_path / f"drive{rank}").mkdir()
    config = {**BASE, **{name: values[rank] for name, values in MAY_DIFFER.items()}}
    config["zero_optimization"] = {"stage": 3, "offload_optimizer": offload}
    engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(4, 1), config=config)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    assert engine.global_steps == 1
    deepspeedlite.comm.comms_logger.enabled = False


def handed(lr=0.1, cls=torch.optim.SGD, groups=None, **options):
    """What `initialize` is handed: a layer and an optimizer over it."""
    layer = torch.nn.Linear(4, 1)
    params = layer.parameters() if groups is None else [{"params": [dict(layer.named_parameters())[n]]} for n in groups]
    return {"model": layer, "optimizer": cls(params, lr=lr, **options)}


def with_schedule(gamma):
    given = handed()
    return {**given, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(given["optimizer"], gamma)}


def with_frozen_bias(frozen):
    given = handed()
    given["model"].bias.requires_grad_(not frozen)
    return given


OPTIMIZERS = {
    "rate": (handed, lambda: handed(0.2), "optimizer.param_groups[0].lr is 0.1 on rank 0 and 0.2 on rank 1"),
    "class": (handed, lambda: handed(cls=torch.optim.Adagrad), "optimizer is SGD on rank 0 and Adagrad on rank 1"),
    "decay": (handed, lambda: handed(weight_decay=0.5), "optimizer.param_groups[0].weight_decay is 0 on rank 0 and"),
    "groups": (
        lambda: handed(groups=["weight", "bias"]),
        lambda: handed(groups=["bias", "weight"]),
        "the optimizer's group of weight is 0 on rank 0 and 1 on rank 1",
    ),
    "schedule": (lambda: with_schedule(0.5), lambda: with_schedule(0.9), "lr_scheduler.gamma is 0.5 on rank 0 and 0.9"),
    "model_parameters": (
        lambda: {"model": (m := torch.nn.Linear(4, 1)), "model_parameters": m.parameters()},
        lambda: {"model": (m := torch.nn.Linear(4, 1)), "model_parameters": [m.weight]},
        "the optimizer's group of bias is 0 on rank 0 and not there on rank 1",
    ),
}


@distributed(world_size=2)
def test_optimizers_that_are_handed_over():
    for name, (first, second, said) in OPTIMIZERS.items():
        with pytest.raises(ConfigError) as caught:
            deepspeedlite.initialize(**(second if dist.get_rank() else first)(), config=BASE)
        assert said in str(caught.value), name
    with pytest.raises(
        DistributedError, match=r"bias is \(1,\) torch\.float32 trained on rank 0 and \(1,\) torch\.float32 on rank 1"
    ):
        deepspeedlite.initialize(**with_frozen_bias(dist.get_rank() == 1), config=BASE)


@distributed(world_size=4)
def test_ranks_are_named():
    config = {**BASE, "gradient_clipping": 0.5 if dist.get_rank() in (1, 3) else 1.0}
    with pytest.raises(ConfigError, match=r"is 1 on ranks 0, 2 and 0.5 on ranks 1, 3;"):
        deepspeedlite.initialize(model=torch.nn.Linear(4, 1), config=config)


@distributed(world_size=2)
def test_the_comparison_takes_no_time():
    """5 ms are what it may cost; the least of several, since the machine may be busy."""
    settings, world = load_config(BASE), Group()
    took = []
    for _ in range(15):
        dist.barrier()
        start = time.perf_counter()
        assert load_alike(lambda: settings, world) is settings
        took.append(time.perf_counter() - start)
    assert min(took) < 0.005, took


def test_objects_and_order_are_no_difference():
    """An object stands for its class (its address differs on every rank), and the order of keys means nothing."""
    one, other = ({"optimizer": {"type": "SGD", "params": {"lr": 1, "what": object()}}} for _ in range(2))
    first, second = (must_agree(load_config(source, handed=["optimizer"])) for source in (one, other))
    assert first == second
    assert first["optimizer.params.lr"] == "1"
