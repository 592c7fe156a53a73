"""Parameters wherever they come from: built under `zero.Init` or not, frozen, small, empty, attached after initialize.

Whatever its way into the model, a parameter is used with its values, trained as torch would train it, and saved; or
there is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite import zero
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError

HYPER = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
STAGES = [0, 1, 2, 3]


def config(stage: int, threshold: int | None = None, **sections: Any) -> dict[str, Any]:
    limit = {} if threshold is None else {"stage3_param_persistence_threshold": threshold}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": dict(HYPER)},
        "zero_optimization": {"stage": stage, **limit},
        **sections,
    }


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.nothing = nn.Parameter(torch.empty(0))
        self.no_rows = nn.Parameter(torch.empty(0, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.nothing.sum() + self.no_rows.sum()


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, as PEFT's."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.down, self.up = nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Net(nn.Module):
    """Small and large parameters, frozen and trained ones, some in leaves, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = Scale(16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), Scale(16)) for _ in range(2))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.offset = nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(x)).tanh() + self.offset
        for block in self.blocks:
            x = block(x).tanh()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)).square().mean()


def net(change: Callable[[nn.Module], Any] = lambda model: None, init: Any = None) -> Any:
    torch.manual_seed(0)
    with init or nullcontext():
        model = Net()
    if init is not None:  # constructors that write into their children are another matter
        values = net().state_dict()
        with zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for name, param in model.named_parameters():
                param.data.copy_(values[name])
    change(model)
    return model


def rows(step: int, rank: int) -> Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def frozen_with_adapters(model: Any) -> None:
    model.requires_grad_(False)
    model.first = Adapted(model.first)
    model.blocks[1][0] = Adapted(model.blocks[1][0])


def half_frozen(model: Any) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(("norm", "blocks.0", "attention.in", "head.bias")))


def everything(model: Any) -> None:
    pass


CHANGES = {"adapters": frozen_with_adapters, "half": half_frozen, "everything": everything}


class Beside:
    """An engine, and the same model trained by torch on all ranks' data."""

    def __init__(self, engine: Any, plain: nn.Module) -> None:
        self.engine, self.plain = engine, plain
        trained = [param for param in plain.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, foreach=False, **HYPER) if trained else None
        self.steps = 0

    def backward(self) -> None:
        loss = self.engine(rows(self.steps, dist.get_rank()))
        self.engine.backward(loss)
        losses = [self.plain(rows(self.steps, rank)) for rank in range(dist.get_world_size())]
        (sum(losses) / len(losses)).backward()
        assert loss.item() == pytest.approx(losses[dist.get_rank()].item(), abs=2e-6), f"step {self.steps}"

    def step(self) -> None:
        self.backward()
        self.engine.step()
        for param in self.plain.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.plain.zero_grad()
        self.steps += 1

    def check(self) -> None:
        expected = dict(self.plain.named_parameters())
        for name, value in self.engine.module_state_dict().items():
            torch.testing.assert_close(value, expected[name].data, atol=2e-6, rtol=0, msg=name)
        with zero.GatheredParameters(list(self.engine.module.parameters())):
            for name, param in self.engine.module.named_parameters():
                torch.testing.assert_close(param.data, expected[name].data, atol=2e-6, rtol=0, msg=name)


def check_saved(engine: Any, fresh: Any, folder: Any) -> None:
    """What an engine has saved is there, whole, for a new engine with a model that looks the same now."""
    engine.save_checkpoint(folder, tag="one")
    fresh.load_checkpoint(folder, tag="one")
    saved, loaded = engine.module_state_dict(), fresh.module_state_dict()
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert torch.equal(value, loaded[name]), name


# --- built under zero.Init ------------------------------------------------------------------------------------------


@pytest.mark.slow_unless(what="adapters")
@pytest.mark.parametrize("what", list(CHANGES))
@pytest.mark.parametrize(
    "at_init, stage, later",
    [(None, 3, None), (None, 3, 100), (10, 3, None), (100, 3, 100), (10**6, 3, 0), (0, 3, 20), (0, 0, 0), (0, 2, 0)],
)
@distributed(world_size=2)
def test_parameters_built_sharded_are_used_whatever_is_frozen(what, at_init, stage, later, tmp_path):
    change = CHANGES[what]
    model = net(change, zero.Init(config_dict_or_path=config(3, at_init)))
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage, later))
    for param in model.parameters() if stage == 3 else ():
        is_whole = param.ds_status is zero.ZeroParamStatus.AVAILABLE
        assert param.shape == (param.ds_shape if is_whole else (0,))
        assert param.partition_numel() == param.ds_numel or not is_whole
    beside = Beside(engine, net(change))
    for _ in range(3):
        beside.step()
    beside.check()
    if what == "adapters":
        fresh, *_ = deepspeedlite.initialize(model=net(change), config=config(3 - stage, later))
        check_saved(engine, fresh, tmp_path)
        fresh.destroy()
    engine.destroy()


@pytest.mark.slow_unless(stage=(0, 3))
@pytest.mark.parametrize("stage", STAGES)
@distributed(world_size=2)
def test_small_parameters_thawed_later_although_they_were_built_sharded(stage):
    """With the optimizer's knowledge, and without."""

    def freeze(model: Any) -> None:
        model.norm.requires_grad_(False)
        model.attention.requires_grad_(False)

    model, plain = net(freeze, zero.Init(config_dict_or_path=config(3))), net(freeze)
    known = [param for name, param in model.named_parameters() if not name.startswith("attention")]
    engine, *_ = deepspeedlite.initialize(model=model, model_parameters=known, config=config(stage, 100))
    beside = Beside(engine, plain)
    beside.step()
    for part in (model.norm, plain.norm):
        part.requires_grad_(True)
    beside.optimizer.add_param_group({"params": list(plain.norm.parameters())})
    beside.step()
    for part in (model.attention, plain.attention):
        part.requires_grad_(True)
    beside.backward()
    with pytest.raises(EngineStateError, match=r"attention.*add_param_group"):
        engine.step()
    engine.zero_grad()
    plain.zero_grad()
    engine.optimizer.add_param_group({"params": list(model.attention.parameters()), **HYPER})
    beside.optimizer.add_param_group({"params": list(plain.attention.parameters())})
    beside.step()
    beside.step()
    beside.check()
    engine.destroy()


@pytest.mark.slow_unless(first=3, second=0)
@pytest.mark.parametrize("first, second", [(3, 3), (3, 0), (0, 0), (0, 3)])
@distributed(world_size=2)
def test_a_model_that_another_engine_has_sharded(first, second, tmp_path):
    """An engine without an optimizer (a reference model), then one that trains adapters on the same module."""
    model = net()
    plainly = {key: value for key, value in config(first, 0).items() if key != "optimizer"}
    earlier, *_ = deepspeedlite.initialize(model=model, config=plainly)
    with torch.no_grad():
        assert earlier(rows(0, 0)).item() == pytest.approx(net()(rows(0, 0)).item(), abs=2e-6)
    frozen_with_adapters(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeedlite.initialize(model=model, model_parameters=trained, config=config(second, 100))
    beside = Beside(engine, net(frozen_with_adapters))
    for _ in range(2):
        beside.step()
    beside.check()
    fresh, *_ = deepspeedlite.initialize(model=net(frozen_with_adapters), config=config(second, 0))
    check_saved(engine, fresh, tmp_path)


# --- attached after initialize --------------------------------------------------------------------------------------


class Gained(nn.Linear):
    """A linear layer that multiplies by a parameter which it may have or not."""

    def forward(self, x: Tensor) -> Tensor:
        gain = getattr(self, "gain", None)
        return super().forward(x) if gain is None else super().forward(x) * gain


def attach_adapters(model: Any) -> list[Tensor]:
    model.first = Adapted(model.first)
    model.blocks[0][0] = Adapted(model.blocks[0][0])
    return [p for a in (model.first, model.blocks[0][0]) for p in (a.down.weight, a.up.weight)]


def replace_the_head(model: Any) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.head = nn.Linear(16, 16)
    return list(model.head.parameters())


def assign_a_parameter(model: Any) -> list[Tensor]:
    model.offset = nn.Parameter(torch.full((16,), 0.1))
    model.head.gain = nn.Parameter(torch.full((16,), 2.0))
    return [model.offset, model.head.gain]


def gained(model: Any) -> None:
    model.head.__class__ = Gained


@pytest.mark.slow_unless(stage=(0, 3))
@pytest.mark.parametrize("attach", [attach_adapters, replace_the_head, assign_a_parameter])
@pytest.mark.parametrize("stage", STAGES)
@distributed(world_size=2)
def test_parameters_attached_later_are_used_and_trained_or_said(stage, attach, tmp_path):
    model, plain = net(gained), net(gained)
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage, 20))
    beside = Beside(engine, plain)
    beside.step()
    new, new_in_plain = attach(model), attach(plain)
    beside.backward()
    with pytest.raises(EngineStateError, match=r"attached to the model after initialize.*add_param_group"):
        engine.step()
    engine.zero_grad()
    plain.zero_grad()
    with torch.no_grad():
        for param in new if dist.get_rank() else ():
            param.add_(1.0)  # rank 0's values are what is trained
    engine.optimizer.add_param_group({"params": new, **HYPER})
    with pytest.raises(OptimizerError, match="is trained already"):
        engine.optimizer.add_param_group({"params": new})
    beside.optimizer.add_param_group({"params": new_in_plain})
    for _ in range(2):
        beside.step()
    beside.check()
    later = net(gained)
    ids = {id(param) for param in attach(later)}
    groups = [[p for p in later.parameters() if (id(p) in ids) is apart] for apart in (False, True)]
    groups = [{"params": params} for params in groups]
    fresh, *_ = deepspeedlite.initialize(model=later, model_parameters=groups, config=config(3 - stage, 20))
    check_saved(engine, fresh, tmp_path)
    fresh.destroy()
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
@distributed(world_size=2)
def test_a_module_attached_later_that_was_built_sharded(stage):
    def attach(model: Any, init: Any) -> None:
        torch.manual_seed(5)
        with init:
            adapter = nn.Sequential(nn.Linear(16, 16), Scale(16))
        adapter.requires_grad_(False)
        model.blocks.append(adapter)

    model, plain = net(), net()
    engine, *_ = deepspeedlite.initialize(model=model, config=config(stage, 20))
    beside = Beside(engine, plain)
    beside.step()
    attach(model, zero.Init(config_dict_or_path=config(3)))
    attach(plain, nullcontext())
    beside.step()
    beside.step()
    beside.check()
    engine.destroy()


@distributed(world_size=1)
def test_what_is_attached_elsewhere_costs_nothing_and_is_not_looked_for():
    model = net()
    engine, *_ = deepspeedlite.initialize(model=model, config=config(3, 20))
    hooks = len(model._forward_pre_hooks)
    net()
    model.later = nn.ReLU()
    assert len(model._forward_pre_hooks) == hooks, "nothing with parameters was attached to this model"
    model.later = nn.Linear(2, 2)
    assert len(model._forward_pre_hooks) == hooks + 1
    engine.backward(engine(rows(0, 0)))
    engine.step()
    assert len(model._forward_pre_hooks) == hooks, "one look is enough; a parameter that no loss uses is no error"
    engine.destroy()
    before = dict(nn.modules.module._global_module_registration_hooks)
    second, *_ = deepspeedlite.initialize(model=net(), config=config(0))
    second.destroy()
    assert dict(nn.modules.module._global_module_registration_hooks) == before


# --- values given inside GatheredParameters -------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 100])
@distributed(world_size=2)
def test_values_that_the_modifier_replaces_by_other_memory(threshold):
    """As adapters do that take a part of the weight's own away (PiSSA); also of what is frozen and small."""
    model = net(frozen_with_adapters, zero.Init(config_dict_or_path=config(3)))
    weights = [model.first.base.weight, model.norm.weight, model.first.base.bias]

    def halve() -> None:
        with zero.GatheredParameters(weights, modifier_rank=1):
            if dist.get_rank() == 1:
                weights[0].data = weights[0].data.t().clone().t() * 0.5
                weights[1].data = weights[1].data / 2
                weights[2].data.mul_(0.5)

    halve()
    engine, *_ = deepspeedlite.initialize(model=model, config=config(3, threshold))
    halve()
    with zero.GatheredParameters(weights):
        plain = net(frozen_with_adapters)
        for ours, theirs in zip(weights, [plain.first.base.weight, plain.norm.weight, plain.first.base.bias]):
            theirs.data.mul_(0.25)
            assert torch.equal(ours, theirs)
    beside = Beside(engine, plain)
    beside.step()
    beside.step()
    beside.check()
    refused = pytest.raises(EngineStateError, match=r"first.base.weight of shape \(16, 16\).*keep their shape")
    with refused, zero.GatheredParameters(weights[0], modifier_rank=0):
        weights[0].data = torch.zeros(3)
    engine.destroy()
