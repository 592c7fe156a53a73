"""`"checkpoint": {"format": "deepspeed"}`: what every rank writes is what an export writes, and is loaded likewise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_peer import CLIENT_STATE, STATES, configuration, peer_model, train
from harness import distributed
from pairwise import covering
from programs import needs
from torch import nn

import deepspeedlite
from deepspeedlite.checkpoint.checkpoints import OWN, Checkpoints
from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed import exchange, saver
from deepspeedlite.checkpoint.formats.deepspeed.live import Holding
from deepspeedlite.checkpoint.formats.deepspeed.pickles import Inert, load_inert
from deepspeedlite.checkpoint.formats.deepspeed.writer import export_to_deepspeed
from deepspeedlite.compat.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

DIRECT = {"format": "deepspeed"}
KINDS = covering({"stage": (0, 1, 2, 3), "dtype": ("fp32", "bf16", "fp16"), "variant": ("plain", "mixed")}, 2)


def engine_of(config: dict[str, Any], variant: str = "mixed", seed: int = 0, **section: Any) -> Any:
    model, groups = peer_model(variant, seed)
    config = {**config, "checkpoint": {**DIRECT, **section}}
    return deepspeedlite.initialize(model=model, model_parameters=groups, config=config)[0]


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[f"master {name}"] = safe_get_full_fp32_param(param)
            found.update({f"{kind} {name}": safe_get_full_optimizer_state(param, kind) for kind in STATES})
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two files of torch.save hold the same."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return vars(one) == vars(other) if isinstance(one, Inert) else one == other


def assert_as_exported(engine: Any, tag: Path, ours: Path, **more: Any) -> None:
    """Save once more in our own layout, export that, and compare every file."""
    mine = engine._checkpoints
    engine._checkpoints = Checkpoints(mine._settings.model_copy(update={"format": OWN}), engine.checkpoint_formats)
    engine.save_checkpoint(ours, tag=tag.name, **more)
    engine._checkpoints = mine
    if dist.get_rank() == 0:
        with open_checkpoint(ours) as reader:
            expected = export_to_deepspeed(reader, ours.with_name("exported"))
        assert sorted(os.listdir(tag)) == sorted(os.listdir(expected))
        for name in os.listdir(tag):
            assert same(load_inert(tag / name), load_inert(expected / name)), name
    dist.barrier()


@pytest.mark.slow
@distributed(world_size=2, timeout_s=300)
def test_every_file_is_as_an_export_has_it_and_training_goes_on_from_it(tmp_path: Path) -> None:
    for stage, dtype, variant in KINDS:
        folder = tmp_path / f"{stage}.{dtype}.{variant}"
        engine = engine_of(configuration(stage, dtype), variant)
        train(engine, [0, 2])
        engine.save_checkpoint(folder / "direct", client_state=CLIENT_STATE)
        tag = folder / "direct" / "global_step2"
        bf16, halves = "bf16_" if dtype == "bf16" else "", "mp_rank_00_model_states.pt"
        model = [f"zero_pp_rank_{r}_{halves}" for r in (0, 1)] if stage == 3 else [halves]
        optimizer = [f"{bf16}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)] if stage else []
        assert sorted(os.listdir(tag)) == sorted(model + optimizer)
        assert sorted(os.listdir(tag.parent)) == ["global_step2", "latest", "zero_to_fp32.py"]
        assert_as_exported(engine, tag, folder / "ours", client_state=CLIENT_STATE)
        expected = states_of(engine)
        fp32 = get_fp32_state_dict_from_zero_checkpoint(str(folder / "direct"))
        masters = {name.split()[1]: value for name, value in expected.items() if name.startswith("master")}
        assert all(torch.equal(fp32[name], value) for name, value in masters.items())
        losses = train(engine, [2, 4])
        other = engine_of(configuration((stage + 1) % 4, dtype), variant, seed=1)
        path, client = other.load_checkpoint(folder / "direct")
        assert path == str(tag) and client["epoch"] == 3 and torch.equal(client["noise"], CLIENT_STATE["noise"])
        found = states_of(other)
        assert not [key for key in expected if not torch.equal(found[key], expected[key])]
        assert train(other, [2, 4]) == pytest.approx(losses, rel=1e-5 if dtype == "fp32" else 2e-3)
        engine.destroy()
        other.destroy()


@pytest.mark.slow
@needs("c++")
@distributed(world_size=3)
def test_pieces_cross_ranks_in_batches_however_they_are_cut(tmp_path: Path) -> None:
    before, exchange._BATCH_NBYTES = exchange._BATCH_NBYTES, 256
    try:
        disk = {"device": "nvme", "nvme_path": str(tmp_path)}
        on_disk = {"offload_optimizer": disk, "offload_param": {**disk, "max_in_cpu": 500}}
        for stage, offload in ((2, {}), (3, {}), (3, on_disk)):
            zero = {"stage": stage, "sub_group_size": 2000, "stage3_param_persistence_threshold": 20, **offload}
            if stage == 2:
                zero |= {"round_robin_gradients": True, "reduce_bucket_size": 3000}
            folder = tmp_path / f"{stage}{len(offload)}"
            engine = engine_of(configuration(stage, "bf16", zero_optimization=zero))
            train(engine, [0, 1])
            engine.save_checkpoint(folder / "direct", exclude_frozen_parameters=True)
            assert_as_exported(
                engine, folder / "direct" / "global_step1", folder / "ours", exclude_frozen_parameters=True
            )
            other = engine_of(configuration(1, "bf16"), seed=1)
            other.load_checkpoint(folder / "direct")
            expected, found = states_of(engine), states_of(other)
            assert not [key for key in expected if not torch.equal(found[key], expected[key])]
            engine.destroy()
            other.destroy()
    finally:
        exchange._BATCH_NBYTES = before


@distributed(world_size=2)
def test_each_rank_lays_out_its_own_alone(tmp_path: Path) -> None:
    """No rank asks for more than its files have of the others' shards."""
    asked: list[int] = []
    plain = saver.exchange

    def counted(group: Any, wanted: Any, read: Any, dtypes: Any) -> None:
        asked.append(sum(want.asked.numel for wants in wanted.values() for want in wants))
        plain(group, wanted, read, dtypes)

    saver.exchange = counted  # type: ignore[assignment]
    try:
        for stage in (0, 1, 3):
            engine = engine_of(configuration(stage, "bf16"), "plain")
            train(engine, [0, 1])
            engine.save_checkpoint(tmp_path / str(stage))
            trained = sum(param.ds_numel if stage == 3 else param.numel() for param in engine.module.parameters())
            shard = -(-trained // 2) + 64
            assert asked.pop() <= (3 * shard if stage else 0), stage  # a master and two moments
            engine.destroy()
    finally:
        saver.exchange = plain


@distributed(world_size=2)
def test_a_tag_is_replaced_as_a_whole_and_nothing_else_is(tmp_path: Path) -> None:
    engine = engine_of(configuration(2, "fp32"))
    for step in range(2):
        train(engine, [step, step + 1])
        engine.save_checkpoint(tmp_path, tag="best")
    expected = states_of(engine)
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "zero_to_fp32.py"]
    other = engine_of(configuration(2, "fp32"), seed=1)
    other.load_checkpoint(tmp_path)
    assert other.global_steps == 2 and all(torch.equal(v, expected[key]) for key, v in states_of(other).items())
    if dist.get_rank() == 0:
        (tmp_path / "best" / "notes.txt").write_text("mine")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "weights.bin").write_text("mine")
    dist.barrier()
    for tag in ("best", "mine"):
        with pytest.raises(CheckpointError, match="holds what is not of a checkpoint of DeepSpeed's"):
            engine.save_checkpoint(tmp_path, tag=tag)
    ours = deepspeedlite.initialize(model=peer_model("plain")[0], config=configuration(2, "fp32"))[0]
    ours.save_checkpoint(tmp_path, tag="ours")
    with pytest.raises(CheckpointError, match="in our own layout"):
        engine.save_checkpoint(tmp_path, tag="ours")
    dist.barrier()
    if dist.get_rank() == 0:
        (tmp_path / "best" / "notes.txt").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="is a checkpoint of DeepSpeed's, and stays"):
        ours.save_checkpoint(tmp_path, tag="best")


@distributed(world_size=2)
def test_a_failure_is_every_ranks_and_what_was_there_stays(tmp_path: Path) -> None:
    engine = engine_of(configuration(3, "bf16"))
    train(engine, [0, 1])
    engine.save_checkpoint(tmp_path, tag="a")
    before = sorted(os.listdir(tmp_path))
    plain = Holding.read_own

    def broken(self: Any, tensor: str, first: int, out: torch.Tensor) -> None:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        plain(self, tensor, first, out)

    Holding.read_own = broken  # type: ignore[method-assign]
    try:
        for tag in ("a", "b"):
            with pytest.raises(CheckpointError, match="rank 1: OSError: the disk is gone"):
                engine.save_checkpoint(tmp_path, tag=tag)
    finally:
        Holding.read_own = plain  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="client_state has module"):
        engine.save_checkpoint(tmp_path, tag="b", client_state={"module": 1})
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "latest").read_text() == "a"
    probe = engine_of(configuration(3, "bf16"), seed=1)
    probe.load_checkpoint(tmp_path)
    assert probe.global_steps == 1


@distributed(world_size=1)
def test_what_does_not_go_with_it_is_refused_at_the_start() -> None:
    config = configuration(1, "fp32")
    with pytest.raises(ConfigError, match=r"checkpoint\.async_save does not go with checkpoint\.format: deepspeed"):
        engine_of(config, async_save=True)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last does not go with"):
        engine_of(config, keep_last=2)
    with pytest.raises(ConfigError, match="format"):
        engine_of(config, format="nebula")
    muon = configuration(0, "fp32", optimizer={"type": "LBFGS", "params": {}})
    with pytest.raises(UnsupportedError, match="whose states are not one value per element"):
        engine_of({**muon, "gradient_clipping": 0.0}, "plain")
    halves = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(UnsupportedError, match=r"weights of several dtypes \(torch.float32, torch.float64\)"):
        deepspeedlite.initialize(model=halves, config={**config, "checkpoint": DIRECT})
    bare = {"train_micro_batch_size_per_gpu": 1, "checkpoint": DIRECT}
    with pytest.raises(UnsupportedError, match="without an optimizer"):
        deepspeedlite.initialize(model=nn.Linear(2, 2), config=bare)
