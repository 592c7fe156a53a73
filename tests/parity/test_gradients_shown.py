"""What users write to `param.grad`, and how they clear gradients, beside the same loop in plain torch."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import distributed
from torch import nn

import deepspeedlite
from deepspeedlite.runtime.log import logger
from deepspeedlite.utils import safe_get_full_fp32_param

SGD = {"type": "SGD", "params": {"lr": 1.0}}


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "optimizer": SGD,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(number: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + rank))


class Lines(logging.Handler):
    """What the library says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        deepspeedlite.runtime.log._said.clear()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Lines:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)

    def said(self, what: str) -> int:
        return sum(what in line for line in self.lines)


# --- what is done to gradients, in words that plain torch knows too ---------------------------------------------------


def exchange(module: nn.Sequential) -> None:
    """Each gets a view of what the other shows."""
    weight, bias = module[2].weight, module[0].bias
    weight.grad, bias.grad = torch.stack([bias.grad, bias.grad]), weight.grad[0]


def none_of_one(module: nn.Sequential) -> None:
    module[0].weight.grad = None


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "zero_grad": lambda module: module.zero_grad(),
    "zero_grad(False)": lambda module: module.zero_grad(set_to_none=False),
    "zero_grad of a part": lambda module: module[2].zero_grad(),
    "none": none_of_one,
    "zero_": lambda module: module[0].weight.grad.zero_(),
    "mul_": lambda module: [param.grad.mul_(0.5) for param in module.parameters()],
    "data.clamp_": lambda module: [param.grad.data.clamp_(-0.1, 0.1) for param in module.parameters()],
    "clip_grad_norm_": lambda module: nn.utils.clip_grad_norm_(module.parameters(), 0.2),
    "assigned": lambda module: setattr(module[2].bias, "grad", torch.tensor([3.0, -4.0])),
    "exchanged": exchange,
    "data =": lambda module: setattr(module[2].bias.grad, "data", torch.tensor([3.0, -4.0])),
}
CLEARINGS = ("zero_grad", "zero_grad(False)", "zero_grad of a part")


def train(engine: Any, plain: nn.Sequential, change: str, before_step: bool, accumulation: int) -> None:
    """One step of both: two passes, with `change` between them or after them; ranks' gradients are averaged."""
    rank, ranks, two = engine._parts.group.rank, engine._parts.group.size, 2
    for number in range(two):
        engine.backward(engine(batch(number, rank)).square().sum())
        for other in range(ranks):
            (plain(batch(number, other)).square().sum() / ranks / accumulation).backward()
        if before_step == (number == two - 1):
            for module in (engine.module, plain):
                CHANGES[change](module)
        if accumulation == two:
            engine.step()
    if accumulation == 1:
        engine.step()
    for param in plain.parameters():
        if param.grad is not None:
            param.data -= param.grad
    plain.zero_grad()


def check_equal(engine: Any, plain: nn.Module, tolerance: float = 1e-5) -> None:
    for param, expected in zip(engine.module.parameters(), plain.parameters()):
        torch.testing.assert_close(
            safe_get_full_fp32_param(param), expected.detach(), rtol=tolerance, atol=tolerance, check_dtype=False
        )


@pytest.mark.parametrize("change", CHANGES)
@distributed(world_size=1)
def test_what_is_shown_is_the_gradient_whoever_writes_it(change: str) -> None:
    for stage, accumulation, before_step in ((0, 1, False), (0, 2, True), (1, 2, False), (1, 1, True), (2, 1, False)):
        if accumulation == 2 and before_step:
            continue  # nothing comes between engine.backward and engine.step at the end of a window but the last pass
        engine, *_ = deepspeedlite.initialize(model=net(), config=config(stage, accumulation))
        plain = net()
        for _ in range(2):
            train(engine, plain, change, before_step, accumulation)
        check_equal(engine, plain)
        engine.destroy()


@pytest.mark.parametrize("change", ["none", "zero_grad", "data.clamp_", "assigned"])
@distributed(world_size=2)
def test_what_several_ranks_write_alike_is_the_average(change: str) -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(0))
    plain = net()
    for before_step in (False, True):
        train(engine, plain, change, before_step, 1)
    check_equal(engine, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_a_modules_zero_grad_clears_what_is_not_shown(stage: int) -> None:
    for change in CLEARINGS:
        engine, *_ = deepspeedlite.initialize(model=net(), config=config(stage))
        plain = net()
        train(engine, plain, change, False, 1)
        check_equal(engine, plain)
        engine.destroy()
        assert "zero_grad" not in vars(engine.module) and "zero_grad" not in vars(engine.module[0])


@pytest.mark.parametrize("stage", [1, 2])
@distributed(world_size=2)
def test_gradients_assigned_where_none_are_shown_replace_the_average(stage: int) -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(stage))
    plain = net()
    train(engine, plain, "assigned", False, 1)
    train(engine, plain, "assigned", True, 1)
    check_equal(engine, plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_zero_grad_of_every_optimizer_clears(stage: int) -> None:
    for which in ("passed", "returned", "engine"):
        model, plain = net(), net()
        passed = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, returned, *_ = deepspeedlite.initialize(model=model, optimizer=passed, config=config(stage))
        rank = engine._parts.group.rank
        engine.backward(engine(batch(0, rank)).sum())
        {"passed": passed, "returned": returned, "engine": engine}[which].zero_grad()
        engine.backward(engine(batch(1, rank)).sum())
        engine.step()
        (sum(plain(batch(1, other)).sum() for other in range(2)) / 2).backward()
        for param in plain.parameters():
            param.data -= param.grad
        check_equal(engine, plain)
        assert pickle.loads(pickle.dumps(passed.state_dict())) is not None and copy.deepcopy(passed) is not None


@distributed(world_size=1)
def test_a_copy_of_a_module_clears_its_own_gradients() -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(3))
    with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters())):
        copies = [copy.deepcopy(engine.module), copy.deepcopy(engine.module[0])]
    copies.append(pickle.loads(pickle.dumps(engine.module[1])))
    for made in copies:
        engine.backward(engine(batch(0, 0)).sum())
        made.zero_grad()
        engine.step()
        assert engine.get_global_grad_norm() > 0
    copies[0](batch(0, 0)).sum().backward()
    copies[0].zero_grad()
    assert copies[0][0].weight.grad is None


# --- a GAN ------------------------------------------------------------------------------------------------------------


def gan_losses(critic: Any, made: torch.Tensor, real: torch.Tensor, penalty: bool) -> torch.Tensor:
    loss = critic(made).mean() - critic(real).mean()
    if penalty:
        between = ((made + real) / 2).detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        loss = loss + (slope.norm(dim=1) - 1).square().mean()
    return loss


@pytest.mark.parametrize(
    "stage, dtype, penalty", [(0, "fp32", True), (0, "bf16", False), (1, "fp32", False), (2, "fp32", True)]
)
@distributed(world_size=2)
def test_a_gans_script_trains_as_without_the_library(stage: int, dtype: str, penalty: bool) -> None:
    """The generator's pass leaves gradients in the critic, which `critic.zero_grad()` clears before its own passes."""

    def models() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(5)
        shapes = (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return nn.Sequential(*shapes[0]), nn.Sequential(*shapes[1])

    settings = config(stage, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    generator, critic = (deepspeedlite.initialize(model=model, config=settings)[0] for model in models())
    plain_generator, plain_critic = models()
    rank, kind = generator._parts.group.rank, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    for step in range(4):
        noise, real = [batch(2 * step, other) for other in range(2)], [batch(2 * step + 1, other) for other in range(2)]
        made = generator(noise[rank].to(kind))
        critic.module.zero_grad()
        critic.backward(gan_losses(critic, made.detach(), real[rank].to(kind), penalty))
        critic.step()
        critic.module.zero_grad()
        generator.backward(-critic(made).mean())  # which leaves gradients in the critic
        generator.step()

        mades = [plain_generator(given) for given in noise]
        (sum(gan_losses(plain_critic, m.detach(), r, penalty) for m, r in zip(mades, real)) / 2).backward()
        for param in plain_critic.parameters():
            param.data -= 0.1 * param.grad
        plain_critic.zero_grad()
        (sum(-plain_critic(m).mean() for m in mades) / 2).backward()
        for param in plain_generator.parameters():
            param.data -= 0.1 * param.grad
        plain_generator.zero_grad()
        plain_critic.zero_grad()
    for engine, plain in ((generator, plain_generator), (critic, plain_critic)):
        check_equal(engine, plain, 1e-5 if dtype == "fp32" else 2e-2)


@distributed(world_size=1)
def test_gradients_are_shown_times_the_loss_scale_and_their_share_of_the_batch() -> None:
    engine, *_ = deepspeedlite.initialize(
        model=nn.Linear(2, 1, bias=False), config=config(0, 2, fp16={"enabled": True, "loss_scale": 8.0})
    )
    before = engine.module.weight.detach().float().clone()
    engine.backward(engine(torch.ones(1, 2).half()).sum())
    assert engine.module.weight.grad.tolist() == [[4.0, 4.0]]
    engine.module.weight.grad = torch.full((1, 2), 12.0, dtype=torch.half)
    engine.step()
    engine.backward(engine(torch.ones(1, 2).half()).sum())
    assert engine.module.weight.grad.tolist() == [[16.0, 16.0]]
    engine.step()
    assert torch.allclose(before - 2.0, engine.module.weight.detach().float(), atol=2e-3)


# --- what is said -----------------------------------------------------------------------------------------------------


@distributed(world_size=1)
def test_forgotten_steps_are_said_once_with_the_line_to_add() -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(0))
    with Lines() as lines:
        for _ in range(8):
            engine.backward(engine(batch(0, 0)).sum())
        assert lines.said("without engine.step()") == 0, "losses of one step"
        for _ in range(4):
            engine.backward(engine(batch(0, 0)).sum())
        assert lines.said("Add engine.step() after every engine.backward(loss)") == 1
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(0, 4))
    with Lines() as lines:
        for _ in range(4):
            for _ in range(2):
                engine.backward(engine(batch(0, 0)).sum())
            engine.step()
        assert not lines.lines
        for _ in range(4):
            engine.backward(engine(batch(0, 0)).sum())
        assert lines.said("gradient_accumulation_steps=4") == 1


@pytest.mark.parametrize("stage", [0, 2])
@distributed(world_size=2)
def test_what_cannot_be_cleared_by_hand_and_what_is_cleared_in_a_window_is_said(stage: int) -> None:
    engine, *_ = deepspeedlite.initialize(model=net(), config=config(stage, 2))
    rank = engine._parts.group.rank
    with Lines() as lines:
        for _ in range(2):
            engine.backward(engine(batch(0, rank)).sum())
            engine.step()
        assert not lines.lines
        engine.backward(engine(batch(0, rank)).sum())
        engine.module[0].weight.grad = None
        engine.backward(engine(batch(0, rank)).sum())
        engine.step()
        assert lines.said("`param.grad = None` does not clear them") == (stage == 2)
        engine.zero_grad()
        assert lines.said("cleared after 1 of the 2 micro-batches") == 1
