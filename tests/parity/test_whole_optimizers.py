"""Optimizers that must see whole parameters, at stage 0: beside the same optimizer in a loop of plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.config import load_config
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError

ADAFACTOR = {"lr": 0.02, "weight_decay": 0.01}
LBFGS = {"lr": 0.5, "max_iter": 5, "history_size": 4}
STEPS = 5


class RowNorm(torch.optim.Optimizer):
    """Steps each row of a matrix by the same length: not elementwise, and not known to anyone."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in filter(lambda param: param.grad is not None, group["params"]):
                state = self.state[param]
                state["rows"] = state.get("rows", 0) + param.grad.reshape(len(param), -1).norm(dim=1)
                length = state["rows"].view(-1, *[1] * (param.dim() - 1)) + 1e-6
                param.sub_(param.grad / length * group["lr"])


def start(optimizer=None, section=None, model=None, **more):
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, **more}
    if section is not None:
        config["optimizer"] = section
    return deepspeedlite.initialize(model=model or tied_model(), optimizer=optimizer, config=config)[:2]


def evaluate_all(model, step: int) -> torch.Tensor:
    """The mean loss over all ranks' micro-batches of a step; adds up its gradients."""
    world, total = dist.get_world_size(), torch.zeros(())
    for rank in range(world):
        loss = model(*tokens(step, 0, rank)) / world
        loss.backward()
        total += loss.detach().float()
    return total


def plain(make: Callable, steps: int = STEPS) -> dict[str, torch.Tensor]:
    model = tied_model()
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        evaluate_all(model, step)
        optimizer.step()
    return dict(model.named_parameters())


def train(engine, steps=range(STEPS)) -> None:
    for step in steps:
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()


def assert_alike(model: torch.nn.Module, expected: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach().float(), expected[name].detach(), rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("how", ["named", "passed", "callable"])
@distributed(world_size=2)
def test_adafactor(how):
    """Rows and columns are averaged as torch's own does it, over the gradients of all ranks."""
    model = tied_model()

    def make(params):
        return torch.optim.Adafactor(params, **ADAFACTOR)

    given = None if how == "named" else make if how == "callable" else make(model.parameters())
    section = {"type": "Adafactor", "params": ADAFACTOR} if how == "named" else None
    engine, optimizer = start(given, section, model)
    assert type(optimizer.optimizer).__name__ == "Adafactor"
    train(engine)
    assert_alike(engine.module, plain(make))


@distributed(world_size=1)
def test_groups_schedules_and_frozen_parameters():
    def build(model: torch.nn.Module) -> tuple:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        optimizer = RowNorm([{"params": matrices, "lr": 0.02}, {"params": rest, "lr": 0.1}], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    ours, theirs = tied_model(), tied_model()
    optimizer, schedule = build(ours)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
    engine, *_ = deepspeedlite.initialize(model=ours, optimizer=optimizer, lr_scheduler=schedule, config=config)
    optimizer, schedule = build(theirs)
    for step in range(STEPS):
        for model in (ours, theirs):
            model.down[0].weight.requires_grad_(step != 2)
        train(engine, [step])
        optimizer.zero_grad()
        evaluate_all(theirs, step)
        optimizer.step()
        schedule.step()
    assert engine.get_lr() == [group["lr"] for group in optimizer.param_groups]
    assert_alike(ours, dict(theirs.named_parameters()))


@distributed(world_size=2)
def test_bf16_steps_fp32_masters():
    engine, optimizer = start(None, {"type": "Adafactor", "params": ADAFACTOR}, bf16={"enabled": True})
    masters = [run for group in optimizer.param_groups for run in group["params"]]
    assert {run.dtype for run in masters} == {torch.float32}
    train(engine)
    assert_alike(engine.module, plain(lambda params: torch.optim.Adafactor(params, **ADAFACTOR)), atol=0.03)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@distributed(world_size=2)
def test_lbfgs_with_a_closure(line_search):
    """Ranks with other data agree on every evaluation: what the optimizer sees is their mean loss and gradient."""
    options = {**LBFGS, "line_search_fn": line_search}
    model, reference = tied_model(), tied_model()
    engine, optimizer = start(torch.optim.LBFGS(model.parameters(), **options), None, model)
    torchs = torch.optim.LBFGS(reference.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = engine(*tokens(0, 0, dist.get_rank()))
        engine.backward(loss)
        return loss

    def torchs_closure() -> torch.Tensor:
        torchs.zero_grad()
        return evaluate_all(reference, 0)

    for _ in range(3):
        assert float(optimizer.step(closure)) == pytest.approx(float(torchs.step(torchs_closure)), rel=1e-3)
    assert_alike(model, dict(reference.named_parameters()), atol=2e-4)
    with pytest.raises(TypeError, match="closure"):
        train(engine, [0])


@pytest.mark.parametrize("kind", ["Adafactor", "RowNorm"])
@distributed(world_size=2)
def test_checkpoints_hold_its_states(kind, tmp_path):
    def build():
        model = tied_model()
        make = {"Adafactor": torch.optim.Adafactor, "RowNorm": RowNorm}[kind]
        return start(make(model.parameters(), lr=0.02), None, model)[0]

    through, saving = build(), build()
    train(through)
    train(saving, range(2))
    saving.save_checkpoint(tmp_path)
    resumed = build()
    train(resumed, range(7, 9))  # what loading must replace
    assert resumed.load_checkpoint(tmp_path)[0] is not None
    train(resumed, range(2, STEPS))
    assert_alike(resumed.module, dict(through.module.named_parameters()))
    anew = build()
    anew.load_checkpoint(tmp_path, load_optimizer_states=False)
    train(anew, range(2, STEPS))
    with pytest.raises(AssertionError):
        assert_alike(anew.module, dict(through.module.named_parameters()))


@distributed(world_size=1)
def test_its_state_dict_is_torchs_own():
    engine, optimizer = start(None, {"type": "Adafactor", "params": ADAFACTOR})
    train(engine)
    kept = optimizer.state_dict()
    rows = [state["row_var"] for state in kept["optimizer"]["state"].values() if "row_var" in state]
    assert rows and all(row.dim() == 2 for row in rows)
    other, its = start(None, {"type": "Adafactor", "params": ADAFACTOR})
    other.module.load_state_dict(engine.module.state_dict())
    its.load_state_dict(copy.deepcopy(kept))
    train(engine, [9])
    train(other, [9])
    assert_alike(other.module, dict(engine.module.named_parameters()))


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=1)
def test_where_parameters_are_sharded_it_is_refused(stage):
    model = tied_model()
    zero = {"zero_optimization": {"stage": stage}}
    for cls in (torch.optim.Adafactor, torch.optim.LBFGS):
        with pytest.raises(UnsupportedError, match="or ZeRO stage 0"):
            start(cls(model.parameters(), lr=0.1), None, model, **zero)
    with pytest.raises(UnsupportedError, match="not elementwise"):
        start(RowNorm(model.parameters(), lr=0.1), None, model, **zero)
    for name in ("Adafactor", "LBFGS"):
        with pytest.raises(ConfigError, match="or ZeRO stage 0"):
            load_config({"optimizer": {"type": name}, **zero})
        assert load_config({"optimizer": {"type": name}}).optimizer.type == name


@distributed(world_size=1)
def test_a_closure_needs_such_an_optimizer():
    _, optimizer = start(None, {"type": "AdamW"})
    with pytest.raises(UnsupportedError, match="L-BFGS, at stage 0"):
        optimizer.step(lambda: torch.zeros(()))


@distributed(world_size=2)
def test_dtensors_are_refused_by_name():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(UnsupportedError, match=r"^0's weight is a DTensor, and an engine trains plain tensors alone"):
        start(None, {"type": "AdamW"}, model)
