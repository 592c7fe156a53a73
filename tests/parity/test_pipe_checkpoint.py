"""Checkpoints of pipelines: resumed at the same number of stages and at any other, and read by the tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from pipe_models import Sequential, batches, layers, loss_fn
from test_pipe import MICRO_BATCHES, assert_copies_are_equal, config, pipeline

from deepspeedlite.checkpoint.manifest import Manifest
from deepspeedlite.compat.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeedlite.runtime.errors import CheckpointError

pytestmark = pytest.mark.slow


def feed(engine: Any, steps: int) -> Any:
    """The batches after so many steps."""
    data = batches(engine.grid.data_parallel_id, MICRO_BATCHES)
    for _ in range(steps * MICRO_BATCHES):
        next(data)
    return data


def losses(engine: Any, steps: int, after: int = 0) -> list[float]:
    data = feed(engine, after)
    return [engine.train_batch(data).item() for _ in range(steps)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.slow_unless(dtype="fp32", stage=1)
@distributed(4)
def test_a_resumed_run_equals_the_uninterrupted_one(stage, dtype, tmp_path):
    """Two stages and two replicas: to the bit."""
    settings = config(stage, dtype=dtype, gradient_clipping=0.5)
    engine = pipeline(layers(), 2, settings)
    losses(engine, 2)
    engine.save_checkpoint(str(tmp_path), client_state={"note": "half"})
    expected = losses(engine, 2, after=2)
    engine.destroy()
    again = pipeline(layers(), 2, settings, base_seed=99)
    path, client_state = again.load_checkpoint(str(tmp_path))
    assert path is not None and client_state == {"note": "half"} and again.global_steps == 2
    assert losses(again, 2, after=2) == expected
    assert_copies_are_equal(again)


@distributed(2)
def test_the_weights_saved_are_the_model_s(tmp_path):
    """Torch alone, given the whole fp32 weights, evaluates as the pipeline does."""
    engine = pipeline(layers(), 2)
    losses(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    model = Sequential(layers())
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(tmp_path)))
    found = engine.eval_batch(feed(engine, 2), num_micro_batches=2)
    data = feed(engine, 2)
    with torch.no_grad():
        expected = sum(loss_fn(model(x), y) for x, y in (next(data), next(data))) / 2
    torch.testing.assert_close(found, expected)
    assert engine.save_16bit_model(str(tmp_path))  # of all stages, in one file
    dist.barrier()
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight)


@distributed(4)
def test_other_numbers_of_stages_train_on_alike(tmp_path):
    """From 2 stages x 2 replicas to 4 x 1 and 1 x 4, each on the same batch of samples: the same losses."""
    engine = pipeline(layers(), 2, config(micro_batches=2))
    for _ in range(2):
        engine.train_batch(samples(engine, 2))
    engine.save_checkpoint(str(tmp_path))
    expected = [engine.train_batch(samples(engine, 2)).item() for _ in range(3)]
    for stages, micro_batches in ((4, 4), (1, 1)):
        other = pipeline(layers(), stages, config(micro_batches=micro_batches), base_seed=7)
        other.load_checkpoint(str(tmp_path))
        found = [other.train_batch(samples(other, micro_batches)).item() for _ in range(3)]
        assert found == pytest.approx(expected, rel=1e-6)


def samples(engine: Any, micro_batches: int) -> Any:
    """Four micro-batches over all replicas, whatever their number."""
    data = batches(0, 4)
    mine = [next(data) for _ in range(4)]
    start = engine.grid.data_parallel_id * micro_batches
    return iter(mine[start : start + micro_batches])


@distributed(4)
def test_the_manifest_is_of_the_whole_model(tmp_path):
    """One entry per parameter under its name in the whole model, tied ones once; a rank's file each."""
    engine = pipeline(layers(), 2)
    engine.train_batch(feed(engine, 0))
    engine.save_checkpoint(str(tmp_path), tag="whole")
    engine.destroy()
    raw = (tmp_path / "whole" / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(raw, "the manifest")
    model = Sequential(layers())
    assert sorted(entry.name for entry in manifest.parameters) == sorted(name for name, _ in model.named_parameters())
    assert len(manifest.files) == 4 and manifest.world_size == 4
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="whole")
    assert state.keys() == model.state_dict().keys()


@distributed(2)
def test_a_checkpoint_of_another_pipeline_is_refused(tmp_path):
    engine = pipeline(layers(), 2)
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    longer = pipeline(layers(blocks=4), 2)
    with pytest.raises(CheckpointError, match=r"5\.up\.weight"):
        longer.load_checkpoint(str(tmp_path))
    longer.destroy()
    shorter = pipeline(layers(blocks=2), 2)
    with pytest.raises(CheckpointError, match=r"4\.up\.weight"):
        shorter.load_checkpoint(str(tmp_path))


@distributed(4)
def test_saves_in_the_background_and_offloaded_ones(tmp_path):
    settings = config(
        checkpoint={"async_save": True},
        zero_optimization={"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}},
    )
    engine = pipeline(layers(), 2, settings)
    losses(engine, 1)
    engine.save_checkpoint(str(tmp_path / "saved"))
    expected = losses(engine, 2, after=1)
    engine.destroy()
    again = pipeline(layers(), 2, config(), base_seed=3)
    again.load_checkpoint(str(tmp_path / "saved"))
    assert losses(again, 2, after=1) == expected
