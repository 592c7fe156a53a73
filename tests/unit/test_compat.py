"""The helpers, the accelerator, groups, timers and class names that scripts written for DeepSpeed import."""

from __future__ import annotations

import logging
import random
from collections import namedtuple
from pathlib import Path

import numpy
import pytest
import torch
from deepspeedlite.utils.timer import NoopTimer, SynchronizedWallClockTimer
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.compat.accelerator import DeepSpeedAccelerator, get_accelerator
from deepspeedlite.runtime import utils
from deepspeedlite.runtime.errors import ConfigError, DistributedError, EngineStateError, UnsupportedError
from deepspeedlite.utils import OnDevice, groups, instrument_w_nvtx


def test_seeds():
    """All three generators give the same numbers again."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    utils.set_random_seed(3)
    first = draw()
    utils.set_random_seed(3)
    assert draw() == first


def test_moving_nested_tensors():
    """Tensors are found at any depth and containers keep their kind; a criterion chooses."""
    pair = namedtuple("pair", "a b")
    item = {"x": [torch.ones(2), 3], "y": pair(torch.zeros(1), None), "z": (torch.arange(3),)}
    moved = utils.move_to_device(item, "meta")
    assert moved["x"][0].is_meta and moved["x"][1] == 3 and isinstance(moved["y"], pair) and moved["z"][0].is_meta
    some = utils.move_to_device(item, "meta", lambda tensor: tensor.is_floating_point())
    assert some["x"][0].is_meta and some["z"][0] is item["z"][0]
    x = torch.ones(2, requires_grad=True)
    copied = utils.copy_to_device([x * 1, x], "cpu", lambda tensor: tensor.is_leaf)
    assert copied[1] is not x and copied[1].requires_grad and copied[1].grad_fn is None and copied[0].grad_fn
    assert utils.get_tensor_bytes(item) == 8 + 4 + 24


def test_norms():
    """Against torch's own clipping, and by hand."""
    theirs, ours = ([torch.nn.Parameter(torch.ones(n)) for n in (3, 4)] for _ in range(2))
    for norm_type in (2, 1, float("inf")):
        for params in (theirs, ours):
            for index, param in enumerate(params):
                param.grad = torch.arange(param.numel(), dtype=torch.float32) * (index + 1)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.5, norm_type)
        torch.testing.assert_close(utils.clip_grad_norm_(ours, 1.5, norm_type), expected)
        for a, b in zip(theirs, ours):
            torch.testing.assert_close(a.grad, b.grad)
    assert utils.get_global_norm([3.0, 4.0]) == 5.0
    tensors = [torch.full((4,), 3.0), torch.full((4,), 4.0)]
    assert float(utils.get_global_norm_of_tensors(tensors)) == 10.0
    assert float(utils.clip_tensors_by_global_norm(tensors, 5.0)) == 10.0
    torch.testing.assert_close(tensors[0], torch.full((4,), 1.5))
    assert not utils.has_inf_or_nan(torch.ones(2)) and utils.has_inf_or_nan(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UnsupportedError, match="expert"):
        utils.get_global_norm_of_tensors(tensors, moe_ep_group=1)


class Mpu:
    """Two model-parallel ranks, no more."""

    def get_model_parallel_group(self):
        return torch.distributed.group.WORLD

    def get_model_parallel_rank(self):
        return torch.distributed.get_rank()

    def get_model_parallel_world_size(self):
        return 2

    def get_data_parallel_group(self):
        return [torch.distributed.new_group([r]) for r in range(2)][torch.distributed.get_rank()]


@distributed(2)
def test_norms_over_model_parallel_ranks():
    """Pieces count on every rank, what all hold alike once: the norm is the whole model's."""
    piece, shared = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    piece.model_parallel = True
    piece.grad, shared.grad = torch.full((2,), 1.0 + torch.distributed.get_rank()), torch.full((2,), 3.0)
    whole = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    norm = utils.clip_grad_norm_([piece, shared], 1.0, mpu=Mpu())
    torch.testing.assert_close(norm, whole.norm())
    torch.testing.assert_close(shared.grad, torch.full((2,), 3.0) / (whole.norm() + 1e-6))


@distributed(2)
def test_groups():
    """Without an mpu all ranks are data parallel; with one it answers."""
    groups.initialize()  # forgets the groups of tests before
    assert groups._get_data_parallel_world_size() == groups._get_sequence_data_parallel_world_size() == 2
    assert (groups._get_sequence_parallel_world_size(), groups._get_model_parallel_world_size()) == (1, 1)
    assert groups.get_data_parallel_rank() == torch.distributed.get_rank()
    assert groups._get_broadcast_src_rank() == 0
    with pytest.raises(KeyError):
        groups._get_sequence_parallel_group()
    with pytest.raises(DistributedError, match="mpu"):
        groups.get_model_parallel_group()
    with pytest.raises(UnsupportedError, match="expert"):
        groups.initialize(ep_size=2)
    groups.initialize(mpu=Mpu())
    try:
        assert groups.get_model_parallel_world_size() == 2
        assert groups.get_tensor_model_parallel_rank() == torch.distributed.get_rank()
        assert groups.get_tensor_model_parallel_src_rank() == 0
    finally:
        groups.initialize()


@distributed(2)
def test_groups_are_those_of_the_engines_mpu():
    """As with DeepSpeed, `initialize(mpu=...)` is enough."""

    class DataParallel:
        def get_data_parallel_group(self):
            return torch.distributed.group.WORLD

        def get_data_parallel_rank(self):
            return 41

    config = {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(2, 2), config=config, mpu=DataParallel())
    try:
        assert groups._get_data_parallel_rank() == 41
        assert groups._get_data_parallel_group() is torch.distributed.group.WORLD
    finally:
        engine.destroy()
        groups.initialize()


def test_the_accelerator(monkeypatch):
    """One object; on this machine's device each method answers with what torch says."""
    accelerator = get_accelerator()
    assert accelerator is get_accelerator() is deepspeedlite.compat.accelerator.get_accelerator()
    assert deepspeedlite.compat.accelerator.is_current_accelerator_supported()
    cpu = DeepSpeedAccelerator("cpu")
    assert (cpu.device_name(), cpu.device_name(1), cpu.current_device_name()) == ("cpu", "cpu", "cpu")
    assert cpu.communication_backend_name() == "gloo" and cpu.is_available() and cpu.is_synchronized_device()
    peak = cpu.memory_stats()["allocated_bytes.all.peak"]  # asked for first: it may grow between the two
    assert cpu.memory_allocated() > 1 << 20 and cpu.max_memory_allocated() >= peak
    assert cpu.total_memory() > cpu.available_memory() > 0
    state = cpu.get_rng_state()
    first = torch.rand(3)
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    with cpu.stream(cpu.current_stream()):
        assert cpu.FloatTensor([1.0]).dtype is torch.float32
    assert cpu.on_accelerator(torch.ones(1)) and not cpu.is_pinned(cpu.pin_memory(torch.ones(1)))
    assert (
        type(cpu.create_op_builder("CPUAdamBuilder")).__name__ == "CPUAdamBuilder"
        and cpu.get_op_builder("NoSuchBuilder") is None
    )
    with pytest.raises(UnsupportedError, match="not known"):
        cpu.set_compile_backend("no_such_backend")
    gpu = DeepSpeedAccelerator("cuda")
    assert (gpu.device_name(), gpu.device_name(1), gpu.communication_backend_name()) == ("cuda", "cuda:1", "nccl")
    assert DeepSpeedAccelerator("rocm").device_name() == "cuda"
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert cpu.device_count() == 4


def test_accelerator_methods_against_the_abstract_class():
    """Every method of DeepSpeed's abstract class that is about a device and not about building is there."""
    ours = {name for name in dir(DeepSpeedAccelerator) if not name.startswith("_")}
    listed = """is_synchronized_device use_host_timers resolves_data_dependency handles_memory_backpressure device_name
    device set_device current_device current_device_name device_count synchronize random set_rng_state get_rng_state
    manual_seed manual_seed_all initial_seed default_generator Stream stream current_stream default_stream Event
    empty_cache memory_allocated max_memory_allocated reset_max_memory_allocated memory_cached max_memory_cached
    reset_max_memory_cached memory_stats reset_peak_memory_stats memory_reserved max_memory_reserved total_memory
    available_memory is_bf16_supported is_fp16_supported is_fp64_supported supported_dtypes is_available range_push
    range_pop lazy_call communication_backend_name is_triton_supported is_current_stream_capturing create_graph
    capture_to_graph replay_graph BFloat16Tensor ByteTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor
    pin_memory is_pinned on_accelerator op_builder_dir create_op_builder get_op_builder export_envs
    visible_devices_envs set_visible_devices_envs get_compile_backend set_compile_backend"""
    assert set(listed.split()) - ours == set()


def test_on_device():
    """Tensors of the chosen device and dtype, and torch's own defaults afterwards, also after an error."""
    with OnDevice(torch.bfloat16, "meta"):
        layer = torch.nn.Linear(4, 4)
    assert layer.weight.is_meta and layer.weight.dtype is torch.bfloat16
    with pytest.raises(ZeroDivisionError), OnDevice(torch.float64, "meta"):
        raise ZeroDivisionError
    with OnDevice(torch.float64, enabled=False):
        assert torch.ones(1).dtype is torch.float32
    assert torch.ones(1).device.type == "cpu"


def test_timers():
    """Intervals add up until they are read; names never used are left out."""
    timers = SynchronizedWallClockTimer()
    for _ in range(2):
        timers("step").start()
        timers("step").stop()
    assert timers("step").mean() == pytest.approx(timers("step").elapsed(reset=False) / 2)
    timers.log(["step", "never"])
    assert timers("step").elapsed() == 0.0
    noop = NoopTimer()
    noop("x").start()
    noop("x").stop()
    assert noop("x").elapsed() == 0.0


def test_small_things(tmp_path: Path):
    """Each in a line or two."""
    utils.ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert (tmp_path / "a" / "b").is_dir()
    assert utils.get_only_unique_item([2, 2]) == 2
    with pytest.raises(RuntimeError, match="distinct"):
        utils.get_only_unique_item([1, 2])
    assert instrument_w_nvtx(lambda x: x + 1)(1) == 2
    from deepspeedlite.utils.torch import required_torch_version

    assert required_torch_version(min_version=2.1) and not required_torch_version(max_version=1.9)
    assert not required_torch_version(min_version=99.0)
    from deepspeedlite.utils.logging import logger, set_log_level_from_string

    level = logger.level
    set_log_level_from_string("error")
    assert logger.level == logging.ERROR
    logger.setLevel(level)
    with pytest.raises(ConfigError, match="loud"):
        set_log_level_from_string("loud")
    from deepspeedlite.checkpoint.utils import clone_tensors_for_torch_save

    view = torch.zeros(1000)[:2]
    assert clone_tensors_for_torch_save({"x": view})["x"].untyped_storage().nbytes() == 8
    from deepspeedlite.runtime.zero.utils import ZeRORuntimeException, is_zero_param

    assert ZeRORuntimeException is EngineStateError and not is_zero_param(torch.ones(1))


@distributed(1)
def test_optimizer_classes_tell_stages_apart():
    """As in DeepSpeed, where each is a class of its own."""
    from deepspeedlite.runtime.base_optimizer import DeepSpeedOptimizer, ZeROOptimizer
    from deepspeedlite.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeedlite.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeedlite.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = (DeepSpeedOptimizer, ZeROOptimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)
    for stage in range(4):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
        }
        engine, optimizer, *_ = deepspeedlite.initialize(model=tied_model(0), config=config)
        found = [isinstance(optimizer, kind) for kind in kinds]
        assert found == [True, stage > 0, stage in (1, 2), stage == 3, stage == 0]
        engine.destroy()
    assert not isinstance(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), kinds[1:])
    with pytest.raises(UnsupportedError, match="initialize"):
        DeepSpeedZeroOptimizer()


@distributed(2)
def test_generation_in_the_middle_of_stage_3():
    """What TRL does to the engine: hooks off, as many passes as each rank likes, hooks on, and training goes on."""

    def train(generate: bool) -> list[float]:
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        }
        engine, *_ = deepspeedlite.initialize(model=tied_model(0), config=config)
        rank, losses = torch.distributed.get_rank(), []
        for step in range(4):
            loss = engine(*tokens(step, 0, rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if generate and step == 1:
                with deepspeedlite.zero.GatheredParameters(engine.parameters()), torch.no_grad():
                    offload = engine.optimizer.parameter_offload
                    external = offload.module.ds_external_parameters()
                    for _, param in (*offload.module.named_parameters(), *external):
                        assert param.ds_status.name == "AVAILABLE" and param.ds_numel == param.numel() > 0
                        param.ds_active_sub_modules.clear()
                    for hook in (*offload.forward_hooks, *offload.backward_hooks):
                        hook.remove()
                    for _ in range(1 + 2 * rank):  # no collective may be needed
                        engine.module(*tokens(9, 0, rank))
                    if not offload.param_coordinator.is_invalid_trace():
                        offload.param_coordinator._invalidate_trace()
                    offload._register_deepspeed_module(offload.module)
        engine.destroy()
        return losses

    assert train(generate=True) == train(generate=False)


def test_a_configuration_of_one_s_own(tmp_path):
    """`DeepSpeedConfig(dict)` checks, solves the batch, and has DeepSpeed's attributes."""
    from deepspeedlite.runtime.config import DeepSpeedConfig
    from deepspeedlite.runtime.constants import GRADIENT_ACCUMULATION_STEPS, TRAIN_BATCH_SIZE

    given = {
        TRAIN_BATCH_SIZE: 8,
        GRADIENT_ACCUMULATION_STEPS: 2,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Lamb", "params": {"lr": 1.0}},
        "csv_monitor": {"enabled": True},
    }
    config = deepspeedlite.DeepSpeedConfig(given)
    assert isinstance(config, DeepSpeedConfig) and config._param_dict == given
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        8,
        4,
        2,
    )
    assert config.zero_enabled and config.zero_config.stage == config.zero_optimization_stage == 2
    assert config.float16_config.enabled and not config.bfloat16_config.enabled and config.gradient_clipping == 1.0
    assert (config.optimizer_name, config.optimizer_params, config.scheduler_name) == ("Lamb", {"lr": 1.0}, None)
    assert config.monitor_config.enabled and config.monitor_config.csv_monitor.enabled
    assert not hasattr(config, "no_such_thing")
    mpu = namedtuple("mpu", "get_data_parallel_world_size")(lambda: 4)
    assert DeepSpeedConfig(given, mpu).train_micro_batch_size_per_gpu == 1
    with pytest.raises(ConfigError, match="train_bach_size"):
        DeepSpeedConfig({"train_bach_size": 8})


def test_a_monitor_of_one_s_own(tmp_path):
    """Made without an engine, from a part of a configuration."""
    from deepspeedlite.monitor.config import get_monitor_config
    from deepspeedlite.monitor.monitor import MonitorMaster

    config = {"anything": 1, "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "mine"}}
    monitor = MonitorMaster(get_monitor_config(config))
    assert monitor.enabled
    monitor.write_events([("Train/x", 2.5, 7)])
    monitor.close()
    (file,) = (tmp_path / "mine").iterdir()
    assert file.name == "Train_x.csv" and file.read_text().splitlines()[-1] == "7,2.5"
    assert not MonitorMaster(get_monitor_config({})).enabled


def test_names_at_the_top():
    """What DeepSpeed's own package has beside its functions."""
    assert deepspeedlite.dist is deepspeedlite.comm
    assert deepspeedlite.version.startswith("0.19.8") and deepspeedlite.git_hash == deepspeedlite.__git_hash__


def test_copies_for_saving_keep_ties():
    """Tied weights are one tensor in the copy as well; views of one storage that differ are not."""
    from deepspeedlite.checkpoint.utils import clone_tensors_for_torch_save

    flat = torch.arange(6.0)
    model = {"a": flat[:4].view(2, 2), "tied": flat[:4].view(2, 2), "other": flat[:4], "none": flat[:0], "n": 3}
    copy = clone_tensors_for_torch_save(model)
    assert copy["a"] is copy["tied"] and copy["other"].data_ptr() != copy["a"].data_ptr() != flat.data_ptr()
    assert copy["a"].untyped_storage().nbytes() == 16 and copy["n"] == 3 and copy["none"].numel() == 0
    assert all(torch.equal(copy[key], model[key]) for key in ("a", "tied", "other"))
    meta = clone_tensors_for_torch_save([torch.empty(2, device="meta"), torch.empty(2, device="meta")], "meta")
    assert meta[0] is not meta[1]
    assert [tensor.device.type for tensor in meta] == ["meta", "meta"]
