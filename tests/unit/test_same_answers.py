"""What DeepSpeed's functions return and log, where scripts use it: by what 0.19.8 was seen to do."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.distributed as dist
from deepspeedlite.utils.timer import ThroughputTimer
from harness import distributed
from models import tied_model, tokens
from pipe_models import layers, loss_fn

import deepspeedlite
from deepspeedlite import utils
from deepspeedlite.accelerator import get_accelerator
from deepspeedlite.pipe import PipelineModule
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.log import logger


def nested() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"first": torch.nn.Sequential(torch.nn.ReLU()), "second": torch.nn.Linear(2, 2)})


def test_leaf_modules_by_name_return_also_what_was_not_found():
    model = nested()
    by_name = utils.set_z3_leaf_modules_by_name
    assert by_name(model, ["second", "x"], raise_if_not_found=False) == ([model["second"]], ["x"])
    assert utils.get_z3_leaf_modules(model) == [model["second"]]
    assert by_name(model, ["second"], False) == ([model["second"]], [])
    assert utils.get_z3_leaf_modules(model) == []
    with pytest.raises(ValueError, match="called x"):
        by_name(model, ["second", "x"])


def test_leaf_modules_by_suffix_return_also_what_was_not_found():
    model = nested()
    by_suffix = utils.set_z3_leaf_modules_by_suffix
    assert by_suffix(model, ["cond", "x"], raise_if_not_found=False) == ([model["second"]], ["x"])
    assert by_suffix(model, ["cond"], False) == ([model["second"]], [])
    assert utils.get_z3_leaf_modules(model) == []
    with pytest.raises(ConfigError, match="ends in x"):
        by_suffix(model, ["first", "x"])


@distributed(world_size=1)
def test_the_engines_throughput_timer_counts_epochs():
    """DeepSpeed-Chat tells it of each epoch, before it saves."""
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW"}}
    engine = deepspeedlite.initialize(model=tied_model(), config=config)[0]
    for step in range(6):
        engine.backward(engine(*tokens(step, 0, 0)))
        engine.step()
    timer = engine.tput_timer
    assert (timer.epoch_count, timer.micro_step_count, timer.global_step_count, timer.batch_size) == (0, 6, 3, 8)
    timer.update_epoch_count()
    assert (timer.epoch_count, timer.micro_step_count, timer.global_step_count) == (1, 0, 3)
    assert timer.avg_samples_per_sec() > 0


def test_a_throughput_timer_of_ones_own():
    said: list[str] = []
    timer = ThroughputTimer(None, batch_size=4, start_step=1, steps_per_output=2, logging_fn=said.append)
    for _ in range(4):
        timer.start()
        timer.stop(global_step=True)
    timer.start()
    timer.stop()  # a micro-step alone, which is what leaving global_step out means
    assert timer.global_step_count == 4 and timer.micro_step_count == 5 and len(said) == 2


@distributed(world_size=2)
def test_a_pipeline_logs_loss_and_speed():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: dist.get_rank() in getattr(record, "ranks", ()))
    logger.addHandler(handler)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    model = PipelineModule(layers(tied=False), num_stages=2, loss_fn=loss_fn)
    engine = deepspeedlite.initialize(model=model, config=config)[0]
    losses = [float(engine.train_batch(iter([tokens(step, micro, 0) for micro in range(2)]))) for step in range(5)]
    logger.removeHandler(handler)
    found = [re.fullmatch(r"steps: (\d+) loss: (\S+) iter time \(s\): (\S+) samples/sec: (\S+)", line) for line in said]
    lines = [match.groups() for match in found if match]
    if dist.get_rank() > 0:
        assert lines == []
        return
    assert [(int(step), loss) for step, loss, *_ in lines] == [(n, f"{losses[n - 1]:.4f}") for n in (2, 4)]
    for *_, seconds, speed in lines:
        assert f"{8 / float(speed):.3f}" == seconds


@pytest.mark.parametrize("name, level", [("warning", logging.WARNING), ("DEBUG", logging.DEBUG)])
@distributed(world_size=1)
def test_log_level(name, level):
    before = logger.level
    try:
        config = {"train_batch_size": 4, "log_level": name}
        engine = deepspeedlite.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
        assert logger.level == level and engine.log_level() == name
    finally:
        logger.setLevel(before)
    with pytest.raises(ConfigError, match="loud"):
        deepspeedlite.initialize(model=torch.nn.Linear(2, 2), config={"train_batch_size": 4, "log_level": "loud"})


def test_host_memory_of_the_accelerator():
    one = get_accelerator()
    made = one.pin_empty(2, 3, dtype=torch.float16)
    assert made.shape == (2, 3) and made.dtype == torch.float16 and made.device.type == "cpu"
    assert one.pin_empty((4, 1), dtype=torch.int8).shape == (4, 1)
    like = one.pin_empty_like(torch.ones(5), dtype=torch.bfloat16)
    assert like.shape == (5,) and like.dtype == torch.bfloat16
    assert one.unpin_memory(like) is None and one.pin_memory_alignment() == 1
    assert one.register_host_memory(0, 1) is False and one.unregister_host_memory(0) is None
    assert one.build_extension() is torch.utils.cpp_extension.BuildExtension
    assert one.prefer_triton_grouped_mm() is False


def test_a_module_that_is_called_as_its_function_is():
    """Importing `utils.z3_leaf_module` puts the module where `utils` has a function of that name; both answer."""
    from deepspeedlite.utils.z3_leaf_module import z3_leaf_module

    from deepspeedlite.utils import z3_leaf_module as function

    layer = torch.nn.ReLU()
    utils.set_z3_leaf_module(layer, True)
    assert z3_leaf_module(layer) and function(layer) and utils.z3_leaf_module(layer)
