"""What users read and write of sharded state (`deepspeedlite.utils.safe_*`) is what an unsharded torch run holds.

The reference holds fp32 masters and a copy of the model in the trained dtype, runs every rank's batch in one process,
averages the gradients in fp32 and steps a plain optimizer. Epsilon is large, so that an update shows the scale of its
gradient. Sizes are odd, and shards end inside parameters.
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite import utils
from deepspeedlite.comm import Group
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.runtime.errors import DeepSpeedLiteError, EngineStateError, OptimizerError
from deepspeedlite.zero.flat_params import FlatParams, ParamState, owner_of
from deepspeedlite.zero.unit import unit_of
from deepspeedlite.zero.wrap import NamedParameter

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.05}
LAMB = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.05, "max_coeff": 5.0}
LOSS_SCALE = 128.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest error, as a share of the tensor's largest element. fp32 differs from the reference by the order of sums.
# In 16 bits each rank's gradient and their average are rounded to 2^-9 (bf16) or 2^-12 of their size, and the models,
# which follow slightly different masters, differ likewise.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-3}
STATES = ("exp_avg", "exp_avg_sq")


class Net(nn.Module):
    """Returns the loss. `frozen` is not trained; `first` and `last` are so large that shards cut through them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 37)
        self.frozen = nn.Linear(37, 37)
        self.norm = nn.LayerNorm(37)
        self.last = nn.Linear(37, 11)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype) if self.first.weight.numel() else x.to(self.norm.weight.dtype)
        out = self.last(torch.tanh(self.norm(self.frozen(self.first(x)))))
        return ((out.float() - x.float().sum(1, keepdim=True).sin()) ** 2).mean() * 3


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, rank: int, micro: int = 0) -> Tensor:
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(1009 * step + 31 * micro + rank))


def engine_of(model: nn.Module, stage: int, dtype: str = "fp32", optimizer: str = "AdamW", accumulation: int = 1):
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": optimizer, "params": dict(LAMB if optimizer == "Lamb" else HYPER)},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 400, "stage3_param_persistence_threshold": 40},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    return deepspeedlite.initialize(model=model, config=config)[0]


def trained(engine) -> dict[str, nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def run_backward(engine, step: int, micro: int = 0) -> None:
    engine.backward(engine(batch(step, dist.get_rank(), micro)))


class Reference:
    """The same training, unsharded and in this process."""

    def __init__(self, dtype: str = "fp32", optimizer: str = "AdamW", seed: int = 0) -> None:
        self.model = net(seed).to(DTYPES[dtype])
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.masters = {name: p.detach().float().clone() for name, p in net(seed).named_parameters() if p.requires_grad}
        for name, master in self.masters.items():
            master.copy_(self.params[name].detach())
        kind, hyper = (FusedLamb, LAMB) if optimizer == "Lamb" else (torch.optim.AdamW, HYPER)
        self.optimizer = kind(list(self.masters.values()), **hyper)

    def backward(self, step: int) -> None:
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for rank in range(dist.get_world_size()):
            self.model.zero_grad()
            (self.model(batch(step, rank)) * LOSS_SCALE).backward()
            for name, param in self.params.items():
                self.masters[name].grad += param.grad.float() / (LOSS_SCALE * dist.get_world_size())

    @torch.no_grad()
    def show(self) -> None:
        """Copy the masters to the model."""
        for name, param in self.params.items():
            param.copy_(self.masters[name])

    def step(self) -> None:
        self.optimizer.step()
        self.show()

    def state(self, name: str, key: str) -> Tensor:
        return self.optimizer.state[self.masters[name]][key]


def assert_shards_cut_parameters(engine) -> None:
    """Otherwise a test with these sizes says little."""
    cut = False
    for unit in engine._reducer.units:
        inner = [k * unit.layout.shard_numel for k in range(1, unit.layout.shard_count)]
        cut |= any(slot.start < edge < slot.stop for slot in unit.layout.slots for edge in inner)
    assert cut == (engine.zero_optimization_stage() > 0)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    worst = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert worst <= tolerance, f"off by {worst} of the largest element"


def assert_fragments_make(fragment: Tensor, whole: Tensor, is_split: bool) -> None:
    """The ranks' parts, one after another, are the whole, and zeros behind it at stage 3."""
    assert fragment.dim() == 1 and fragment.dtype == torch.float32
    pieces = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, fragment)
    joined = torch.cat(pieces) if is_split else fragment
    assert torch.equal(joined[: whole.numel()], whole.flatten()) and not joined[whole.numel() :].any()
    assert len({len(piece) for piece in pieces}) == 1 or joined.numel() == whole.numel()


def drawn(like: Tensor, seed: int) -> Tensor:
    """Values that no 16-bit dtype holds exactly, the same on every rank."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def model_values(param: nn.Parameter) -> Tensor:
    """A copy of what the model computes with; collective."""
    owner = owner_of(param)
    owner.begin_use()
    values = param.detach().clone()
    owner.end_use()
    return values


def on_all_stages(test):
    return pytest.mark.parametrize("stage", [0, 1, 2, 3])(pytest.mark.parametrize("dtype", ["fp32", "bf16"])(test))


def check_reading(engine, reference: Reference, dtype: str, steps: int = 3) -> None:
    tolerance, is_split = TOLERANCE[dtype], engine.zero_optimization_stage() > 0
    assert_shards_cut_parameters(engine)
    for param in trained(engine).values():
        assert utils.safe_get_full_grad(param) is None and utils.safe_get_local_grad(param) is None
        assert utils.safe_get_full_optimizer_state(param, "exp_avg") is None
    for step in range(steps):
        run_backward(engine, step)
        reference.backward(step)
        for name, param in trained(engine).items():
            grad = utils.safe_get_full_grad(param)
            assert grad.dtype == torch.float32
            assert_near(grad, reference.masters[name].grad, tolerance)
            assert_fragments_make(utils.safe_get_local_grad(param), grad, is_split)
        engine.step()
        reference.step()
        for name, param in trained(engine).items():
            assert utils.safe_get_full_grad(param) is None
            master = utils.safe_get_full_fp32_param(param)
            assert_near(master, reference.masters[name], tolerance)
            assert_fragments_make(utils.safe_get_local_fp32_param(param), master, is_split)
            assert torch.equal(model_values(param), master.to(param.dtype))
            for key in STATES:
                state = utils.safe_get_full_optimizer_state(param, key)
                assert_near(state, reference.state(name, key), tolerance)
                assert_fragments_make(utils.safe_get_local_optimizer_state(param, key), state, is_split)
    if dtype != "fp32":  # what is read is the master, not the model's rounded copy of it
        master = utils.safe_get_full_fp32_param(engine.module.first.weight)
        assert not torch.equal(master, master.to(DTYPES[dtype]).float())
    engine.destroy()


@pytest.mark.slow_unless(dtype="bf16", stage=(1, 3))
@on_all_stages
@distributed(world_size=2)
def test_what_is_read_follows_torch(stage, dtype):
    check_reading(engine_of(net(), stage, dtype), Reference(dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=3)
def test_the_loss_scale_is_taken_out_on_three_ranks(stage):
    check_reading(engine_of(net(), stage, "fp16"), Reference("fp16"), "fp16")


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=2)
def test_states_of_lamb(stage):
    check_reading(engine_of(net(), stage, optimizer="Lamb"), Reference(optimizer="Lamb"), "fp32")


@pytest.mark.slow_unless(stage=(1, 3))
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_what_was_written_is_read(stage, dtype):
    engine = engine_of(net(), stage, dtype)
    run_backward(engine, 0)
    engine.step()
    run_backward(engine, 1)
    rounded = DTYPES[dtype]  # gradients are held in the model's dtype
    for seed, param in enumerate(trained(engine).values()):
        value, grad, state = (drawn(utils.safe_get_full_fp32_param(param), seed + k) for k in (0, 50, 100))
        utils.safe_set_full_fp32_param(param, value)
        utils.safe_set_full_grad(param, grad)
        utils.safe_set_full_optimizer_state(param, state, "exp_avg")
        assert torch.equal(utils.safe_get_full_fp32_param(param), value)
        assert torch.equal(model_values(param), value.to(rounded))
        assert torch.equal(utils.safe_get_full_grad(param), grad.to(rounded).float())
        assert torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg"), state)
    for seed, param in enumerate(trained(engine).values()):  # nothing ran over its neighbour
        value = utils.safe_get_full_fp32_param(param)
        assert torch.equal(value, drawn(value, seed))
        assert torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg"), drawn(value, seed + 100))
    for unit in engine._reducer.units:
        for run, master in zip(unit.layout.runs(unit.flat.index), unit.masters):
            owned = sum(segment.stop - segment.start for segment in unit.layout.segments(run))
            assert (master == 0).sum() == run.numel - owned, "padding was written to"
    engine.destroy()


@pytest.mark.slow_unless(stage=(1, 3))
@on_all_stages
@distributed(world_size=2)
def test_fragments_written_are_read(stage, dtype):
    engine = engine_of(net(), stage, dtype)
    run_backward(engine, 0)
    engine.step()
    run_backward(engine, 1)
    for param in trained(engine).values():
        full = utils.safe_get_full_fp32_param(param)
        grad, state = utils.safe_get_full_grad(param), utils.safe_get_full_optimizer_state(param, "exp_avg_sq")
        utils.safe_set_local_fp32_param(param, utils.safe_get_local_fp32_param(param) + 0.3)
        utils.safe_set_local_grad(param, utils.safe_get_local_grad(param) * -2)
        utils.safe_set_local_optimizer_state(
            param, utils.safe_get_local_optimizer_state(param, "exp_avg_sq") * 4, "exp_avg_sq"
        )
        assert torch.equal(utils.safe_get_full_fp32_param(param), full + 0.3)
        assert torch.equal(utils.safe_get_full_grad(param), grad * -2)
        assert torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg_sq"), state * 4)
        values = model_values(param)
        assert torch.equal(values, (full + 0.3).to(param.dtype)), "the model's values differ between ranks"
    engine.destroy()


@pytest.mark.slow_unless(stage=(1, 3))
@on_all_stages
@distributed(world_size=2)
def test_training_goes_on_from_what_was_written(stage, dtype):
    engine, reference = engine_of(net(), stage, dtype), Reference(dtype)
    for step in range(3):
        run_backward(engine, step)
        reference.backward(step)
        if step == 1:
            utils.safe_update_full_grad_vectorized(trained(engine).values(), lambda grad, param: grad * -8)
            for master in reference.masters.values():
                master.grad *= -8
        engine.step()
        reference.step()
        if step == 0:
            for seed, (name, param) in enumerate(trained(engine).items()):
                value, state = drawn(reference.masters[name], seed), drawn(reference.masters[name], seed + 100)
                utils.safe_set_full_fp32_param(param, value)
                utils.safe_set_full_optimizer_state(param, state, "exp_avg")
                reference.masters[name].copy_(value)
                reference.state(name, "exp_avg").copy_(state)
            reference.show()
    for name, param in trained(engine).items():
        ours = utils.safe_get_full_fp32_param(param)
        assert_near(ours, reference.masters[name], TOLERANCE[dtype])
        assert_near(
            utils.safe_get_full_optimizer_state(param, "exp_avg"), reference.state(name, "exp_avg"), TOLERANCE[dtype]
        )
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_values_that_are_whole_at_the_time_are_written_too(stage):
    engine = engine_of(net(), stage, "bf16")
    param = engine.module.first.weight
    owner = owner_of(param)
    owner.begin_use()
    assert owner.state is ParamState.UNSHARDED
    full = utils.safe_get_full_fp32_param(param)
    utils.safe_set_full_fp32_param(param, full + 0.3)
    assert torch.equal(param, (full + 0.3).bfloat16())
    utils.safe_set_local_fp32_param(param, utils.safe_get_local_fp32_param(param) + 0.3)
    assert torch.equal(param, (full + 0.3 + 0.3).bfloat16())
    owner.end_use()
    owner.unshard()  # under way while the next value is written
    utils.safe_set_full_fp32_param(param, full - 0.7)
    assert torch.equal(model_values(param), (full - 0.7).bfloat16())
    assert torch.equal(utils.safe_get_full_fp32_param(param), full - 0.7)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_gradients_inside_an_accumulation_window(stage):
    """Stages 2 and 3 average in every pass; before the others do, the rank's own accumulation is read."""
    engine = engine_of(net(), stage, accumulation=2)
    everyone = range(dist.get_world_size()) if stage >= 2 else [dist.get_rank()]
    for micro in range(2):
        run_backward(engine, 0, micro)
        ranks = everyone if micro == 0 else range(dist.get_world_size())
        plain = net()
        for rank in ranks:
            for part in range(micro + 1):
                (plain(batch(0, rank, part)) / (2 * len(ranks))).backward()
        for name, param in trained(engine).items():
            assert_near(utils.safe_get_full_grad(param), plain.get_parameter(name).grad, TOLERANCE["fp32"])
            is_none = utils.safe_get_local_grad(param) is None
            assert is_none == (micro == 0 and stage == 1)
        engine.step()
    assert utils.safe_get_full_grad(engine.module.last.bias) is None
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_a_gradient_written_inside_a_window_counts_in_the_average(stage):
    engine = engine_of(net(), stage, accumulation=2)
    run_backward(engine, 0, 0)
    for param in trained(engine).values():
        utils.safe_set_full_grad(param, torch.full_like(utils.safe_get_full_fp32_param(param), 0.25))
    engine.step()
    run_backward(engine, 0, 1)
    plain = net()
    for rank in range(2):
        (plain(batch(0, rank, 1)) / 4).backward()
    for name, param in trained(engine).items():
        expected = plain.get_parameter(name).grad + 0.25
        assert_near(utils.safe_get_full_grad(param), expected, TOLERANCE["fp32"])
    engine.destroy()


class OneOrBoth(nn.Module):
    """Two layers of one bucket, of which a pass may leave out the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return (self.second(self.first(x)) if both else self.first(x)).sum()


@pytest.mark.parametrize("stage", [0, 1])
@distributed(world_size=2)
def test_a_parameter_without_gradient_in_a_window_has_none(stage):
    torch.manual_seed(0)
    engine = engine_of(OneOrBoth(), stage, accumulation=3)
    first, second = engine.module.first.weight, engine.module.second.weight
    engine.backward(engine(batch(0, 0), True))
    engine.zero_grad()  # what is left in memory is not a gradient
    engine.backward(engine(batch(1, 0), False))
    assert utils.safe_get_full_grad(first).abs().max() > 0
    assert utils.safe_get_full_grad(second) is None
    with pytest.raises(EngineStateError, match=r"second\.weight has no averaged gradient to write"):
        utils.safe_set_full_grad(second, torch.zeros(7, 7))
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_half_averaged_gradients_are_refused(stage):
    engine = engine_of(net(), stage)
    run_backward(engine, 0)
    with engine.no_sync():
        run_backward(engine, 1)
    with pytest.raises(EngineStateError, match=r"first\.weight is averaged .* but for"):
        utils.safe_get_full_grad(engine.module.first.weight)
    engine.destroy()


@distributed(world_size=2)
def test_gradients_are_not_read_during_the_backward_pass():
    engine = engine_of(net(), 2)
    param = engine.module.last.bias
    loss = engine(batch(0, dist.get_rank()))
    loss.register_hook(lambda grad: utils.safe_get_full_grad(param))
    with pytest.raises(EngineStateError, match=r"last\.bias .* while a backward pass"):
        engine.backward(loss)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
@distributed(world_size=2)
def test_two_engines_are_kept_apart(stage):
    """The same names, other weights, and another loss scale."""
    models = {"fp32": net(seed=1), "fp16": net(seed=2)}
    engines = {dtype: engine_of(model, stage, dtype) for dtype, model in models.items()}
    references = {"fp32": Reference("fp32", seed=1), "fp16": Reference("fp16", seed=2)}
    for dtype, engine in engines.items():
        run_backward(engine, 0)
        references[dtype].backward(0)
    for dtype, engine in engines.items():
        for name, param in trained(engine).items():
            expected = references[dtype].masters[name].grad
            assert_near(utils.safe_get_full_grad(param), expected, TOLERANCE[dtype])
    engines["fp32"].step()
    references["fp32"].step()
    for name, param in trained(engines["fp32"]).items():
        state = utils.safe_get_full_optimizer_state(param, "exp_avg")
        assert_near(state, references["fp32"].state(name, "exp_avg"), TOLERANCE["fp32"])
        utils.safe_set_full_fp32_param(param, torch.zeros_like(state))
    for name, param in trained(engines["fp16"]).items():
        assert utils.safe_get_full_optimizer_state(param, "exp_avg") is None
        assert torch.equal(utils.safe_get_full_fp32_param(param), references["fp16"].masters[name])
    engines["fp32"].destroy()
    engines["fp16"].step()  # the other engine's end is not this one's
    assert utils.safe_get_full_optimizer_state(engines["fp16"].module.last.bias, "exp_avg").shape == (11,)
    engines["fp16"].destroy()


@pytest.mark.slow
@distributed(world_size=2)
def test_a_part_that_one_rank_asks_for_alone_is_an_error_within_seconds():
    engine = engine_of(nn.Linear(11, 3, bias=False), 3)
    param = engine.module.weight
    if dist.get_rank() == 0:
        with pytest.raises(EngineStateError, match=r"own part of weight was asked for on rank 0, and not on rank 1"):
            utils.safe_get_local_fp32_param(param)
    dist.barrier()
    assert utils.safe_get_local_fp32_param(param).shape == (17,)
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=3)
def test_ranks_that_hold_nothing_take_part(stage):
    """Eleven elements lie on rank 0 alone; the others have no run, and so no states to tell of."""
    torch.manual_seed(0)
    model = nn.Linear(11, 1, bias=False)
    engine = engine_of(model, stage)
    rank, param = dist.get_rank(), model.weight
    assert len(unit_of(param).masters) == (1 if rank == 0 else 0)
    assert utils.safe_get_full_optimizer_state(param, "exp_avg") is None
    engine.backward(engine(torch.full((1, 11), rank + 1.0)).sum())
    assert_near(utils.safe_get_full_grad(param), torch.full((1, 11), 2.0), TOLERANCE["fp32"])
    here = (4,) if stage == 3 else (11,) if rank == 0 else (0,)
    assert utils.safe_get_local_grad(param).shape == here
    engine.step()
    assert_near(utils.safe_get_full_optimizer_state(param, "exp_avg"), torch.full((1, 11), 0.2), TOLERANCE["fp32"])
    held = utils.safe_get_local_optimizer_state(param, "exp_avg")
    assert held.shape == here
    with pytest.raises(OptimizerError, match=r"'momentum_buffer' .* exp_avg, exp_avg_sq"):
        utils.safe_get_full_optimizer_state(param, "momentum_buffer")
    whole = torch.arange(11.0).view(1, 11)
    utils.safe_set_full_fp32_param(param, whole)
    utils.safe_set_full_optimizer_state(param, -whole, "exp_avg")
    utils.safe_set_local_fp32_param(param, utils.safe_get_local_fp32_param(param) + 1)
    utils.safe_set_local_optimizer_state(param, held, "exp_avg_sq")
    assert torch.equal(utils.safe_get_full_fp32_param(param), whole + 1)
    assert torch.equal(model_values(param), whole + 1)
    assert torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg"), -whole)
    engine.destroy()


@distributed(world_size=2)
def test_every_bit_is_kept():
    engine = engine_of(net(), 2)
    param = engine.module.norm.weight
    odd = torch.tensor([-0.0, float("inf"), float("-inf"), 1e-45, float("nan")]).repeat(8)[:37]
    utils.safe_set_full_fp32_param(param, odd)
    assert torch.equal(utils.safe_get_full_fp32_param(param).view(torch.int32), odd.view(torch.int32))
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
@distributed(world_size=2)
def test_what_is_read_is_a_copy(stage):
    engine = engine_of(net(), stage)
    run_backward(engine, 0)
    engine.step()
    run_backward(engine, 1)
    param = engine.module.first.weight
    readers = [
        utils.safe_get_full_fp32_param,
        utils.safe_get_local_fp32_param,
        utils.safe_get_full_grad,
        utils.safe_get_local_grad,
        lambda p: utils.safe_get_full_optimizer_state(p, "exp_avg"),
        lambda p: utils.safe_get_local_optimizer_state(p, "exp_avg"),
    ]
    for read in readers:
        kept = read(param).clone()
        read(param).fill_(7.0)
        assert torch.equal(read(param), kept)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_mistakes_are_named(stage):
    engine = engine_of(net(), stage)
    param, frozen = engine.module.first.weight, engine.module.frozen.weight
    with pytest.raises(OptimizerError, match=r"first\.weight needs a value of shape \(37, 7\) here, not \(259,\)"):
        utils.safe_set_full_fp32_param(param, torch.zeros(259))
    with pytest.raises(OptimizerError, match=r"first\.weight needs .* not float"):
        utils.safe_set_full_fp32_param(param, 0.5)
    with pytest.raises(OptimizerError, match=r"needs a value of shape \(\d+,\) here, not \(37, 7\)"):
        utils.safe_set_local_fp32_param(param, torch.zeros(37, 7))
    with pytest.raises(EngineStateError, match=r"first\.weight has no averaged gradient to write"):
        utils.safe_set_full_grad(param, torch.zeros(37, 7))
    with pytest.raises(EngineStateError, match=r"first\.weight has no optimizer states yet"):
        utils.safe_set_full_optimizer_state(param, torch.zeros(37, 7), "exp_avg")
    run_backward(engine, 0)
    engine.step()
    with pytest.raises(OptimizerError, match=r"no state 'step' .* keeps exp_avg, exp_avg_sq"):
        utils.safe_get_full_optimizer_state(param, "step")
    with pytest.raises(ValueError, match=r"no state 'exp_avgs' .* keeps exp_avg, exp_avg_sq"):
        utils.safe_set_full_optimizer_state(param, torch.zeros(37, 7), "exp_avgs")

    assert utils.safe_get_full_fp32_param(frozen) is None and utils.safe_get_local_grad(frozen) is None
    assert utils.safe_get_full_optimizer_state(frozen, "exp_avg") is None
    with pytest.raises(EngineStateError, match=r"shape \(37, 37\) is frozen"):
        utils.safe_set_full_fp32_param(frozen, torch.zeros(37, 37))
    with pytest.raises(EngineStateError, match=r"no engine trains this Parameter of shape \(3,\)"):
        utils.safe_get_full_grad(nn.Parameter(torch.zeros(3)))
    sharded = nn.Parameter(torch.zeros(5, 3))
    FlatParams([NamedParameter("sharded", sharded, 0)], Group(), sharded=True)  # as zero.Init does it
    with pytest.raises(EngineStateError, match=r"no engine trains this Parameter of shape \(5, 3\)"):
        utils.safe_get_full_fp32_param(sharded)
    with pytest.raises(DeepSpeedLiteError, match=r"no engine trains this Tensor of shape \(37, 7\)"):
        utils.safe_get_full_fp32_param(torch.zeros(37, 7))
    engine.destroy()
    with pytest.raises(EngineStateError, match="no engine trains"):
        utils.safe_get_full_fp32_param(param)


@distributed(world_size=2)
def test_an_engine_without_optimizer_keeps_nothing_to_read():
    model = net()
    engine = deepspeedlite.initialize(model=model, config={"train_micro_batch_size_per_gpu": 6})[0]
    with pytest.raises(EngineStateError, match="no engine trains this Parameter"):
        utils.safe_get_full_fp32_param(model.first.weight)
    engine.destroy()


@distributed(world_size=1)
def test_fp64_is_read_in_fp64_and_empty_parameters_are_empty():
    model = nn.Linear(3, 1).double()
    model.nothing = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
    engine = engine_of(model, 1)
    engine.backward(engine(torch.ones(1, 3, dtype=torch.float64)).sum())
    assert torch.equal(utils.safe_get_full_grad(model.weight), torch.ones(1, 3, dtype=torch.float64))
    engine.step()
    assert utils.safe_get_full_fp32_param(model.weight).dtype is torch.float64
    assert utils.safe_get_full_fp32_param(model.nothing).shape == (0, 4)
    assert utils.safe_get_full_optimizer_state(model.nothing, "exp_avg").shape == (0, 4)
    utils.safe_set_full_fp32_param(model.nothing, torch.zeros(0, 4))
    engine.destroy()


def test_utils_are_lazy_and_have_deepspeeds_signatures():
    code = (
        "import sys, deepspeedlite.utils as u\n"
        "assert 'torch' not in sys.modules, 'torch was imported at once'\n"
        "u.logger\nassert 'torch' not in sys.modules, 'torch was imported for the logger'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in utils.__all__:
        assert getattr(utils, name) is not None and name in dir(utils)
    with pytest.raises(AttributeError, match="safe_no_such_name"):
        utils.safe_no_such_name  # noqa: B018
    for name in (n for n in utils.__all__ if n.startswith("safe_") and n != "safe_update_full_grad_vectorized"):
        expected = ["param"]
        expected += ["value"] if "_set_" in name else []
        expected += ["optim_state_key"] if name.endswith("optimizer_state") else []
        assert list(inspect.signature(getattr(utils, name)).parameters) == expected
