"""Checkpoints in DeepSpeed's layout, made by `export` and then spoilt: what is read, refused, and never run."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from ds_peer import CLIENT_STATE, STATES, configuration, peer_model, train
from harness import distributed

import deepspeedlite
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed.pickles import load_inert, save_for_deepspeed, verify_zip
from deepspeedlite.checkpoint.formats.deepspeed.reader import DeepSpeedReader
from deepspeedlite.checkpoint.formats.deepspeed.writer import export_to_deepspeed
from deepspeedlite.checkpoint.load import param_groups_of
from deepspeedlite.compat.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeedlite.runtime.errors import CheckpointError
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

MODEL, MODEL_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"
OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def engine_of(config, variant="mixed", seed=0):
    model, groups = peer_model(variant, seed)
    return deepspeedlite.initialize(model=model, model_parameters=groups, config=config)[0]


def saved(folder: Path, config, variant="mixed", client_state=CLIENT_STATE):
    """A checkpoint of ours in `folder`, and the names of each group's parameters."""
    engine = engine_of(config, variant)
    train(engine, [0, 2])
    engine.save_checkpoint(folder, client_state=client_state)
    groups = param_groups_of(engine._train_state())
    engine.destroy()
    return groups


def contents(reader):
    found = {
        f"{kind} {p.name}": reader.read(p, kind)
        for p in reader.manifest.parameters
        for kind in ("weight", *(STATES if p.trainable else ()))
    }
    found |= {f"master {p.name}": reader.read(p, "master") for p in reader.manifest.parameters if p.trainable}
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def theirs_of(folder: Path, stage: int, dtype: str = "bf16") -> Path:
    saved(folder / "ours", configuration(1, dtype))
    with open_checkpoint(folder / "ours") as reader:
        return export_to_deepspeed(reader, folder / "theirs", stage, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@distributed(world_size=1)
def test_every_stage_and_number_of_ranks_is_written_and_read_to_the_bit(dtype, tmp_path):
    for torch_adam in (True, False):
        config = configuration(1, dtype)
        config["optimizer"]["params"]["torch_adam"] = torch_adam
        folder = tmp_path / str(torch_adam)
        groups = saved(folder / "ours", config)
        with open_checkpoint(folder / "ours") as ours:
            expected = contents(ours)
            for stage, world in [(0, 1), (1, 2), (2, 1), (2, 3), (3, 1), (3, 3), (3, 4)]:
                tag = export_to_deepspeed(ours, folder / f"{stage}.{world}", stage, world)
                assert tag.parent.joinpath("latest").read_text() == tag.name == "global_step2"
                with DeepSpeedReader(tag, groups) as reader:
                    assert_same(contents(reader), expected)
                    assert reader.manifest.stage == stage and reader.manifest.world_size == world
                    for name in ("lr_scheduler", "config"):
                        assert reader.state(name) == ours.state(name)
                    kept = [(p.name, p.trainable, p.group, p.position, p.tied) for p in ours.manifest.parameters]
                    assert sorted(kept) == sorted(
                        (p.name, p.trainable, p.group, p.position, p.tied) for p in reader.parameters.values()
                    )
                    for before, after in zip(ours.manifest.param_groups, reader.manifest.param_groups):
                        assert before.items() <= after.items()
                    if dtype == "fp16":
                        scale, theirs = ours.state("loss_scaler"), reader.state("loss_scaler")
                        assert theirs == {**scale, "tolerance": theirs["tolerance"]}
                        assert stage == 0 or theirs == scale


@distributed(world_size=1)
def test_sub_groups_and_paddings_follow_the_configuration(tmp_path):
    config = configuration(3, "bf16", zero_optimization={"stage": 3, "sub_group_size": 2000})
    saved(tmp_path / "ours", config)
    with open_checkpoint(tmp_path / "ours") as ours:
        tag = export_to_deepspeed(ours, tmp_path / "theirs", 3, 2)
        states = load_inert(tag / OPTIMIZER)["optimizer_state_dict"]
        # 1552, 1552 | 1552, 976 elements of matrices on each rank, and all vectors
        assert [flat.numel() for flat in states["fp32_flat_groups"]] == [3104, 2528, 146]
        assert [group["params"] for group in states["optimizer_state_dict"]["param_groups"]] == [[0, 1], [2]]
        with DeepSpeedReader(tag) as reader:
            assert_same(contents(reader), contents(ours))
    path = tmp_path / "theirs" / "global_step2"
    second = export_aligned(tmp_path, path.parent.parent / "ours")
    with DeepSpeedReader(second) as reader, open_checkpoint(tmp_path / "ours") as ours:
        assert_same(contents(reader), contents(ours))


def export_aligned(folder, source):
    """As with DeepSpeed's `parameter_alignment`: gaps between the parameters of a partition."""
    with open_checkpoint(source) as ours:
        tag = export_to_deepspeed(ours, folder / "aligned", 1, 1)
    file = tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = load_inert(file)
    states = content["optimizer_state_dict"]
    shapes = load_inert(tag / MODEL)["param_shapes"]
    states["param_alignment_paddings"] = []
    for number, group in enumerate(shapes):
        numels = [shape.numel() for shape in group.values()]
        gaps = [-numel % 8 for numel in numels[:-1]] + [0]
        states["param_alignment_paddings"].append(gaps)
        held = states["base_optimizer_state"]["state"][number]

        def widen(flat, numels=numels, gaps=gaps):
            parts = flat[: sum(numels)].split(numels)
            return torch.cat([torch.cat([part, torch.full((gap,), 7.0)]) for part, gap in zip(parts, gaps)])

        states["single_partition_of_fp32_groups"][number] = widen(states["single_partition_of_fp32_groups"][number])
        held.update({kind: widen(held[kind]) for kind in STATES})
    rewrite(file, content)
    return tag


def rewrite(path, content):
    path.unlink()
    save_for_deepspeed(content, path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
@distributed(world_size=2)
def test_an_engine_loads_them_as_its_own(stage, tmp_path):
    engine = engine_of(configuration(1, "fp32"))
    train(engine, [0, 3])
    engine.save_checkpoint(tmp_path / "ours", client_state=CLIENT_STATE)
    if engine._parts.group.rank == 0:
        with open_checkpoint(tmp_path / "ours") as reader:
            export_to_deepspeed(reader, tmp_path / "theirs", stage, 3)
    losses = train(engine, [3, 5])
    for other in range(4):
        resumed = engine_of(configuration(other, "fp32"), seed=1)
        path, client = resumed.load_checkpoint(tmp_path / "theirs")
        assert path == str(tmp_path / "theirs" / "global_step3") and client.keys() == CLIENT_STATE.keys()
        assert train(resumed, [3, 5]) == pytest.approx(losses, rel=1e-6)
        resumed.save_checkpoint(tmp_path / "theirs")  # ours beside theirs: `latest` is ours from now on
        resumed.destroy()
        third = engine_of(configuration(other, "fp32"), seed=2)
        assert third.load_checkpoint(tmp_path / "theirs")[0].endswith("global_step5")
        third.destroy()
        (tmp_path / "theirs" / "latest").write_text("global_step3")
    parts = engine_of(configuration(2, "bf16"), seed=3)
    parts.load_checkpoint(tmp_path / "theirs", load_module_only=True)
    assert parts.global_steps == 0 and not parts.optimizer.state
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "theirs"), "global_step3")
    for name, param in parts.module.named_parameters():
        if param.requires_grad:
            assert torch.equal(safe_get_full_fp32_param(param), state[name])
            assert safe_get_full_optimizer_state(param, "exp_avg") is None


@distributed(world_size=1)
def test_states_of_stage_0_in_fp32_need_the_groups_where_several_fit(tmp_path):
    saved(tmp_path / "ours", configuration(0, "fp32"))
    with open_checkpoint(tmp_path / "ours") as reader:
        tag = export_to_deepspeed(reader, tmp_path / "theirs", 0, 1)
    with open_checkpoint(tag) as reader:  # the weights are there
        assert reader.manifest.optimizer is None and reader.left_out is not None
        assert reader.read(reader.parameters["norm.bias"], "weight").numel() == 32
    assert command(["import", str(tag), str(tmp_path / "again")]) == 1 and not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="optimizer is None"):
        other, _ = peer_model("plain")
        deepspeedlite.initialize(model=other, config=configuration(0, "fp32"))[0].load_checkpoint(
            tmp_path / "theirs", load_module_strict=False
        )
    saved(tmp_path / "plain", configuration(0, "fp32"), "plain")
    with open_checkpoint(tmp_path / "plain") as ours:
        tag = export_to_deepspeed(ours, tmp_path / "plain.theirs", 0, 1)
        with open_checkpoint(tag) as reader:
            assert_same(contents(reader), contents(ours))


# --- what is never run ------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled by Python's own unpickler, this runs a program."""

    def __init__(self, marker: Path, how: str) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self):
        touch = f"touch {self.marker}"
        calls = {
            "posix.system": (os.system, (touch,)),
            "eval": (eval, (f"__import__('os').system({touch!r})",)),
            "posix.mkdir": (os.mkdir, (str(self.marker),)),
            "shutil.copy": (shutil.copy, (__file__, str(self.marker))),
        }
        return calls[self.how]


ATTACKS = [
    (2, MODEL, "posix.system", "client"),
    (2, MODEL, "eval", "module"),
    (2, MODEL, "posix.mkdir", "lr_scheduler"),
    (2, OPTIMIZER, "shutil.copy", "optimizer_state_dict"),
    (3, MODEL_3, "posix.system", "frozen_param_fragments"),
    (3, OPTIMIZER, "eval", "ds_config"),
    (0, MODEL, "posix.mkdir", "optimizer"),
]


@pytest.mark.parametrize(("stage", "file", "how", "where"), ATTACKS)
@distributed(world_size=1)
def test_a_file_that_runs_a_program_is_refused_and_runs_nothing(stage, file, how, where, tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "real", how)))
    assert (tmp_path / "real").exists()  # so the attack is one
    tag, marker = theirs_of(tmp_path, stage), tmp_path / "it-ran"
    content = load_inert(tag / file)
    for zipped in (True, False):
        if zipped:
            rewrite(tag / file, {**content, where: {"deep": [Runs(marker, how)]}})
        else:
            torch.save({where: [Runs(marker, how)]}, tag / file, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=f"names {how}.*nothing was run"):
            load_inert(tag / file)
        with pytest.raises(CheckpointError, match=f"names {how}.*nothing was run"):
            DeepSpeedReader(tag)
        for name in ("import", "to_fp32", "export"):
            assert command([name, str(tag), str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()
        engine = engine_of(configuration(1, "bf16"))
        before = safe_get_full_fp32_param(engine.module.head.weight)
        with pytest.raises(CheckpointError, match=how):
            engine.load_checkpoint(tag.parent)
        assert torch.equal(safe_get_full_fp32_param(engine.module.head.weight), before) and engine.global_steps == 0
        engine.destroy()
    assert not marker.exists()


class Plain:
    """Not allowed, though it does nothing."""


def test_pickles_that_are_refused_for_other_reasons(tmp_path):
    cases = {
        "names test_checkpoint_deepspeed.Plain": {"client": Plain()},
        "names numpy": {"client": __import__("numpy").arange(3)},
        "not a dense one": {"module": torch.zeros(3, device="meta")},
        "fewer elements in the file": {"module": torch.zeros(1).expand(10**13)},
    }
    for number, (message, content) in enumerate(cases.items()):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(CheckpointError, match=message):
            load_inert(tmp_path / f"{number}.pt")
    torch.save({"client": Plain()}, tmp_path / "4.pt", pickle_protocol=4)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="refused: "):
        load_inert(tmp_path / "4.pt")


def test_checksums_are_compared_where_there_are_some(tmp_path):
    file = tmp_path / "a.pt"
    for crc32 in (True, False):
        torch.serialization.set_crc32_options(crc32)
        try:
            torch.save({"a": torch.arange(1000)}, file)
        finally:
            torch.serialization.set_crc32_options(True)
        assert verify_zip(file) is None
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        assert ("checksum" in (verify_zip(file) or "")) == crc32


# --- what is damaged, or of another kind ------------------------------------------------------------------------------


def changed(name, **values):
    """A change of some keys of a file."""

    def change(tag):
        rewrite(tag / name, {**load_inert(tag / name), **values})

    return change


def changed_states(**values):
    def change(tag):
        content = load_inert(tag / OPTIMIZER)
        content["optimizer_state_dict"].update(values)
        rewrite(tag / OPTIMIZER, content)

    return change


def cut_short(tag):
    os.truncate(tag / OPTIMIZER, (tag / OPTIMIZER).stat().st_size // 2)


def linked(tag):
    (tag / OPTIMIZER).rename(tag.parent / "elsewhere.pt")
    (tag / OPTIMIZER).symlink_to("../elsewhere.pt")


def compressed(tag):
    with zipfile.ZipFile(tag / MODEL) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tag / MODEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def a_shape_larger_than_the_file(tag):
    """The embedding's (61, 32) becomes (2 ** 31 - 1, 32)."""
    with zipfile.ZipFile(tag / MODEL) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tag / MODEL, "w") as archive:
        for name, data in records.items():
            if name.endswith("data.pkl"):
                assert b"K=K \x86" in data
                data = data.replace(b"K=K \x86", b"J\xff\xff\xff\x7fK \x86")
            archive.writestr(name, data)


SHAPE = {"embedding.weight": torch.Size([10**9, 10**9])}
CHANGES = {
    "damaged": cut_short,
    "a link, which leads outside": linked,
    "is compressed": compressed,
    f"{OPTIMIZER} is missing: a checkpoint of 2 ranks": lambda tag: (tag / OPTIMIZER).unlink(),
    "rank_2_mp_rank_00_optim_states.pt is missing": changed(MODEL, dp_world_size=3),
    "missing: a checkpoint of 1000000000000": changed(MODEL, dp_world_size=10**12),
    "tensor or pipeline parallelism": changed(MODEL, mp_world_size=2),
    "had divided": changed(MODEL, checkpoint_parallel_dimensions={"pp_degree": 2}),
    "mixture of experts": changed(MODEL, num_experts=[8]),
    "not laid out as DeepSpeed does it: KeyError": changed(MODEL, param_shapes=[{"unknown": torch.Size([2])}] * 2),
    "embedding.weight has more elements than": changed(MODEL, param_shapes=[SHAPE, {}]),
    "not laid out as DeepSpeed does it: Value": changed(MODEL, param_shapes=[{}]),
    "does not lie in tensor": changed_states(
        single_partition_of_fp32_groups=[torch.zeros(5632), torch.zeros(1)], group_paddings=[0, 145]
    ),
    "partitions of group 0 have the sizes": changed_states(group_paddings=[10**15, 0]),
    "not laid out as DeepSpeed does it: Type": changed_states(base_optimizer_state=5),
    "not a file of DeepSpeed's": lambda tag: rewrite(tag / MODEL, [1, 2]),
    "damaged: RuntimeError": a_shape_larger_than_the_file,
}


@distributed(world_size=1)
def test_what_is_damaged_or_of_another_kind_is_told_and_costs_nothing(tmp_path):
    tag = theirs_of(tmp_path, 2)
    for number, (message, change) in enumerate(CHANGES.items()):
        spoilt = tmp_path / str(number) / tag.name
        shutil.copytree(tag.parent, spoilt.parent)
        change(spoilt)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=message):
            DeepSpeedReader(spoilt)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, message  # KiB


@distributed(world_size=2)
def test_a_flipped_bit_is_found_before_anything_changes(tmp_path):
    engine = engine_of(configuration(1, "bf16"), seed=1)
    engine.save_checkpoint(tmp_path / "ours")
    tag = tmp_path / "theirs" / "global_step0"
    if torch.distributed.get_rank() == 0:
        with open_checkpoint(tmp_path / "ours") as reader:
            export_to_deepspeed(reader, tag.parent)
    train(engine, [0, 1])
    before = safe_get_full_fp32_param(engine.module.head.weight)
    if torch.distributed.get_rank() == 0:
        raw = bytearray((tag / OPTIMIZER).read_bytes())
        raw[len(raw) // 2] ^= 1  # in a tensor's data
        (tag / OPTIMIZER).write_bytes(raw)
        assert command(["verify", str(tag.parent)]) == 1
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=r"checksum of .*data/"):
        engine.load_checkpoint(tag.parent)
    assert torch.equal(safe_get_full_fp32_param(engine.module.head.weight), before) and engine.global_steps == 1


@distributed(world_size=1)
def test_exports_that_cannot_be_leave_nothing(tmp_path):
    saved(tmp_path / "ours", configuration(1, "bf16"), client_state={"ds_version": 3})
    (tmp_path / "there").mkdir()
    for folder, options, message in [
        ("there", {}, "exists already"),
        ("out", {}, "client_state has ds_version, which DeepSpeed keeps"),
        ("out", {"stage": 4}, "no ZeRO stage 4"),
        ("out", {"world_size": 0}, "of 0 ranks"),
    ]:
        with open_checkpoint(tmp_path / "ours") as reader, pytest.raises(CheckpointError, match=message):
            export_to_deepspeed(reader, tmp_path / folder, **options)
    model, _ = peer_model("plain")
    bare = deepspeedlite.initialize(model=model, config={"train_micro_batch_size_per_gpu": 4})[0]
    bare.save_checkpoint(tmp_path / "bare")
    with open_checkpoint(tmp_path / "bare") as reader, pytest.raises(CheckpointError, match="no optimizer"):
        export_to_deepspeed(reader, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "ours", "there"]
    assert command(["import", str(tmp_path / "ours"), str(tmp_path / "out")]) == 1
