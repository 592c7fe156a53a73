"""The engine's contract beyond parity: accumulation, plain backward, overflow, misuse, and what it can be asked."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import distributed
from models import tied_model, tokens
from torch.utils.checkpoint import checkpoint

import deepspeedlite
from deepspeedlite.compat.engine_accessors import OFF, SETTINGS
from deepspeedlite.runtime.errors import (
    ConfigError,
    DistributedError,
    EngineStateError,
    LossScaleError,
    OptimizerError,
    UnsupportedError,
)

SGD = {"type": "SGD", "params": {"lr": 0.1}}


def make(model, micro=4, **config):
    config.setdefault("optimizer", SGD)
    config.setdefault("gradient_clipping", 0)
    engine, *_ = deepspeedlite.initialize(model=model, config={"train_micro_batch_size_per_gpu": micro, **config})
    return engine


def linear(seed=0, inputs=3, outputs=2):
    torch.manual_seed(seed)
    return torch.nn.Linear(inputs, outputs)


# --- gradients and accumulation ------------------------------------------------------------------------------------


@distributed(world_size=2)
def test_gradients_shown_after_backward_are_the_average():
    engine = make(linear(), gradient_accumulation_steps=1)
    x = torch.full((4, 3), float(dist.get_rank() + 1))
    engine.backward(engine(x).sum())
    assert torch.allclose(engine.module.weight.grad, torch.full((2, 3), 4 * 1.5))
    assert torch.allclose(engine.module.bias.grad, torch.full((2,), 4.0))
    expected = math.sqrt(6 * 6.0**2 + 2 * 4.0**2)
    engine.step()
    assert math.isclose(engine.get_global_grad_norm(), expected, rel_tol=1e-6)
    assert engine.module.weight.grad is None


@distributed(world_size=2)
def test_users_may_change_gradients_in_place_before_the_step():
    engine = make(linear())
    before = engine.module.weight.detach().clone()
    engine.backward(engine(torch.ones(4, 3)).sum())
    engine.module.weight.grad.mul_(0.5)
    engine.step()
    assert torch.allclose(engine.module.weight, before - 0.1 * 0.5 * 4)


@distributed(world_size=2)
def test_boundaries_count_micro_steps():
    engine = make(linear(), gradient_accumulation_steps=3)
    before = engine.module.weight.detach().clone()
    for micro in range(7):
        assert engine.is_gradient_accumulation_boundary() == (micro % 3 == 2)
        engine.backward(engine(torch.ones(4, 3)).sum())
        engine.step()
        assert engine.was_step_applied() == (micro % 3 == 2)
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (7, 2, 2 * 24)
    assert torch.allclose(engine.module.weight, before - 2 * 0.1 * 4, atol=1e-6)
    assert engine.train_batch_size() == 24 and engine.gradient_accumulation_steps() == 3


@distributed(world_size=2)
def test_boundary_set_from_outside():
    engine = make(linear())
    before = engine.module.weight.detach().clone()
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(torch.ones(4, 3)).sum())
    engine.step()
    assert torch.equal(engine.module.weight, before)
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(engine(torch.ones(4, 3)).sum())
    engine.step()
    assert torch.allclose(engine.module.weight, before - 0.1 * 8)


@distributed(world_size=2)
def test_no_sync_accumulates_without_averaging():
    engine = make(linear())
    x = torch.full((1, 3), float(dist.get_rank()))
    with engine.no_sync():
        engine.backward(engine(x).sum())
        assert torch.allclose(engine.module.weight.grad, x.expand(2, 3)), "local, not averaged"
        with pytest.raises(EngineStateError, match="no_sync"):
            engine.step()
    engine.backward(engine(x).sum())
    assert torch.allclose(engine.module.weight.grad, torch.full((2, 3), 2 * 0.5))


@distributed(world_size=2)
def test_set_train_batch_size_changes_accumulation():
    engine = make(linear(), gradient_accumulation_steps=4)
    for _ in range(4):
        engine.backward(engine(torch.ones(4, 3)).sum())
        engine.step()
    engine.set_train_batch_size(24)
    seen = []
    for _ in range(6):
        seen.append(engine.is_gradient_accumulation_boundary())
        engine.backward(engine(torch.ones(4, 3)).sum())
        engine.step()
    assert seen == [False, False, True] * 2 and engine.gradient_accumulation_steps() == 3
    with pytest.raises(ConfigError, match="multiple of"):
        engine.set_train_batch_size(13)
    engine.backward(engine(torch.ones(4, 3)).sum())
    with pytest.raises(EngineStateError, match="middle of a batch"):
        engine.set_train_batch_size(8)


@distributed(world_size=2)
def test_two_losses_before_one_step_add_up():
    """As a GAN or a multi-task script does it; the first average must survive the second."""
    engine = make(linear())
    rank = float(dist.get_rank())
    first, second = engine(torch.full((1, 3), rank)), engine(torch.full((1, 3), 10 * rank + 1))
    engine.backward(first.sum())
    engine.backward(second.sum())
    assert torch.allclose(engine.module.weight.grad, torch.full((2, 3), 0.5 + 6.0))


@distributed(world_size=2)
def test_scale_wrt_gas_and_the_returned_loss():
    engine = make(linear(), gradient_accumulation_steps=2)
    loss = engine(torch.ones(1, 3)).sum()
    assert torch.allclose(engine.backward(loss, retain_graph=True), loss / 2)
    halved = engine.module.weight.grad.clone()
    engine.zero_grad()
    assert torch.allclose(engine.backward(loss, scale_wrt_gas=False), loss)
    assert torch.allclose(engine.module.weight.grad, 2 * halved)


# --- backward passes of all kinds ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    extras: dict


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        y = self.layer(x)
        return Output(loss=y.sum(), extras={"list": [y * 2, (y * 3,)]})


@pytest.mark.parametrize("pick", ["loss", "dict"])
@distributed(world_size=2)
def test_plain_backward_through_nested_outputs(pick):
    engine = make(Nested(), gradient_accumulation_steps=2)
    x = torch.full((1, 3), float(dist.get_rank()))
    for _ in range(2):
        output = engine(x)
        if pick == "loss":
            output.loss.backward()
        else:
            output.extras["list"][1][0].backward(torch.full((1, 2), 1 / 3))
        gradient = engine.module.layer.weight.grad.clone()
        engine.step()
    assert torch.allclose(gradient, torch.full((2, 3), 0.5)), "mean over ranks and micro-batches"


@distributed(world_size=2)
def test_backward_through_a_model_called_around_the_engine():
    engine = make(linear())
    x = torch.full((1, 3), float(dist.get_rank()))
    for _ in range(2):
        engine.module(x).sum().backward()
        assert torch.allclose(engine.module.weight.grad, torch.full((2, 3), 0.5))
        engine.step()


class Checkpointed(torch.nn.Module):
    """One shared layer used in three checkpoints: its gradient arrives three times with reentrant ones."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(1)
        self.inner = torch.nn.Linear(8, 8)
        self.last = torch.nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(3):
            x = checkpoint(lambda t: torch.tanh(self.inner(t)), x, use_reentrant=self.reentrant)
        return self.last(x).mean()


@pytest.mark.parametrize("how", ["engine", "plain"])
@pytest.mark.parametrize("reentrant", [False, True])
@distributed(world_size=2)
def test_activation_checkpointing_with_a_reused_layer(reentrant, how):
    engine = make(Checkpointed(reentrant), zero_optimization={"reduce_bucket_size": 16})
    plain = Checkpointed(False)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    data = [torch.randn(5, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    for _ in range(4):
        loss = engine(data[dist.get_rank()].clone())
        engine.backward(loss) if how == "engine" else loss.backward()
        engine.step()
        optimizer.zero_grad()
        (sum(plain(x.clone()) for x in data) / 2).backward()
        optimizer.step()
    for ours, theirs in zip(engine.module.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.shared = (torch.nn.Linear(4, 4) for _ in range(3))
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, branch):
        x = self.frozen(self.shared(x)) + self.empty.sum()
        return (self.a if branch == "a" else self.b)(x).pow(2).mean()


@distributed(world_size=2)
def test_ranks_that_use_different_parameters_stay_together():
    """Unused here, used there, changing from step to step: an unused parameter counts as a gradient of zero."""
    engine = make(Branches(), zero_optimization={"reduce_bucket_size": 16})
    plain = Branches()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    choices = [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("a", "b")]
    for branches in choices:
        rank = dist.get_rank()
        engine.backward(engine(data[rank], branches[rank]))
        engine.step()
        optimizer.zero_grad()
        (sum(plain(x, branch) for x, branch in zip(data, branches)) / 2).backward()
        optimizer.step()
    for ours, theirs in zip(engine.module.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


@distributed(world_size=2)
def test_gradient_penalty_by_autograd_grad():
    """torch.autograd.grad runs the output hooks without bringing parameter gradients; nothing is lost or doubled."""
    engine, plain = make(linear(outputs=1)), linear(outputs=1)

    def loss_of(model, x):
        x = x.clone().requires_grad_()
        out = torch.tanh(model(x)).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return out + slope.pow(2).sum()

    data = [torch.randn(2, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    for _ in range(2):
        engine.backward(loss_of(engine, data[dist.get_rank()]))
        gradient = engine.module.weight.grad.clone()
        engine.zero_grad()
    plain.zero_grad()
    (sum(loss_of(plain, x) for x in data) / 2).backward()
    assert torch.allclose(gradient, plain.weight.grad, atol=1e-6)


@distributed(world_size=2)
def test_sparse_embedding_gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1))
    engine = make(model)
    engine.backward(engine(torch.tensor([dist.get_rank(), 5])).sum())
    gradient = engine.module[0].weight.grad
    assert not gradient.is_sparse
    row = model[1].weight.detach().flatten()
    assert torch.allclose(gradient[5], row) and torch.allclose(gradient[0], row / 2)
    assert torch.count_nonzero(gradient[2]) == 0


@distributed(world_size=1)
def test_float64_models_train_in_float64():
    engine = make(linear().double())
    before = engine.module.weight.detach().clone()
    engine.backward(engine(torch.ones(1, 3, dtype=torch.float64)).sum() * (1 / 3))
    engine.step()
    assert engine.module.weight.dtype == torch.float64
    assert torch.allclose(engine.module.weight, before - 0.1 / 3, rtol=0, atol=1e-15)


@distributed(world_size=2)
def test_evaluation_between_steps_changes_nothing():
    engine = make(tied_model(), gradient_accumulation_steps=2)
    engine.backward(engine(*tokens(0, 0, dist.get_rank())))
    kept = engine.module.head.weight.grad.clone()
    engine.eval()
    assert not engine.training and not engine.module.training
    with torch.no_grad():
        engine(*tokens(9, 0, 0))
    engine.train()
    assert torch.equal(engine.module.head.weight.grad, kept)


@distributed(world_size=1)
def test_an_exception_in_backward_leaves_a_working_engine():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("planned")

    engine = make(linear())
    loss = Fails.apply(engine(torch.ones(1, 3))).sum()
    with pytest.raises(RuntimeError, match="planned"):
        engine.backward(loss)
    hidden = engine.module(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="planned"):
        (Fails.apply(hidden).sum() + hidden.sum()).backward()
    engine.backward(engine(torch.ones(1, 3)).sum())
    assert torch.allclose(engine.module.weight.grad, torch.ones(2, 3))


# --- fp16 ----------------------------------------------------------------------------------------------------------


def fp16_engine(**fp16):
    return make(
        linear(), fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1, **fp16}
    )


def fp16_step(engine, value=1.0):
    engine.backward(engine(torch.full((1, 3), value, dtype=torch.float16)).float().sum())
    engine.step()


@distributed(world_size=2)
def test_overflow_on_one_rank_skips_the_step_on_every_rank():
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": SGD,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 10}},
        "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 100, "hysteresis": 1},
    }
    engine, *_ = deepspeedlite.initialize(model=linear(), config=config)
    fp16_step(engine)
    fp16_step(engine)  # WarmupLR's first rate is 0
    before, lr = engine.module.weight.detach().clone(), engine.get_lr()
    fp16_step(engine, value=6e4 if dist.get_rank() == 1 else 1.0)
    assert engine.skipped_steps == 1 and not engine.was_step_applied() and engine.optimizer.overflow
    assert engine.optimizer.cur_scale == 8.0 and engine.global_steps == 3
    assert torch.equal(engine.module.weight, before) and engine.get_lr() == lr
    fp16_step(engine)
    assert engine.was_step_applied() and engine.get_lr() != lr
    assert not torch.equal(engine.module.weight, before)


@distributed(world_size=1)
def test_the_scale_doubles_after_a_window():
    engine = fp16_engine()
    seen = []
    for _ in range(6):
        fp16_step(engine)
        seen.append(engine.optimizer.cur_scale)
    assert seen == [16, 16, 32, 32, 64, 64]


@distributed(world_size=1)
def test_overflow_at_the_smallest_scale_names_the_parameter():
    engine = fp16_engine(min_loss_scale=8)
    fp16_step(engine, value=6e4)
    assert engine.optimizer.cur_scale == 8
    with pytest.raises(LossScaleError, match=r"min_loss_scale=8.*belong to: weight\."):
        fp16_step(engine, value=6e4)


@distributed(world_size=1)
def test_fp16_auto_cast_and_masters():
    engine = fp16_engine(auto_cast=True)
    engine.backward(engine(torch.ones(1, 3)).float().sum())
    assert engine.module.weight.dtype == torch.float16
    assert all(run.dtype == torch.float32 for group in engine.optimizer.param_groups for run in group["params"])
    assert engine.fp16_enabled() and not engine.bfloat16_enabled()


@distributed(world_size=1)
def test_scaled_loss_by_hand():
    engine = fp16_engine()
    engine.scale(engine(torch.ones(1, 3, dtype=torch.float16)).float().sum()).backward()
    assert torch.equal(engine.module.weight.grad, torch.full((2, 3), 16.0, dtype=torch.float16))


@distributed(world_size=1)
def test_bf16_can_check_for_overflow():
    engine = make(linear(), bf16={"enabled": True, "check_grad_overflow": True})
    before = engine.module.weight.detach().clone()
    engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).sum() * math.inf)
    engine.step()
    assert engine.skipped_steps == 1 and torch.equal(engine.module.weight, before)


@distributed(world_size=1)
def test_loading_weights_after_initialize_reaches_the_masters():
    engine = make(linear(), bf16={"enabled": True})
    other = linear(seed=5).bfloat16()
    engine.module.load_state_dict(other.state_dict())
    engine.backward(engine(torch.zeros(1, 3, dtype=torch.bfloat16)).sum())
    engine.step()
    assert torch.equal(engine.module.weight, other.weight)


# --- set-up --------------------------------------------------------------------------------------------------------


@distributed(world_size=3)
def test_rank_0_decides_weights_and_buffers():
    model = tied_model(seed=dist.get_rank())
    model.temperature.fill_(dist.get_rank() + 1.0)
    frozen = model.up[0].weight.requires_grad_(False)
    make(model)
    expected = tied_model(seed=0)
    assert model.temperature.item() == 1.0
    assert torch.equal(frozen, expected.up[0].weight)
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs)
    assert model.head.weight is model.embedding.weight


@distributed(world_size=2)
def test_different_models_are_refused_on_every_rank():
    with pytest.raises(DistributedError, match=r"weight is \(2, 3\) .*on rank 0 and \(2, 4\) .*on rank 1"):
        make(linear(inputs=3 + dist.get_rank()))


@pytest.mark.parametrize("kind", ["generator", "names", "groups", "callable", "scheduler"])
@distributed(world_size=1)
def test_every_way_to_pass_optimizer_and_parameters(kind):
    model = linear()
    arguments = {
        "generator": {"model_parameters": (p for p in model.parameters())},
        "names": {"model_parameters": model.named_parameters()},
        "groups": {"model_parameters": [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}]},
        "callable": {"optimizer": lambda params: torch.optim.SGD(params, lr=0.3)},
        "scheduler": {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)},
    }[kind]
    engine, optimizer, _, scheduler = deepspeedlite.initialize(
        model=model, config={"train_batch_size": 1, "optimizer": SGD, "gradient_clipping": 0}, **arguments
    )
    before = model.weight.detach().clone()
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    rate = {"groups": 0.5, "callable": 0.3}.get(kind, 0.1)
    assert torch.allclose(model.weight, before - rate)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert engine.get_lr() == {"groups": [0.5, 0.1], "callable": [0.3], "scheduler": [0.01]}.get(kind, [0.1]) or (
        kind == "scheduler" and math.isclose(engine.get_lr()[0], 0.01)
    )
    assert (scheduler is not None) == (kind == "scheduler")


@distributed(world_size=1)
def test_a_torch_scheduler_over_the_users_optimizer_goes_on_working():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    engine, *_ = deepspeedlite.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config={"train_batch_size": 1}
    )
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 3)).sum())
        engine.step()
    assert engine.get_lr() == [0.125] and engine.lr_scheduler is schedule


@distributed(world_size=2)
def test_the_whole_tuple_with_training_data():
    data = torch.utils.data.TensorDataset(torch.arange(20.0).reshape(20, 1))
    engine, optimizer, loader, scheduler = deepspeedlite.initialize(
        model=linear(inputs=1),
        training_data=data,
        config={
            "train_batch_size": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 5}},
        },
    )
    seen = [value for (batch,) in loader for value in batch.flatten().tolist()]
    everyone = [None, None]
    dist.all_gather_object(everyone, seen)
    assert sorted(everyone[0] + everyone[1]) == [float(i) for i in range(20)]
    assert len(loader) == 5 and optimizer is engine.optimizer and scheduler is engine.lr_scheduler


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "Lion", "Lamb", "RMSprop", "NAdam"])
@distributed(world_size=2)
def test_optimizers_by_name_learn(name):
    engine = make(
        tied_model(),
        optimizer={"type": name, "params": {"lr": {"SGD": 0.3, "Adagrad": 0.05}.get(name, 5e-3)}},
        zero_optimization={"reduce_bucket_size": 3000},
    )
    losses = []
    for _ in range(12):
        loss = engine(*tokens(0, 0, 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


@distributed(world_size=2)
def test_lamb_on_flat_runs_equals_lamb_on_single_parameters():
    from deepspeedlite.ops.lamb import FusedLamb

    plain = tied_model()
    optimizer = FusedLamb(plain.parameters(), lr=0.02, weight_decay=0.01)
    engine = make(tied_model(), optimizer={"type": "Lamb", "params": {"lr": 0.02, "weight_decay": 0.01}})
    for step in range(4):
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()
        optimizer.zero_grad()
        (sum(plain(*tokens(step, 0, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
    for ours, theirs in zip(engine.module.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("kind", ["Adam", "Adagrad"])
@distributed(world_size=1)
def test_an_optimizer_that_has_already_stepped_goes_on(kind):
    """Its states per parameter become states per run."""

    def warm():
        model = torch.nn.Sequential(linear(), torch.nn.Linear(2, 1))
        torch.manual_seed(4)
        torch.nn.init.normal_(model[1].weight)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).pow(2).sum().backward()
            optimizer.step()
        return model, optimizer

    (plain, expected), (model, optimizer) = warm(), warm()
    engine, *_ = deepspeedlite.initialize(
        model=model, optimizer=optimizer, config={"train_batch_size": 1, "gradient_clipping": 0}
    )
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 3)).pow(2).sum())
        engine.step()
        expected.zero_grad()
        plain(torch.ones(1, 3)).pow(2).sum().backward()
        expected.step()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


@distributed(world_size=1)
def test_states_that_cannot_be_joined_are_refused():
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[model.bias]["step"] += 1
    with pytest.raises(OptimizerError, match="different 'step'"):
        deepspeedlite.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 1})


# --- misuse --------------------------------------------------------------------------------------------------------


@distributed(world_size=1)
def test_misuse_is_named():
    engine = make(linear())
    with pytest.raises(EngineStateError, match="no backward pass"):
        engine.step()
    with pytest.raises(EngineStateError, match=r"scalar loss, got shape \(1, 2\)"):
        engine.backward(engine(torch.ones(1, 3)))
    with pytest.raises(EngineStateError, match="no parameter that requires grad"):
        engine.backward(torch.tensor(1.0))
    with pytest.raises(UnsupportedError, match="closure"):
        engine.optimizer.step(lambda: 0.0)
    with pytest.raises(OptimizerError, match="weight is trained already"):
        engine.optimizer.add_param_group({"params": [engine.module.weight]})
    engine.module.weight.data = engine.module.weight.data.clone()
    engine.backward(engine(torch.ones(1, 3)).sum())
    with pytest.raises(EngineStateError, match="weight was given new memory"):
        engine.step()
    engine.destroy()
    with pytest.raises(EngineStateError, match="destroy"):
        engine(torch.ones(1, 3))
    assert engine.module(torch.ones(1, 3)).shape == (1, 2), "the module works alone afterwards"


@distributed(world_size=1)
def test_initialize_refuses_what_cannot_be_right():
    config = {"train_batch_size": 1, "optimizer": SGD}
    with pytest.raises(UnsupportedError, match="model="):
        deepspeedlite.initialize(config=config)
    with pytest.raises(ConfigError, match="no configuration"):
        deepspeedlite.initialize(model=linear())
    with pytest.raises(ConfigError, match="two configurations"):
        deepspeedlite.initialize(model=linear(), config=config, config_params={"train_batch_size": 2})
    with pytest.raises(ConfigError, match=r"lrr.*lr"):
        deepspeedlite.initialize(model=linear(), config=config | {"optimizer": {"type": "SGD", "params": {"lrr": 0.1}}})
    with pytest.raises(OptimizerError, match="callable returned int"):
        deepspeedlite.initialize(model=linear(), config=config, optimizer=lambda params: 3)
    alias = torch.nn.Module()
    alias.a = torch.nn.Parameter(torch.ones(3))
    alias.b = torch.nn.Parameter(alias.a.data)
    with pytest.raises(UnsupportedError, match="a and b share memory"):
        deepspeedlite.initialize(model=alias, config=config)


@distributed(world_size=1)
def test_an_engine_without_optimizer_does_not_train():
    engine = make(linear(), optimizer=None)
    loss = engine(torch.ones(1, 3)).sum()
    for call in (lambda: engine.backward(loss), engine.step):
        with pytest.raises(EngineStateError, match="needs an optimizer"):
            call()
    loss.backward()
    assert torch.allclose(engine.module.weight.grad, torch.ones(2, 3)), "torch's own, of this rank alone"


@distributed(world_size=1)
def test_the_engine_is_a_module_and_delegates():
    model = linear()
    model.note = "kept"
    engine = make(model)
    assert engine.note == "kept" and engine.in_features == 3
    assert set(engine.state_dict()) == {"module.weight", "module.bias"}
    assert engine.config["train_micro_batch_size_per_gpu"] == 4
    assert engine.device == torch.device("cpu") and engine.zero_optimization_stage() == 0
    with pytest.raises(AttributeError, match="nowhere"):
        engine.nowhere  # noqa: B018


@distributed(world_size=2)
def test_two_engines_in_one_process():
    generator, critic = make(linear(seed=1, inputs=3, outputs=3)), make(linear(seed=2, inputs=3, outputs=1))
    for step in range(3):
        noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        critic.backward(critic(generator(noise).detach()).mean())
        critic.step()
        generator.backward(F.softplus(-critic.module(generator(noise))).mean())
        critic.zero_grad()
        generator.step()
    assert generator.global_steps == critic.global_steps == 3


# --- what scripts for DeepSpeed ask -----------------------------------------------------------------------------------


@distributed(world_size=2)
def test_answers_to_scripts():
    """Every method that reads a setting answers, and those that say more say the truth of this run."""
    engine = make(
        linear(),
        micro=3,
        gradient_accumulation_steps=2,
        zero_optimization={"stage": 2, "reduce_bucket_size": 1234},
        bf16={"enabled": True},
        communication_data_type="fp32",
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        csv_monitor={"enabled": False},
    )
    for name in (*SETTINGS, *OFF.split()):
        getattr(engine, name)()
    assert engine.zero_reduce_bucket_size() == 1234 and engine.is_sanity_checks_enabled() is False
    assert (engine.local_rank, engine.global_rank) == (dist.get_rank(), dist.get_rank())
    assert (engine.world_size, engine.dp_world_size, engine.mp_world_size, engine.sequence_parallel_size) == (
        2,
        2,
        1,
        1,
    )
    assert engine.get_data_parallel_rank() == dist.get_rank() and engine.get_model_parallel_rank() == 0
    assert dist.get_world_size(engine.data_parallel_group) == 2 and engine.dist_backend == "gloo"
    assert engine.get_data_types() == (torch.bfloat16, torch.bfloat16)
    assert engine.communication_data_type is torch.float32 and engine.postscale_gradients()
    assert engine.optimizer_name() == "sgd" and engine.optimizer_params() == {"lr": 0.1}
    assert engine.scheduler_name() == "WarmupLR" and engine.scheduler_params() == {"warmup_num_steps": 5}
    assert engine.zero_optimization_partition_gradients() and not engine.zero_optimization_partition_weights()
    assert not engine.zero_cpu_offload() and not engine.zero_use_cpu_optimizer() and engine.dynamic_loss_scale()
    assert engine.basic_optimizer is engine.optimizer.optimizer and not engine.is_compiled
    assert sorted(engine.param_names.values()) == ["bias", "weight"]
    engine.monitor.write_events([("mine", 1.0, 1)])
    assert engine.get_batch_info() == (12, 3, 2)
    engine.set_train_micro_batch_size(5)
    assert engine.train_batch_size() == 20 and engine.train_micro_batch_size_per_gpu() == 5
    assert engine.checkpoint_tag_validation_enabled() and not engine.checkpoint_tag_validation_fail()
    with pytest.raises(AttributeError, match="allreduce_gradients: gradients are averaged in the backward pass"):
        engine.allreduce_gradients()


@distributed(world_size=2)
def test_whole_parameters_are_let_go_of():
    """`empty_partition_cache` leaves a rank its shards alone, also of what was gathered ahead."""
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(3)))
    engine = make(model, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    loss = engine(torch.ones(2, 40)).sum()
    engine.backward(loss)
    engine.step()
    engine(torch.ones(2, 40))

    def held() -> int:
        return sum(p.numel() > 0 and p.untyped_storage().size() > 0 for p in model.parameters())

    assert held() > 0
    engine.empty_partition_cache()
    assert held() == 0


@distributed(world_size=1)
def test_a_passed_optimizer_makes_no_temporaries_as_large_as_a_run():
    """Torch's own Adam would; and it takes the same path."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None and func._schema.name[-1] != "_":
                self.numel = max(self.numel, out.numel())
            return out

    plain, model = (torch.nn.Sequential(*(linear(i, 50, 50) for i in range(4))) for _ in range(2))
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
    config = {"train_batch_size": 2, "gradient_clipping": 0}
    mine = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeedlite.initialize(model=model, config=config, optimizer=mine)
    for step in range(3):
        x = torch.randn(2, 50, generator=torch.Generator().manual_seed(step))
        plain(x).sum().backward()
        theirs.step()
        theirs.zero_grad()
        engine.backward(engine(x).sum())
        with Largest() as largest:
            engine.step()
    assert largest.numel < 50 * 50
    for ours, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
