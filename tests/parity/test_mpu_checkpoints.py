"""Checkpoints of a model that several ranks hold together: one tag, written and read by all ranks of the world."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from tensor_parallel import WIDTH, Grid, NewMpu, OldMpu, batch, parallel_model, piece_of, whole_model
from test_checkpoint_elastic import assert_same, everything
from test_checkpoint_kills import in_a_process_of_its_own
from test_mpu import config, engine_of, everywhere, take_step

import deepspeedlite
from deepspeedlite.checkpoint.__main__ import main as checkpoint_tool
from deepspeedlite.checkpoint.manifest import Parameter
from deepspeedlite.checkpoint.merge import Holding, merge
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tag import read_latest
from deepspeedlite.checkpoint.writer import TagWriter
from deepspeedlite.runtime.errors import CheckpointError, EngineStateError
from deepspeedlite.utils import safe_get_full_fp32_param

pytestmark = pytest.mark.slow

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}}
STATES = ("exp_avg", "exp_avg_sq")
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def adam(stage: int, dtype: str = "fp32", **more) -> dict:
    return config(stage, dtype, **{"optimizer": ADAM, **more})


@pytest.mark.slow_unless(stage=(0, 2))
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "bf16"), (3, "fp32")])
@distributed(4)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, stage, dtype):
    grid = Grid(apart=stage == 1)
    settings = adam(stage, dtype, checkpoint={"async_save": stage == 1})
    engine = engine_of(parallel_model(grid), settings, OldMpu(grid))
    for step in range(2):
        take_step(engine, step, dtype=HALF[dtype])
    engine.save_checkpoint(tmp_path, client_state={"epoch": 1})
    losses = [take_step(engine, step, dtype=HALF[dtype]) for step in range(2, 5)]
    expected, drawn = everything(engine, STATES), torch.rand(3)
    seen = engine.module.seen.clone()
    engine.destroy()  # waits for the save
    resumed = engine_of(parallel_model(grid, seed=1), settings, NewMpu(grid))
    _, client = resumed.load_checkpoint(tmp_path)
    assert client == {"epoch": 1} and resumed.global_steps == 2
    assert [take_step(resumed, step, dtype=HALF[dtype]) for step in range(2, 5)] == losses
    assert_same(everything(resumed, STATES), expected)
    assert torch.equal(torch.rand(3), drawn) and torch.equal(resumed.module.seen, seen)
    assert len(set(everywhere(seen.sum().item()))) == 2  # of each part of the data, a buffer of its own


def _worlds(folder):
    """Become part of a world of four ranks, and then of one of two, if this is one of the first two."""
    rank = int(os.environ["RANK"])
    for world in (4, 2):
        if rank < world:
            store = dist.FileStore(str(folder / f"store{world}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            yield world
            dist.barrier()
            dist.destroy_process_group()


@pytest.mark.slow_unless(stage=2)
@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(4, init_process_group=False)
def test_training_goes_on_with_another_number_of_models_and_at_another_stage(tmp_path, stage):
    """Two models of two ranks each, then one: on the same data, as two micro-batches."""
    for world in _worlds(tmp_path):
        grid = Grid()
        if world == 4:
            engine = engine_of(parallel_model(grid), adam(stage), OldMpu(grid))
            for step in range(2):
                take_step(engine, step)
            engine.save_checkpoint(tmp_path / "ckpt")
            saved = everything(engine, STATES)
            for step in range(2, 4):
                take_step(engine, step)
            expected = everything(engine, STATES)
            engine.destroy()
        else:
            engine = engine_of(parallel_model(grid, 1), adam((stage + 1) % 4, accumulation=2), OldMpu(grid))
            engine.load_checkpoint(tmp_path / "ckpt")
            assert_same(everything(engine, STATES), saved)
            for step in range(2, 4):
                for rank in range(2):
                    engine.backward(engine(*batch(step, 0, rank)))
                    engine.step()
            found = everything(engine, STATES)
            for key, value in expected.items():
                if "seen" not in key:
                    torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6)
            engine.destroy()


@distributed(4)
def test_one_manifest_names_every_piece_and_its_degree_is_kept(tmp_path):
    grid = Grid()
    engine = engine_of(parallel_model(grid), adam(1), OldMpu(grid))
    take_step(engine, 0)
    engine.save_checkpoint(tmp_path / "a")
    names = [name for name, _ in engine.module.named_parameters()] + ["seen"]
    with Reader(tmp_path / "a" / "global_step1") as reader:
        assert sorted(reader.parameters) == sorted(f"mp_rank_{part:02d}.{name}" for part in range(2) for name in names)
        assert (reader.manifest.world_size, reader.manifest.model_parallel) == (4, 2)
        assert len(reader.manifest.files) == 4 and len(reader.state("rng")) == 4
        mine = reader.parameters[f"mp_rank_{grid.rank:02d}.down.weight"]
        assert torch.equal(reader.read(mine, "weight").view(mine.shape), engine.module_state_dict()["down.weight"])
        holders = {piece.file for piece in mine.pieces["exp_avg"]}
        assert holders <= {f"rank_{rank:05d}.safetensors" for rank in dist.get_process_group_ranks(grid.data)}
    whole, *_ = deepspeedlite.initialize(model=whole_model(), config=adam(1))
    before = everything(whole, ())
    with pytest.raises(CheckpointError, match=r"model-parallel size 2 and this run of 1"):
        whole.load_checkpoint(tmp_path / "a")
    whole.save_checkpoint(tmp_path / "b", tag="whole")
    with pytest.raises(CheckpointError, match=r"model-parallel size 1 and this run of 2"):
        engine.load_checkpoint(tmp_path / "b")
    assert_same(everything(whole, ()), before)
    if dist.get_rank() == 0:
        _look_at_it_with_the_tools(tmp_path)
        assert checkpoint_tool(["export", str(tmp_path / "b"), str(tmp_path / "deepspeeds")]) == 0
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"model-parallel size 1 and this run of 2"):
        engine.load_checkpoint(tmp_path / "deepspeeds")


def _look_at_it_with_the_tools(folder) -> None:
    tagged = str(folder / "a")
    assert checkpoint_tool(["verify", tagged]) == checkpoint_tool(["inspect", tagged]) == 0
    assert checkpoint_tool(["diff", tagged, tagged]) == 0 and checkpoint_tool(["diff", tagged, str(folder / "b")]) == 1
    assert checkpoint_tool(["to_fp32", tagged, str(folder / "fp32")]) == 0
    assert {path.name for path in (folder / "fp32").iterdir()} == {"model.safetensors"}
    assert checkpoint_tool(["export", tagged, str(folder / "exported")]) == 1 and not (folder / "exported").exists()


@distributed(4)
def test_strictness_is_about_what_no_rank_has(tmp_path):
    grid = Grid()

    def start(*extra: str, seed: int = 0):
        model = parallel_model(grid, seed)
        for name in extra:
            model.add_module(name, torch.nn.Linear(3, 3))
        return engine_of(model, adam(2), OldMpu(grid))

    start("more" if grid.rank else "other").save_checkpoint(tmp_path, tag="t")
    engine = start("other", seed=1)
    before = everything(engine, ())
    with pytest.raises(CheckpointError) as told:
        engine.load_checkpoint(tmp_path)
    for line in ("mp_rank_01.more.bias is in the checkpoint and not", "mp_rank_01.other.bias is in the model and not"):
        assert line in str(told.value)
    assert "mp_rank_00" not in str(told.value)
    assert_same(everything(engine, ()), before)
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert len(engine.load_mismatches) == (4 if grid.rank else 2)
    got = {}
    start("more" if grid.rank else "other", seed=2).load_checkpoint(
        tmp_path, load_optimizer_states=False, custom_load_fn=lambda src, dst: got.update(src)
    )
    assert {name.partition(".")[0] for name in got} == {"norm", "up", "down", "bias", "head", "seen"} | {
        "more" if grid.rank else "other"
    }


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_saves_leaves_the_last_checkpoint(tmp_path):
    in_a_process_of_its_own(f"import test_mpu_checkpoints as m; m._in_two_lives(pathlib.Path({str(tmp_path)!r}))")
    told = {(tmp_path / f"told{rank}").read_text() for rank in range(3)}
    assert len(told) == 1 and "rank 3: ended before it was done" in told.pop()
    assert read_latest(tmp_path / "ckpt") == "global_step1"
    assert all((tmp_path / f"same{rank}").exists() for rank in range(4))


def _in_two_lives(folder) -> None:
    """Four ranks that save, of which one dies; then four that load."""
    import deepspeedlite.factory  # noqa: F401  (once, for all that are forked)

    for life in (_save_and_die, _load):
        pids = []
        for rank in range(4):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    torch.set_num_threads(1)
                    store = dist.FileStore(str(folder / life.__name__), 4)
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
                    life(folder, rank)
                finally:
                    os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)


def _save_and_die(folder, rank: int) -> None:
    grid = Grid()
    engine = engine_of(parallel_model(grid), adam(2), OldMpu(grid))
    take_step(engine, 0)
    engine.save_checkpoint(folder / "ckpt")
    torch.save(everything(engine, STATES), folder / f"expected{rank}")
    take_step(engine, 1)
    if rank == 3:
        TagWriter.write = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.save_checkpoint(folder / "ckpt")
    except CheckpointError as error:
        (folder / f"told{rank}").write_text(str(error))
    while len(list(folder.glob("told*"))) < 3:  # nobody hears of it because another has ended
        time.sleep(0.01)


def _load(folder, rank: int) -> None:
    grid = Grid()
    engine = engine_of(parallel_model(grid, 1), adam(2), OldMpu(grid))
    engine.load_checkpoint(folder / "ckpt")
    assert_same(everything(engine, STATES), torch.load(folder / f"expected{rank}"))
    (folder / f"same{rank}").touch()


class Scaled(torch.nn.Linear):
    """A layer that keeps what is no buffer, as those of Transformer Engine keep their scales."""

    seen: object = None

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state) -> None:
        self.seen = state


@distributed(4)
def test_extra_states_of_modules_come_back_by_part(tmp_path):
    grid = Grid()

    def start(seed: int):
        model = parallel_model(grid, seed)
        model.head = Scaled(WIDTH, WIDTH)
        return engine_of(model, adam(2), OldMpu(grid))

    engine = start(0)
    engine.module.head.seen = {"amax": torch.full((2,), float(grid.rank)), "calls": (3, None)}
    engine.save_checkpoint(tmp_path, tag="t")
    other = start(1)
    other.load_checkpoint(tmp_path)
    assert other.module.head.seen["calls"] == (3, None) and other.module.head.seen["amax"].tolist() == [grid.rank] * 2
    assert engine.save_16bit_model(tmp_path)
    whole = torch.load(tmp_path / f"mp_rank_0{grid.rank}_pytorch_model.bin")
    other.module.load_state_dict(whole)
    engine.module.head.seen = object()
    with pytest.raises(CheckpointError, match=r"get_extra_state\(\) of mp_rank_0\d.head is a builtins.object"):
        engine.save_checkpoint(tmp_path, tag="u")


@pytest.mark.parametrize("stage", [1, 3])
@distributed(2)
def test_extra_states_go_through_deepspeeds_files(tmp_path, stage):
    def start(seed: int):
        model = whole_model(seed)
        model.head = Scaled(WIDTH, WIDTH)
        return deepspeedlite.initialize(model=model, config=adam(stage))[0]

    engine = start(0)
    engine.module.head.seen = {"amax": torch.arange(2.0), "calls": 3}
    engine.save_checkpoint(tmp_path / "ours")
    if dist.get_rank() == 0:
        assert checkpoint_tool(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
        assert checkpoint_tool(["import", str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    dist.barrier()
    for folder in ("theirs", "again"):
        other = start(1)
        other.load_checkpoint(tmp_path / folder)
        assert other.module.head.seen["calls"] == 3 and other.module.head.seen["amax"].tolist() == [0, 1]
        assert torch.equal(*(safe_get_full_fp32_param(e.module.up.weight) for e in (engine, other)))


# --- stages of a pipeline: names that are unique but for what is tied -----------------------------------------------


class Stage(torch.nn.Module):
    """Layers 0 to 3 of four, or some of them; the last is tied to the first. Each stage takes the whole input."""

    def __init__(self, layers: range, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        made = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)]
        self.layers = torch.nn.ModuleDict({str(i): made[i % 3] for i in layers})
        for i in layers:
            made[i % 3].register_buffer("count", torch.tensor(float(i)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return (x - y).square().mean()


def _stage_engine(grid: Grid | None, seed: int):
    """The engine of this rank's stage, of two, or of the whole model; names of tied layers are the first's."""
    if grid is None:
        return deepspeedlite.initialize(model=Stage(range(4), seed), config=adam(1))[0]
    layers = range(2) if grid.rank == 0 else range(2, 4)
    model = Stage(layers, seed)
    if grid.rank == 1:
        model.layers = torch.nn.ModuleDict({"2": model.layers["2"], "0": model.layers["3"]})
    engine = engine_of(model, adam(1), OldMpu(grid))
    engine._parts.replica = replace(engine._parts.replica, part=0, parts=1)
    return engine


@distributed(4)
def test_stages_are_one_model_at_any_number_of_stages(tmp_path):
    grid = Grid()
    two = _stage_engine(grid, 0)
    take_step(two, 0)
    two.save_checkpoint(tmp_path, tag="two")
    with Reader(tmp_path / "two") as reader:
        found = [name for name in reader.parameters if name.endswith("weight")]
        assert sorted(found) == [f"layers.{i}.weight" for i in range(3)]
        assert {piece.file for piece in reader.parameters["layers.0.weight"].pieces["weight"]} <= {
            f"rank_{rank:05d}.safetensors" for rank in (0, 2)
        }
        positions = [(p.group, p.position) for p in reader.manifest.parameters if not p.buffer]
        assert len(set(positions)) == len(positions)
    one = _stage_engine(None, 1)
    one.load_checkpoint(tmp_path)
    first, whole = everything(two, STATES), everything(one, STATES)
    if grid.rank == 0:  # what both stages hold was trained apart here; the first's is what was saved
        assert_same({key: whole[key] for key in first}, first)
    one.backward(one(*batch(5, 0, dist.get_rank())))
    one.step()
    one.save_checkpoint(tmp_path, tag="one")
    again = _stage_engine(grid, 2)
    again.load_checkpoint(tmp_path)
    whole = everything(one, STATES)
    assert_same(everything(again, STATES), {key: whole[key] for key in everything(again, STATES)})
    assert again.global_steps == 2 and not again.load_mismatches


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [0, 3])
@distributed(4)
def test_weights_are_saved_by_model_parallel_rank_or_of_all_stages_together(tmp_path, stage):
    grid = Grid()
    settings = adam(stage, "bf16")
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = engine_of(parallel_model(grid), settings, OldMpu(grid))
    assert engine.save_16bit_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"mp_rank_0{part}_pytorch_model.bin" for part in range(2)}
    found, whole = torch.load(tmp_path / f"mp_rank_0{grid.rank}_pytorch_model.bin"), whole_model().bfloat16()
    for name, value in whole.named_parameters():
        assert torch.equal(found[name], piece_of(name, value, grid.rank, 2))
    dist.barrier()
    with pytest.raises(EngineStateError, match=r"mp_rank_00_\w+.bin is a file and no folder"):
        engine.save_16bit_model(tmp_path / "mp_rank_00_pytorch_model.bin", "model.bin")
    stages = _stage_engine(grid, 0)
    assert stages.save_16bit_model(tmp_path, "stages.bin")
    assert set(torch.load(tmp_path / "stages.bin")) >= {f"layers.{i}.weight" for i in range(3)}


@distributed(4)
def test_weights_of_stages_whose_tensors_are_split(tmp_path):
    """Two stages of two ranks each: a file per part of the tensors, with the layers of both stages."""
    grid = Grid(4)
    rank = dist.get_rank()
    model = torch.nn.ModuleDict({"first" if rank < 2 else "second": torch.nn.Linear(3, 3)})
    torch.nn.init.constant_(next(model.parameters()), float(rank))
    engine = engine_of(model, adam(0), OldMpu(grid))
    engine._parts.replica = replace(engine._parts.replica, part=rank % 2, parts=2)
    assert engine.save_16bit_model(tmp_path)
    found = torch.load(tmp_path / f"mp_rank_0{rank % 2}_pytorch_model.bin")
    assert [found[f"{stage}.weight"][0, 0].item() for stage in ("first", "second")] == [rank % 2, rank % 2 + 2]
    engine.save_checkpoint(tmp_path)
    with Reader(tmp_path / "global_step0") as reader:
        names = {f"mp_rank_0{part}.{stage}.weight" for part in range(2) for stage in ("first", "second")}
        assert names == {name for name in reader.parameters if name.endswith("weight")}


def test_what_ranks_hold_is_merged():
    def held(*names: tuple[str, ...]) -> list[Parameter]:
        return [
            Parameter(first, (2,), "float32", group=0, position=i, tied=tied) for i, (first, *tied) in enumerate(names)
        ]

    merged = merge([Holding(0, held(("a",), ("b",)), {"s": 1}), Holding(1, held(("c", "b"), ("d",)), {"s": 2, "t": 3})])
    assert [(entry.name, entry.tied, entry.position) for entry in merged.entries] == [
        ("a", [], 0),
        ("b", ["c"], 1),
        ("d", [], 3),
    ]
    assert merged.left_out == {1: {"c"}} and merged.checksums == {"s": 1, "t": 3}
    other = replace(held(("a",))[0], shape=(3,))
    with pytest.raises(CheckpointError, match=r"a has shape \(3,\) .* on rank 5, and a shape \(2,\) .* on rank 0"):
        merge([Holding(0, held(("a",)), {}), Holding(5, [other], {})])
