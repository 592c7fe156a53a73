"""Model parallelism by an mpu object: two-way tensor parallel x two-way data parallel against one unsharded process."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from programs import needs
from tensor_parallel import Grid, Mlp, NewMpu, OldMpu, batch, marked, parallel_model, piece_of, whole_model

import deepspeedlite
from deepspeedlite import checkpointing
from deepspeedlite.compat.helpers import clip_grad_norm_
from deepspeedlite.engine import Engine
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.parallel.mpu import groups_of
from deepspeedlite.runtime.errors import DistributedError, LossScaleError, OptimizerError
from deepspeedlite.runtime.log import logger
from deepspeedlite.utils import groups, safe_get_full_fp32_param
from deepspeedlite.zero import GatheredParameters, Init
from deepspeedlite.zero.layout import FlatLayout

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
CLIP = 0.25
DTYPES = {
    "fp32": ({}, None, 2e-6),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16, 2e-2),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16, 2e-3),
}


def config(stage: int, dtype: str = "fp32", accumulation: int = 1, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "SGD", "params": dict(HYPER)},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 200,
            "stage3_param_persistence_threshold": 8,
            "stage3_max_reuse_distance": 0,
        },
        **DTYPES[dtype][0],
        **more,
    }


class Unsharded:
    """The whole model on one process: fp32 masters beside a model in the precision asked for."""

    def __init__(self, dtype: torch.dtype | None, seed: int = 0) -> None:
        self.model = whole_model(seed)
        self.masters = [param.detach().clone() for param in self.model.parameters()]
        self.optimizer = torch.optim.SGD(self.masters, **HYPER)
        self.dtype = dtype
        self.model.to(dtype)

    def step(self, step: int, accumulation: int, ranks: int) -> tuple[float, float]:
        """The mean loss, and the gradients' norm before clipping."""
        share = 1.0 / (accumulation * ranks)
        total = 0.0
        self.model.zero_grad()
        for micro in range(accumulation):
            for rank in range(ranks):
                x, y = batch(step, micro, rank)
                loss = self.model(x.to(self.dtype), y)
                loss.backward()
                total += loss.item() * share
        for master, param in zip(self.masters, self.model.parameters()):
            master.grad = param.grad.float() * share
        norm = torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for master, param in zip(self.masters, self.model.parameters()):
                param.copy_(master)
        return total, norm.item()


def engine_of(model, settings: dict, mpu, **more):
    engine, *_ = deepspeedlite.initialize(model=model, config=settings, mpu=mpu, **more)
    groups.initialize()  # the next test of this process has other groups
    return engine


def take_step(engine, step: int, accumulation: int = 1, dtype: torch.dtype | None = None) -> float:
    """One step on this rank's data; the mean loss of all."""
    total = torch.zeros(())
    group = engine.mpu.get_data_parallel_group()
    for micro in range(accumulation):
        x, y = batch(step, micro, dist.get_rank(group))
        loss = engine(x.to(dtype), y)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / accumulation
    dist.all_reduce(total, group=group)
    return total.item() / dist.get_world_size(group)


def assert_trained_alike(engine, reference: Unsharded, grid: Grid, tolerance: float) -> None:
    whole = dict(reference.model.named_parameters())
    with GatheredParameters(list(engine.module.parameters())):
        for name, param in engine.module.named_parameters():
            expected = piece_of(name, whole[name], grid.rank, grid.size)
            torch.testing.assert_close(param, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def everywhere(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@pytest.mark.slow_unless(stage=(0, 3), dtype=("fp32", "fp16"), accumulation=2)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(4)
def test_the_trajectory_is_the_unsharded_ones(stage, dtype, accumulation):
    grid = Grid()
    _, torch_dtype, tolerance = DTYPES[dtype]
    mpu = (OldMpu if stage % 2 else NewMpu)(grid)
    engine = engine_of(parallel_model(grid), config(stage, dtype, accumulation), mpu)
    assert engine.train_batch_size() == 4 * accumulation * 2
    assert (engine.world_size, engine.dp_world_size, engine.mp_world_size) == (4, 2, 2)
    assert (engine.get_data_parallel_rank(), engine.get_tensor_parallel_rank()) == divmod(dist.get_rank(), 2)
    assert engine.data_parallel_group is grid.data and engine.get_model_parallel_rank() == grid.rank
    reference = Unsharded(torch_dtype)
    for step in range(5):
        expected_loss, expected_norm = reference.step(step, accumulation, 2)
        assert take_step(engine, step, accumulation, torch_dtype) == pytest.approx(expected_loss, rel=tolerance)
        norm = engine.get_global_grad_norm()
        assert norm == pytest.approx(expected_norm, rel=tolerance) and norm > 2 * CLIP
        assert len(set(everywhere(norm))) == 1
    assert_trained_alike(engine, reference, grid, tolerance)


@pytest.mark.slow_unless(stage=(0, 2))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(4)
def test_an_overflow_on_one_model_parallel_rank_is_everyones(stage):
    """Of a piece that rank 1 alone has; its loss stays finite, so that no other rank's gradients show it."""
    grid = Grid()
    model = parallel_model(grid)
    engine = engine_of(model, config(stage, "fp16"), OldMpu(grid))
    take_step(engine, 0, dtype=torch.float16)
    with GatheredParameters(list(model.parameters())):
        before = [param.detach().clone() for param in model.parameters()]
    spoil = model.up.bias.register_hook(lambda grad: grad * float("inf")) if dist.get_rank() == 1 else None
    take_step(engine, 1, dtype=torch.float16)
    assert (
        everywhere((engine.skipped_steps, engine.optimizer.cur_scale, engine.was_step_applied()))
        == [(1, 256.0, False)] * 4
    )
    with GatheredParameters(list(model.parameters())):
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    if spoil is not None:
        spoil.remove()
    take_step(engine, 2, dtype=torch.float16)
    assert everywhere((engine.skipped_steps, engine.was_step_applied())) == [(1, True)] * 4


@distributed(4)
def test_a_copy_of_what_another_rank_holds_counts_nowhere():
    """As of layers that are tied over pipeline stages: here of the head, which rank 0 of each replica counts."""
    grid = Grid()
    model = parallel_model(grid)
    if grid.rank == 0:
        model.head.weight.ds_pipe_replicated = True
    engine = engine_of(model, config(1), NewMpu(grid))
    take_step(engine, 0)
    whole = whole_model()
    (sum(whole(*batch(0, 0, rank)) for rank in range(2)) / 2).backward()
    grads = [param.grad.norm() for name, param in whole.named_parameters() if name != "head.weight"]
    assert engine.get_global_grad_norm() == pytest.approx(torch.stack(grads).norm().item(), rel=2e-6)


class Partly(NewMpu):
    """Without some methods, or with others in their place."""

    def __init__(self, grid: Grid, without: tuple[str, ...] = (), **instead) -> None:
        super().__init__(grid)
        self.without, self.instead = without, instead

    def __getattribute__(self, name: str):
        if name.startswith("get_") and name in self.instead:
            return lambda: self.instead[name]
        if name.startswith("get_") and name in self.without:
            raise AttributeError(name)
        return super().__getattribute__(name)


@distributed(4)
def test_an_mpu_that_cannot_be_used_is_told_on_every_rank():
    grid = Grid()
    world = dist.group.WORLD
    model, tensor = "get_model_parallel_group", "get_tensor_model_parallel_group"
    lacking = [
        (Partly(grid, ("get_data_parallel_group",)), r"has no method get_data_parallel_group\(\)"),
        (Partly(grid, (tensor,)), rf"has no method {model}\(\) or {tensor}\(\)"),
        (
            Partly(grid, (tensor,), get_pipeline_model_parallel_world_size=2, get_model_parallel_group=grid.model),
            rf"has no method {tensor}\(\) or get_slice_parallel_group",
        ),
        (Partly(grid, get_data_parallel_group=world), r"do not make up the world of 4 ranks.*\[0, 1, 2, 3\]"),
        (Partly(grid, get_tensor_model_parallel_group=grid.data), "do not make up the world"),
        (Partly(grid, get_tensor_model_parallel_world_size=1, get_model_parallel_group=None), "do not make up the"),
        (
            Partly(
                grid,
                get_pipeline_model_parallel_world_size=2,
                get_model_parallel_group=grid.model,
                get_tensor_model_parallel_group=grid.data,
            ),
            "tensor-parallel group .* is no part of",
        ),
    ]
    for mpu, told in lacking:
        with pytest.raises(DistributedError, match=told):
            groups_of(mpu)
    mine = dist.new_group([2, 3])
    with pytest.raises(DistributedError, match=r"rank 0: rank 0 is not in the group that its own mpu.get_data_par"):
        groups_of(Partly(grid, get_data_parallel_group=mine))
    group, replica = groups_of(Partly(grid, ("get_tensor_model_parallel_group",), get_model_parallel_group=grid.model))
    assert (group.size, replica.group.size, replica.tensor.size, replica.part, replica.parts) == (2, 2, 2, grid.rank, 2)
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(4)])
    stages = Partly(
        grid,
        get_pipeline_model_parallel_world_size=2,
        get_model_parallel_group=grid.model,
        get_tensor_model_parallel_group=alone,
    )
    group, replica = groups_of(stages)
    assert (replica.group.size, replica.tensor.size, replica.name_prefix) == (2, 1, f"mp_rank_0{grid.rank}.")
    assert replica.counts(torch.ones(1))  # what a stage holds nobody else does
    _, group, replica = Engine.mpu_of(torch.nn.Identity(), None)
    assert (group.size, replica.group.size, replica.group.ranks, replica.name_prefix) == (4, 1, [dist.get_rank()], "")


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_spans_are_the_fewest_ranges_of_what_is_wanted(shards):
    layout = FlatLayout([("a", (70,), 0), ("b", (64,), 0), ("c", (3,), 1), ("d", (200,), 1)], shards)
    whole = [[(0, layout.shard_numel)]] * shards
    assert [layout.spans(index, {"a", "b", "c", "d"}) for index in range(shards)] == whole
    assert not any(layout.spans(index, ()) for index in range(shards))
    for wanted in ({"a"}, {"b", "c"}, {"a", "d"}, {"d"}):
        covered = set()
        for index in range(shards):
            found = layout.spans(index, wanted)
            assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))
            begin, _ = layout.shard(index)
            covered |= {begin + i for start, stop in found for i in range(start, stop)}
        slots = {slot.name: set(range(slot.start, slot.stop)) for slot in layout.slots}
        assert set().union(*(slots[name] for name in wanted)) <= covered
        assert not covered & set().union(*(own for name, own in slots.items() if name not in wanted))


@pytest.mark.slow_unless(stage=(2,))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(4)
def test_lambs_norms_are_those_of_whole_parameters(stage):
    """Steps are clamped nowhere, so a wrong norm of a piece would scale every step of it."""
    grid = Grid()
    lamb = {"lr": 0.02, "weight_decay": 0.01, "max_coeff": 100.0, "min_coeff": 1e-3}
    settings = config(stage, optimizer={"type": "Lamb", "params": lamb})
    engine = engine_of(parallel_model(grid), settings, OldMpu(grid))
    reference = Unsharded(None)
    reference.optimizer = FusedLamb(reference.masters, **lamb)
    for step in range(4):
        reference.step(step, 1, 2)
        take_step(engine, step)
    assert_trained_alike(engine, reference, grid, 5e-6)


@distributed(4)
def test_lamb_refuses_pieces_that_would_be_stepped_apart():
    grid = Grid()
    settings = config(1, optimizer={"type": "Lamb", "params": {"lr": 0.02}})
    model = parallel_model(grid)
    model.up.bias.model_parallel = grid.rank == 0
    with pytest.raises(OptimizerError, match="pieces of one size"):
        engine_of(model, settings, OldMpu(grid))
    groups.initialize()


OFFLOADS = {
    "optimizer": lambda path: {"offload_optimizer": {"device": "cpu"}},
    "nvme": lambda path: {
        "offload_optimizer": {"device": "nvme", "nvme_path": path},
        "offload_param": {"device": "nvme", "nvme_path": path},
    },
}


@needs("c++")
@pytest.mark.slow_unless(kind="nvme")
@pytest.mark.parametrize("kind", OFFLOADS)
@distributed(4)
def test_offloaded_states_give_the_same_trajectory(tmp_path, kind):
    grid = Grid()
    found = []
    for offload in ({}, OFFLOADS[kind](str(tmp_path))):
        settings = config(3, "bf16", optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        settings["zero_optimization"] |= offload
        engine = engine_of(parallel_model(grid), settings, OldMpu(grid))
        losses = [take_step(engine, step, dtype=torch.bfloat16) for step in range(3)]
        found.append((*losses, engine.get_global_grad_norm()))
        engine.destroy()
    assert found[0] == found[1] and len(set(everywhere(found[1]))) == 1


@pytest.mark.parametrize("given", [True, False])
@distributed(4)
def test_models_built_sharded_belong_to_the_groups_of_the_mpu(given):
    grid = Grid()
    mpu = OldMpu(grid)
    if not given:
        with Init():
            model = Mlp(grid.model)
        with pytest.raises(DistributedError, match=r"bias over ranks \[0, 1, 2, 3\].*give zero.Init\(mpu="):
            engine_of(model, config(3), mpu)
        return
    plain = parallel_model(grid)
    with Init(config_dict_or_path=config(3), mpu=mpu):
        model = Mlp(grid.model)
    first = dist.get_process_group_ranks(grid.data)[0]
    with GatheredParameters(list(model.parameters()), modifier_rank=first), torch.no_grad():
        for name, param in plain.named_parameters() if dist.get_rank() == first else ():
            model.get_parameter(name).copy_(param)
    engine = engine_of(marked(model), config(3), mpu)
    with GatheredParameters(list(model.parameters())):
        for name, value in whole_model().named_parameters():
            assert torch.equal(model.get_parameter(name), piece_of(name, value, grid.rank, 2)), name
    reference = Unsharded(None)
    for step in range(2):
        expected, _ = reference.step(step, 1, 2)
        assert take_step(engine, step) == pytest.approx(expected, rel=2e-6)
    name, param = next((n, p) for n, p in model.named_parameters() if n == "down.weight")
    whole = dict(reference.model.named_parameters())[name]
    torch.testing.assert_close(safe_get_full_fp32_param(param), piece_of(name, whole, grid.rank, 2))


@distributed(2)
def test_gradients_are_clipped_by_hand_with_an_mpu_of_either_age():
    for kind in (OldMpu, NewMpu):
        grid = Grid()
        model, whole = parallel_model(grid), whole_model()
        for loss in (model(*batch(0, 0, 0)), whole(*batch(0, 0, 0))):
            loss.backward()
        norm = clip_grad_norm_(model.parameters(), 0.1, mpu=kind(grid))
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1).item(), rel=2e-6)
        for name, param in whole.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, piece_of(name, param.grad, grid.rank, 2))


@distributed(4)
def test_a_diverged_run_is_named_alike_on_all_ranks():
    grid = Grid()
    model = parallel_model(grid)
    engine = engine_of(
        model, config(2, fp16={"enabled": True, "initial_scale_power": 0, "hysteresis": 1}), OldMpu(grid)
    )
    if dist.get_rank() == 1:
        model.up.bias.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(LossScaleError, match=r"belong to: mp_rank_01.up.bias\. "):
        take_step(engine, 0, dtype=torch.float16)


@distributed(4)
def test_data_is_given_by_data_parallel_rank_and_accumulates_without_averaging():
    grid = Grid()
    data = torch.utils.data.TensorDataset(torch.arange(32.0).repeat(7, 1).t(), torch.zeros(32, 7))
    engine, _, loader, _ = deepspeedlite.initialize(
        model=parallel_model(grid), config=config(1, accumulation=2), mpu=NewMpu(grid), training_data=data
    )
    groups.initialize()
    drawn = [x[:, 0].tolist() for x, _ in loader]
    assert len(loader) == 4 and len(set(map(str, everywhere(drawn)))) == 2
    own, other = (everywhere(drawn)[rank] for rank in dist.get_process_group_ranks(grid.model))
    assert own == other
    assert sorted(number for part in everywhere(drawn)[::2] for few in part for number in few) == list(range(32))
    with engine.no_sync():
        engine.backward(engine(*batch(0, 0, dist.get_rank(grid.data))))
    engine.step()
    engine.backward(engine(*batch(0, 1, dist.get_rank(grid.data))))
    engine.step()
    _, norm = Unsharded(None).step(0, 2, 2)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=2e-6)


@distributed(4)
def test_pieces_that_nobody_has_marked_are_told_of(tmp_path):
    grid = Grid()
    model = parallel_model(grid)
    del model.up.weight.model_parallel
    model.up.bias.model_parallel = False
    told = logging.FileHandler(tmp_path / f"log{dist.get_rank()}")
    logger.addHandler(told)
    try:
        engine_of(model, config(0), OldMpu(grid))
    finally:
        logger.removeHandler(told)
        told.close()
    text = (tmp_path / f"log{dist.get_rank()}").read_text()
    assert ("not marked as pieces" in text and "from one rank: up.weight, up.bias;" in text) == (grid.rank == 0)


class Checkpointed(torch.nn.Module):
    """The MLP twice, recomputed; what is kept of its inputs is a part on each model-parallel rank."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x, y):
        hidden = checkpointing.checkpoint(lambda x: torch.tanh(self.mlp.head(x)), x)
        return checkpointing.checkpoint(self.mlp, hidden, y)


class Twice(Checkpointed):
    """The same without recomputation."""

    def forward(self, x, y):
        return self.mlp(torch.tanh(self.mlp.head(x)), y)


@pytest.mark.parametrize("partition", [False, True])
@distributed(4)
def test_activation_checkpointing_within_such_an_engine(partition):
    grid = Grid()
    model = Checkpointed(parallel_model(grid))
    mpu = NewMpu(grid)
    checkpointing.configure(mpu, partition_activations=partition)
    engine = engine_of(model, config(2), mpu)
    plain = engine_of(Twice(parallel_model(grid)), config(2), mpu)
    for step in range(3):
        assert take_step(engine, step) == pytest.approx(take_step(plain, step), rel=1e-6)
        assert engine.get_global_grad_norm() == pytest.approx(plain.get_global_grad_norm(), rel=1e-6)
    checkpointing.configure(None)


@distributed(4)
def test_every_rank_hears_of_models_that_differ():
    """Of ranks 1 and 3, which average their gradients; 0 and 2 would wait for them."""
    grid = Grid()
    model = parallel_model(grid)
    if dist.get_rank() == 3:
        model.head = torch.nn.Linear(7, 7, bias=False)
    with pytest.raises(DistributedError, match=r"head\.bias is \(7,\) .*on rank 1 and not there on rank 3"):
        engine_of(model, config(0), NewMpu(grid))
    groups.initialize()


@pytest.mark.parametrize("stage", [0, 1])
@distributed(4)
def test_rank_0_writes_the_norm_that_all_have_taken(tmp_path, stage):
    """Without clipping nothing else takes it, and taking it is a collective."""
    grid = Grid()
    csv = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = engine_of(parallel_model(grid), config(stage, csv_monitor=csv, gradient_clipping=0), OldMpu(grid))
    for step in range(2):
        take_step(engine, step)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    if dist.get_rank() == 0:
        *_, last = (tmp_path / "job" / "Train_Samples_grad_norm.csv").read_text().splitlines()
        assert float(last.split(",")[1]) == pytest.approx(norm, rel=1e-6)
