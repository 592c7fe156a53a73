"""Training on the engine follows an unsharded torch loop (helpers/unsharded.py): losses, and weights after 20 steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens
from pairwise import each_pair
from unsharded import DTYPES, LOSS_ATOL, STEPS, WEIGHT_ATOL, engine_config, reference

import deepspeedlite


def train(engine, accumulation: int, rank: int, how: str = "engine") -> list[float]:
    losses = []
    for step in range(STEPS):
        mine = []
        for micro in range(accumulation):
            loss = engine(*tokens(step, micro, rank))
            if how == "engine":
                engine.backward(loss)
            else:
                loss.backward()
            engine.step()
            mine.append(loss.item())
        losses.append(sum(mine) / len(mine))
    return losses


def full_weights(engine) -> dict[str, torch.Tensor]:
    """The fp32 weights behind the model, put together from every rank's masters."""
    found = {}
    for unit, runs in zip(engine._reducer.units, engine.optimizer._runs_of_units):
        mine = torch.zeros(unit.layout.shard_numel)
        first, _ = unit.layout.shard(unit.flat.index)
        for (cut, _, _), run in zip(unit.runs(), runs):
            mine[cut.start - first : cut.stop - first] = run.master
        whole = torch.cat(engine._parts.group.all_gather_objects(mine)[: unit.layout.shard_count])
        for slot in unit.layout.slots:
            found[slot.name] = whole[slot.start : slot.stop].view(slot.shape)
    return found


def check_against_reference(weights, losses, dtype, accumulation, clip, world_size) -> None:
    expected_losses, expected_weights = reference(dtype, accumulation, clip, world_size)
    assert max(abs(a - b) for a, b in zip(losses, expected_losses)) <= LOSS_ATOL[dtype]
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        worst = (weights[name] - expected).abs().max().item()
        assert worst <= WEIGHT_ATOL[dtype], f"{name} is off by {worst}"
    assert expected_losses[-1] != expected_losses[0]


@pytest.mark.slow_unless(world_size=2, accumulation=3, clip=True, stage=(2, 3))
@each_pair(  # and every three
    3,
    always=[(stage, dtype, 3, True, 2) for stage in range(4) for dtype in DTYPES],
    stage=range(4),
    dtype=DTYPES,
    accumulation=[1, 3],
    clip=[False, True],
    world_size=[1, 2, 3, 4],
)
@distributed(world_size=None)
def test_twenty_steps(stage, dtype, accumulation, clip, world_size):
    zero = {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 64}
    config = engine_config(dtype, accumulation, clip, zero_optimization=zero)
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config)
    losses = train(engine, accumulation, dist.get_rank())
    check_against_reference_on_rank_0(engine, losses, dtype, accumulation, clip, world_size)
    assert engine.global_steps == STEPS and engine.skipped_steps == 0
    assert engine.micro_steps == STEPS * accumulation


def check_against_reference_on_rank_0(engine, losses, dtype, accumulation, clip, world_size) -> None:
    weights = full_weights(engine)
    if dist.get_rank() == 0:
        check_against_reference(weights, losses, dtype, accumulation, clip, world_size)
    mine = torch.cat([w.flatten() for w in weights.values()])
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    assert torch.equal(mine, theirs), "the ranks' weights have drifted apart"


@pytest.mark.slow_unless(accumulation=3)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@distributed(world_size=2)
def test_plain_loss_backward_follows_the_same_path(dtype, accumulation):
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=engine_config(dtype, accumulation, clip=True))
    losses = train(engine, accumulation, dist.get_rank(), how="plain")
    check_against_reference_on_rank_0(engine, losses, dtype, accumulation, True, 2)


@pytest.mark.slow_unless(how=("no overlap", "prescale", "bf16 on the wire"))
@pytest.mark.parametrize(
    "how", ["no overlap", "one bucket", "fp32 gradients", "predivide", "prescale", "bf16 on the wire"]
)
@distributed(world_size=3)
def test_ways_to_average_agree(how):
    """Whatever the buckets, the accumulation dtype or where the division is done, the average is the average."""
    dtype = "bf16" if how in ("fp32 gradients", "prescale") else "fp32"
    more = {
        "no overlap": {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 4000}},
        "one bucket": {"zero_optimization": {"reduce_bucket_size": int(5e8)}},
        "fp32 gradients": {"data_types": {"grad_accum_dtype": "fp32"}},
        "predivide": {"gradient_predivide_factor": 2.0},
        "prescale": {"prescale_gradients": True},
        "bf16 on the wire": {"communication_data_type": "bf16"},
    }[how]
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=engine_config(dtype, 2, True, **more))
    losses = train(engine, 2, dist.get_rank())
    tolerance = "bf16" if how == "bf16 on the wire" else dtype
    if dist.get_rank() == 0:
        expected, _ = reference(dtype, 2, True, 3)
        assert max(abs(a - b) for a, b in zip(losses, expected)) <= LOSS_ATOL[tolerance]


@distributed(world_size=1)
def test_bf16_alone_is_bit_for_bit():
    """With one rank and no accumulation nothing is summed, so the masters equal the reference's exactly, unfused."""
    config = engine_config("bf16", 1, clip=False)
    config["optimizer"]["params"] |= {"fused": False, "foreach": False}
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config)
    losses = train(engine, 1, 0)
    expected_losses, expected = reference("bf16", 1, False, 1)
    assert losses == expected_losses
    weights = full_weights(engine)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("autocast_dtype", ["bfloat16", "float16"])
@distributed(world_size=2)
def test_torch_autocast_keeps_fp32_weights_and_trains(autocast_dtype):
    config = engine_config("fp32", 1, True, torch_autocast={"enabled": True, "dtype": autocast_dtype})
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config)
    seen = []
    engine.module.up[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = train(engine, 1, dist.get_rank())
    assert set(seen) == {getattr(torch, autocast_dtype)}
    assert all(p.dtype == torch.float32 for p in engine.parameters())
    if dist.get_rank() == 0:
        expected, _ = reference("fp32", 1, True, 2)
        skipped = engine.skipped_steps
        assert math.isclose(losses[-1], expected[-1 - skipped], abs_tol=3e-2)


@distributed(world_size=2)
def test_several_groups_keep_their_own_lr_and_decay():
    """Param groups of one optimizer are runs of one buffer; each must see only its own hyperparameters."""
    model, plain = tied_model(), tied_model()

    def groups(m):
        decay = [p for p in m.parameters() if p.ndim > 1]
        rest = [p for p in m.parameters() if p.ndim <= 1]
        return [{"params": rest, "weight_decay": 0.0, "lr": 5e-3}, {"params": decay, "weight_decay": 0.2}]

    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    expected = torch.optim.AdamW(groups(plain), lr=1e-3)
    engine, wrapped, *_ = deepspeedlite.initialize(
        model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0}
    )
    assert wrapped.optimizer is optimizer
    for step in range(5):
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()
        expected.zero_grad()
        (sum(plain(*tokens(step, 0, rank)) for rank in range(2)) / 2).backward()
        expected.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=2e-6), name
