"""Training with states on another tier is the training without, to the bit; and every key of offloading has its effect.

On CPU ranks the device's memory is the CPU's. So that shards which live in host memory are tested all the same, some
tests put them there although the "device" has them too.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens
from programs import needs

import deepspeedlite
from deepspeedlite.compat import offload_states
from deepspeedlite.compat.offload_states import OffloadStateTypeEnum
from deepspeedlite.offload.disk_store import DiskStore
from deepspeedlite.offload.options import Offload, OffloadOptions
from deepspeedlite.offload.pinned import HostMemory
from deepspeedlite.offload.placement import Placement, Tier
from deepspeedlite.offload.store import HostStore
from deepspeedlite.offload.swap_file import SwapFile
from deepspeedlite.offload.swap_pipeline import SwapPipeline
from deepspeedlite.offload.swapped_run import SwappedRun
from deepspeedlite.runtime.errors import CheckpointError, EngineStateError, OffloadError, UnsupportedError
from deepspeedlite.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from deepspeedlite.zero.flat_params import owner_of

DTYPES = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2, "hysteresis": 1}},
}
STEPS = 4


def placements(path: Path) -> dict[str, dict]:
    """Offload sections by name; parameters only at stage 3."""
    disk, cpu = {"device": "nvme", "nvme_path": str(path)}, {"device": "cpu"}
    return {
        "optimizer on cpu": {"offload_optimizer": cpu},
        "both on cpu": {"offload_optimizer": cpu, "offload_param": cpu},
        "optimizer on nvme": {"offload_optimizer": disk},
        "half of the optimizer on nvme": {"offload_optimizer": {**disk, "ratio": 0.5, "buffer_count": 1}},
        "parameters on nvme": {"offload_param": {**disk, "max_in_cpu": 0}},
        "both on nvme": {"offload_optimizer": disk, "offload_param": {**disk, "max_in_cpu": 500, "buffer_count": 2}},
    }


def config(stage: int, dtype: str = "fp32", optimizer: str = "AdamW", accumulation: int = 1, **zero) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 4000,
            "stage3_param_persistence_threshold": 40,
            "sub_group_size": 300,
            **zero,
        },
        **DTYPES[dtype],
    }


@contextmanager
def engine_of(settings: dict, model: torch.nn.Module | None = None, **more):
    engine = deepspeedlite.initialize(model=model or tied_model(), config=settings, **more)[0]
    yield engine
    engine.destroy()  # collective: not where one rank has failed


def train(engine, steps: range = range(STEPS)) -> list[float]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*tokens(step, micro, rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def everything(engine) -> dict[str, torch.Tensor | None]:
    """Weights, masters and optimizer states of all parameters, whole, on every rank."""
    found = {f"weight {name}": value.clone() for name, value in engine.module_state_dict().items()}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[f"master {name}"] = safe_get_full_fp32_param(param)
            keys = next((s for s in engine.optimizer.state.values()), {})
            for key in (key for key in keys if key != "step"):
                found[f"{key} {name}"] = safe_get_full_optimizer_state(param, key)
    return found


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


# --- the trajectory ---------------------------------------------------------------------------------------------------


@needs("c++")
@distributed([1, 2], timeout_s=180)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_every_placement_trains_as_none_does(dtype, tmp_path):
    for stage in (1, 2, 3):
        with engine_of(config(stage, dtype)) as engine:
            losses, states = train(engine), everything(engine)
            skipped = engine.skipped_steps
        assert len(set(losses)) > 1 and (skipped > 0) == (dtype == "fp16")  # fp16 begins with an overflow
        for name, sections in placements(tmp_path).items():
            if "offload_param" in sections and stage < 3:
                continue
            with engine_of(config(stage, dtype, **sections)) as engine:
                assert (train(engine), engine.skipped_steps) == (losses, skipped), (stage, name)
                assert_same(everything(engine), states)


@needs("c++")
@pytest.mark.slow_unless(optimizer="Lion")
@distributed(2, timeout_s=120)
@pytest.mark.parametrize("optimizer", ["SGD", "Lamb", "Adagrad", "Lion", "RMSprop"])
def test_every_optimizer_may_be_offloaded(optimizer, tmp_path):
    for dtype in ("fp32", "bf16"):
        with engine_of(config(3, dtype, optimizer, accumulation=2)) as engine:
            losses, states = train(engine, range(3)), everything(engine)
        with engine_of(config(3, dtype, optimizer, 2, **placements(tmp_path)["both on nvme"])) as engine:
            assert train(engine, range(3)) == losses
            assert_same(everything(engine), states)


@needs("c++")
@distributed(2)
def test_groups_frozen_parameters_and_later_ones(tmp_path):
    """Several param groups, one frozen and thawed on the way, a frozen layer, and parameters that come later."""

    def run(**sections) -> tuple[list[float], dict]:
        model = tied_model()
        names = [name for name, _ in model.named_parameters()]
        frozen, late = model.get_parameter(names[2]), model.get_parameter(names[-1])
        frozen.requires_grad_(False)
        late.requires_grad_(False)
        trained = [param for param in model.parameters() if param.requires_grad]
        groups = [{"params": trained[::2], "lr": 3e-3}, {"params": trained[1::2], "weight_decay": 0.1}]
        with engine_of(config(3, "bf16", **sections), model, model_parameters=groups) as engine:
            losses = train(engine, range(2))
            trained[1].requires_grad_(False)
            losses += train(engine, range(2, 4))
            trained[1].requires_grad_(True)
            late.requires_grad_(True)
            engine.optimizer.add_param_group({"params": [late], "lr": 1e-3})
            return losses + train(engine, range(4, 6)), everything(engine)

    losses, states = run()
    for name in ("optimizer on nvme", "both on nvme"):
        got, found = run(**placements(tmp_path)[name])
        assert got == losses
        assert_same(found, states)


@needs("c++")
@pytest.mark.slow_unless(stages=((3,),))
@distributed(2)
@pytest.mark.parametrize(("dtype", "stages"), [("fp32", (1, 2, 3)), ("bf16", (1, 2)), ("bf16", (3,))])
def test_states_in_host_memory_that_is_not_the_devices(dtype, stages, tmp_path):
    """As on a GPU: shards, masters and gradients have copies in the one memory and in the other."""
    apart = patch.object(Offload, "is_apart", lambda self, device: True)
    for stage in stages:
        with engine_of(config(stage, dtype)) as engine:
            losses, states = train(engine), everything(engine)
        for name, sections in placements(tmp_path).items():
            if stage < 3 and "offload_param" in sections:
                continue
            with apart, engine_of(config(stage, dtype, **sections)) as engine:
                runs = engine.optimizer._runs
                stores = [unit.flat.store for unit in engine._reducer.units if unit.flat.sharded]
                assert all(isinstance(store, HostStore) for store in stores) == (name == "both on cpu" or not stores)
                assert any(run.staged is not None for run in runs) == ("offload_optimizer" in sections)
                assert train(engine) == losses, (stage, name)
                assert_same(everything(engine), states)
                with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
                    for param in engine.module.parameters() if dist.get_rank() == 0 or stage < 3 else ():
                        param.data.add_(1.0)
                values = engine.module_state_dict()
                for weight, _ in engine.module.named_parameters():
                    assert torch.equal(values[weight], states[f"weight {weight}"] + 1.0)


@needs("c++")
@distributed(2)
def test_models_are_built_where_their_parameters_will_live(tmp_path):
    """zero.Init puts shards on the disk; `initialize` takes them over unit by unit, and the first file goes."""
    settings = config(3, "bf16", **placements(tmp_path)["both on nvme"])

    def built() -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(31, 67), torch.nn.Tanh(), torch.nn.Linear(67, 31))

    def three_steps(model: torch.nn.Module) -> list[float]:
        with engine_of(settings, model) as engine:
            losses = []
            for step in range(3):
                x = torch.randn(4, 31, generator=torch.Generator().manual_seed(step)).bfloat16()
                loss = engine(x).float().square().mean()
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            return losses

    expected = three_steps(built())
    files = set(os.listdir("/proc/self/fd"))
    with deepspeedlite.zero.Init(config_dict_or_path=settings):
        model = built()
    stores = [owner.store for owner in {id(o): o for o in map(owner_of, model.parameters())}.values()]
    assert any(isinstance(store, DiskStore) for store in stores)
    del stores
    assert three_steps(model) == expected
    gc.collect()
    folder = Path("/proc/self/fd")
    left = [os.readlink(file) for file in folder.iterdir() if file.name not in files and file.is_symlink()]
    assert not [name for name in left if str(tmp_path) in name]


def test_memory_that_cannot_be_page_locked_is_pageable(caplog):
    memory = HostMemory(pinned=True)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, for which memory can be page-locked")
    assert memory.empty(10, torch.float32).shape == (10,) and memory.pinned_nbytes == 0
    assert not memory.pinned
    assert "cannot be page-locked beyond 0.00 GiB" in caplog.text


# --- what else touches the states -------------------------------------------------------------------------------------


@needs("c++")
@pytest.mark.slow
@distributed(2)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_are_read_and_written_where_they_are(dtype, tmp_path):
    def change(engine) -> dict:
        train(engine, range(2))
        for number, param in enumerate(engine.module.parameters()):
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 0.5 + number)
            safe_set_full_optimizer_state(param, safe_get_full_optimizer_state(param, "exp_avg_sq") * 2, "exp_avg_sq")
        local = {
            f"{what} {name}": fragment
            for name, param in engine.module.named_parameters()
            for what, fragment in (
                ("local master", safe_get_local_fp32_param(param)),
                ("local state", safe_get_local_optimizer_state(param, "exp_avg")),
            )
        }
        with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            for param in engine.module.parameters() if dist.get_rank() == 0 else ():
                param.data.mul_(0.5)
        before = everything(engine)
        engine.module.load_state_dict({name: value * 2 for name, value in engine.module_state_dict().items()})
        after = everything(engine)
        return {
            "losses": torch.tensor(train(engine, range(2, 4))),
            **local,
            **before,
            **{f"{k}'": v for k, v in after.items()},
        }

    with engine_of(config(3, dtype)) as engine:
        expected = change(engine)
    for sections in placements(tmp_path).values():
        with engine_of(config(3, dtype, **sections)) as engine:
            assert_same(change(engine), expected)


@needs("c++")
@distributed(2, timeout_s=180)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.slow
def test_checkpoints_from_and_to_offloaded_runs(dtype, tmp_path):
    def settings(name: str, stage: int, **checkpoint) -> dict:
        sections = placements(tmp_path)[name] if name else {}
        return {**config(stage, dtype, **sections), "checkpoint": {"fsync": False, **checkpoint}}

    with engine_of(settings("", 2)) as engine:
        train(engine, range(2))
        engine.save_checkpoint(str(tmp_path / "plain"))
    for name, stage in (("optimizer on nvme", 1), ("both on nvme", 3), ("half of the optimizer on nvme", 2)):
        with engine_of(settings("", stage)) as engine:
            engine.load_checkpoint(str(tmp_path / "plain"))
            losses, states = train(engine, range(2, 4)), everything(engine)
        for asynchronous in (False, True):
            folder = tmp_path / f"{name} {asynchronous}"
            with engine_of(settings(name, stage, async_save=asynchronous)) as engine:
                train(engine, range(1))  # states of another step, to be replaced
                engine.load_checkpoint(str(tmp_path / "plain"))
                engine.save_checkpoint(str(folder))
                assert train(engine, range(2, 4)) == losses  # while an asynchronous save reads the states on the disk
                assert_same(everything(engine), states)
            with engine_of(settings("", stage)) as engine:
                assert engine.load_checkpoint(str(folder))[0]
                assert train(engine, range(2, 4)) == losses
                assert_same(everything(engine), states)


@needs("c++")
@distributed(1)
def test_what_is_changed_during_a_save_in_the_background_is_not_in_it(tmp_path):
    settings = {**config(3, "bf16", **placements(tmp_path)["both on nvme"]), "checkpoint": {"async_save": True}}
    with engine_of(settings) as engine:
        train(engine, range(1))
        states = everything(engine)
        engine.save_checkpoint(str(tmp_path / "out"))
        for param in engine.module.parameters():
            safe_set_full_fp32_param(param, torch.zeros(param.ds_shape))
        engine.load_checkpoint(str(tmp_path / "out"))
        assert_same(everything(engine), states)


@needs("c++")
@distributed(2)
def test_a_save_that_one_rank_cannot_begin_stops_nobody(tmp_path):
    settings = {**config(3, "bf16", **placements(tmp_path)["both on nvme"]), "checkpoint": {"async_save": True}}
    with engine_of(settings) as engine:
        train(engine, range(1))
        unfit = {"mine": object()} if dist.get_rank() == 0 else {}  # rank 0 alone writes it, and cannot
        with pytest.raises(CheckpointError):
            engine.save_checkpoint(str(tmp_path / "out"), client_state=unfit)
        train(engine, range(1, 2))


@needs("c++")
@distributed(1)
def test_an_engine_that_only_evaluates_may_have_its_parameters_on_a_disk(tmp_path):
    expected = tied_model()(*tokens(0, 0, 0))
    settings = config(3, **placements(tmp_path)["parameters on nvme"])
    del settings["optimizer"]
    with engine_of({**settings, "gradient_clipping": 0.0}) as engine, torch.no_grad():
        assert torch.equal(engine(*tokens(0, 0, 0)), expected)
        engine.save_checkpoint(str(tmp_path / "out"))
        with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            for param in engine.module.parameters():
                param.zero_()
        assert not torch.equal(engine(*tokens(0, 0, 0)), expected)
        engine.load_checkpoint(str(tmp_path / "out"))
        assert torch.equal(engine(*tokens(0, 0, 0)), expected)


@distributed(2)
def test_states_leave_the_device_and_come_back():
    """The host's memory stands in for a device's, and a copy of it for the host's."""
    with engine_of(config(2, "bf16")) as engine:
        losses, states = train(engine), everything(engine)
    kinds = [None, ["optim_states", OffloadStateTypeEnum.hp_params], {"lp_params"}]
    with (
        engine_of(config(2, "bf16")) as engine,
        patch.object(offload_states, "is_on_device", lambda storage: storage.resizable()),
    ):
        found = []
        for step, include in enumerate([*kinds, None]):
            found += train(engine, range(step, step + 1))
            holder = engine if step % 2 else engine.optimizer  # clients ask either
            holder.offload_states(include)
            assert engine.optimizer.states_away.away.nbytes > 0
            for call in (lambda: engine(*tokens(0, 0, 0)), engine.step, lambda: engine.save_checkpoint("nowhere")):
                with pytest.raises(EngineStateError, match="call reload_states first"):
                    call()
            (engine.optimizer if step % 2 else engine).reload_states()
        assert found == losses
        assert_same(everything(engine), states)
        for include, device, message in (
            (["optim"], "cpu", "'optim' is not one of optim_states"),
            (None, "nvme", "not to nvme"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                engine.offload_states(include, device)
    with engine_of(config(3)) as engine:  # nothing to move on CPU ranks, and nothing may train meanwhile all the same
        engine.offload_states()
        with pytest.raises(EngineStateError, match="call reload_states first"):
            engine.save_checkpoint("nowhere")


@needs("c++")
@distributed(1)
def test_state_dicts_of_the_optimizer_are_refused(tmp_path):
    with engine_of(config(2, **placements(tmp_path)["optimizer on nvme"])) as engine:
        for call in (engine.optimizer.state_dict, lambda: engine.optimizer.load_state_dict({})):
            with pytest.raises(UnsupportedError, match=r"use engine\.save_checkpoint"):
                call()


# --- the keys ---------------------------------------------------------------------------------------------------------


def on_disk(engine) -> int:
    return 0 if engine._parts.offload.swap_file is None else engine._parts.offload.swap_file.nbytes


@needs("c++")
@distributed(1)
def test_keys_say_how_much_goes_where(tmp_path):
    numel = sum(param.numel() for param in tied_model().parameters())
    bare = {"sub_group_size": 10**9, "stage3_param_persistence_threshold": 0}

    def after_a_step(stage: int, dtype: str, **sections) -> int:
        with engine_of(config(stage, dtype, **{**bare, **sections})) as engine:
            train(engine, range(1))
            return on_disk(engine)

    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    for stage, dtype, each in ((2, "fp32", 8), (3, "fp32", 8), (2, "bf16", 12), (3, "bf16", 12)):
        found = after_a_step(stage, dtype, offload_optimizer=disk)
        assert each * numel <= found < each * numel * 1.2 + 30 * 4096  # whole pages, and gaps between parameters
    everywhere = after_a_step(3, "bf16", offload_optimizer=disk, offload_param={**disk, "max_in_cpu": 0})
    assert everywhere > after_a_step(3, "bf16", offload_optimizer=disk) + 2 * numel
    assert after_a_step(3, "bf16", offload_param={**disk, "max_in_cpu": 10**9}) == 0
    kept = after_a_step(3, "bf16", offload_param={**disk, "max_in_cpu": numel // 2})
    assert numel / 2 < kept < after_a_step(3, "bf16", offload_param={**disk, "max_in_cpu": 0}) - numel / 2
    whole = after_a_step(2, "fp32", offload_optimizer=disk, sub_group_size=64)
    for ratio in (0.0, 0.3, 0.75):
        part = after_a_step(2, "fp32", offload_optimizer={**disk, "ratio": ratio}, sub_group_size=64)
        assert part == pytest.approx(ratio * whole, abs=2 * 4096 * 2)


@needs("c++")
@distributed(1)
def test_keys_reach_the_disk(tmp_path):
    disk = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 2}
    aio = {"block_size": 8192, "queue_depth": 3, "thread_count": 2, "single_submit": True, "overlap_events": False}
    with engine_of({**config(2, offload_optimizer=disk), "aio": aio}) as engine:
        pipeline = engine._parts.offload.pipeline
        assert len(pipeline._buffers) == 2
        handle = pipeline._buffers[0]._handle
        assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_intra_op_parallelism()) == (8192, 3, 2)
        assert handle.get_single_submit() and not handle.get_overlap_events()
        train(engine, range(1))
        assert list(tmp_path.iterdir()) == []  # the file has no name


def locked_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmLck" in line)


@needs("c++")
@distributed(1)
def test_pinned_memory_is_locked(tmp_path):
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    for pinned in (False, True):
        with engine_of(config(2, offload_optimizer={**disk, "pin_memory": pinned})) as engine:
            before = locked_kib()
            train(engine, range(2))
            if pinned and locked_kib() == before:
                pytest.skip("this process may not lock memory (ulimit -l)")
            assert (locked_kib() > before) == pinned


@needs("c++")
@pytest.mark.parametrize(
    "buffers, ahead, behind", [(1, True, True), (2, True, True), (4, True, True), (4, False, True), (4, True, False)]
)
def test_what_the_pipeline_does_while_a_group_is_worked_on(buffers, ahead, behind, tmp_path):
    disk = SwapFile(tmp_path)
    tensors = [torch.full((1000,), float(number)) for number in range(6)]
    groups = [[SwappedRun(disk, lambda tensor=tensor: {"it": tensor})] for tensor in tensors]
    for (run,) in groups:
        run.keep()
        run.close()
    assert all(tensor.numel() == 0 for tensor in tensors)
    in_memory = []

    def work(index: int) -> None:
        in_memory.append([number for number, tensor in enumerate(tensors) if tensor.numel()])
        tensors[index] += 10

    SwapPipeline(disk, buffers, ahead, behind).run(groups, work)
    assert all(tensor.numel() == 0 for tensor in tensors)
    reach = {1: 0, 2: 1, 4: 2}[buffers] if ahead else 0
    for index, found in enumerate(in_memory):
        assert len(found) <= buffers and index in found
        assert [number for number in found if number > index] == list(range(index + 1, min(index + reach, 5) + 1))
        left = [number for number in found if number < index]
        waited_for = not behind or (ahead and buffers == 2 and index < 5) or buffers == 1
        assert bool(left) == (not waited_for and index > 0)
    for number, (run,) in enumerate(groups):
        with run.opened():
            assert torch.equal(tensors[number], torch.full((1000,), number + 10.0))


@needs("c++")
def test_a_pipeline_that_fails_leaves_nothing_in_memory(tmp_path):
    disk = SwapFile(tmp_path)
    tensors = [torch.full((1000,), float(number)) for number in range(6)]
    groups = [[SwappedRun(disk, lambda tensor=tensor: {"it": tensor})] for tensor in tensors]
    for (run,) in groups:
        run.keep()
        run.close()

    def work(index: int) -> None:
        tensors[index] += 10
        if index == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SwapPipeline(disk).run(groups, work)
    assert all(tensor.numel() == 0 for tensor in tensors)
    for number, (run,) in enumerate(groups):
        with run.opened():
            assert torch.equal(tensors[number], torch.full((1000,), number + 10.0 * (number < 3)))


def test_shares_are_spread(tmp_path):
    for ratio in (0.0, 0.25, 0.6, 1.0):
        offload = Offload(Placement(states=Tier.CPU), OffloadOptions(ratio=ratio))
        took = [offload.takes_states(100) for _ in range(20)]
        assert sum(took) == round(20 * ratio)
        assert all(abs(sum(took[:count]) - ratio * count) <= 0.5 for count in range(1, 20))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@needs("c++")
@distributed(2)
def test_a_directory_that_cannot_be_used_is_an_error_on_every_rank(tmp_path):
    mine = tmp_path / f"of rank {dist.get_rank()}"
    if dist.get_rank() == 0:
        mine.mkdir()
    with pytest.raises(OffloadError, match=r"rank 1: nvme_path .*of rank 1 does not exist: make a directory"):
        engine_of(config(2, offload_optimizer={"device": "nvme", "nvme_path": str(mine)})).__enter__()


def test_paths_that_are_no_directories(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file", "is not a directory"),
        ("/proc", "cannot be written to"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(OffloadError, match=f"nvme_path {path} {message}"):
            SwapFile(path)


@distributed(1)
def test_states_that_are_not_sharded_are_not_offloaded():
    """The section is taken and changes nothing, as in DeepSpeed; that it does is a hint of the configuration's."""
    with engine_of(config(0, offload_optimizer={"device": "cpu"})) as engine:
        train(engine, range(1))
        assert engine._parts.offload.placement.states is Tier.DEVICE
