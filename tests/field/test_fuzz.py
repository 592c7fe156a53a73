"""Random models under random configurations follow an unsharded loop: trained, saved, copied, resumed at another size.

A few of them in every test run. `make fuzz` goes on for an hour, and tells at its end which seeds failed;
`make fuzz FUZZ_SEED=17 FUZZ_S=1` runs that one again.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from fuzz_models import CLIP, LEAVES, Model, Scenario
from harness import distributed
from torch import Tensor

import deepspeedlite

BEFORE, AFTER = 3, 2  # steps before and after the checkpoint
SHORT_RUN = range(24)
# fp32 differs by the order of sums. In bf16 each rank's gradient is rounded before the average.
LOSS_TOLERANCE = {"fp32": {"rtol": 2e-4, "atol": 2e-6}, "bf16": {"rtol": 0.1, "atol": 2e-2}}
WEIGHT_TOLERANCE = {"fp32": {"rtol": 1e-3, "atol": 2e-5}, "bf16": {"rtol": 0.05, "atol": 3e-2}}


class Reference:
    """The scenario by torch alone, in one process: fp32 masters, all micro-batches of a step one after the other."""

    def __init__(self, scenario: Scenario) -> None:
        torch.manual_seed(scenario.seed)
        self.scenario = scenario
        self.model = scenario.finish(Model(scenario))
        for param in self.model.parameters():
            param.data = param.data.to(scenario.torch_dtype)
        self.trained = [param for param in self.model.parameters() if param.requires_grad]
        self.masters = [torch.nn.Parameter(param.detach().float().clone()) for param in self.trained]
        groups = scenario.groups_of(self.masters) if scenario.groups > 1 else [{"params": self.masters}]
        self.optimizer = scenario.make_optimizer(groups)

    def step(self, step: int) -> list[float]:
        """The loss of every micro-batch of a step."""
        losses = []
        totals = [torch.zeros_like(master) for master in self.masters]
        for micro in range(self.scenario.micro_batches):
            self.model.zero_grad()
            loss = self.model(*self.scenario.batch(step, micro))
            loss.backward()
            losses.append(loss.item())
            for total, param in zip(totals, self.trained):
                if param.grad is not None:
                    total += param.grad.float() / self.scenario.micro_batches
        for master, total in zip(self.masters, totals):
            master.grad = total
        if self.scenario.clip:
            torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.trained, self.masters):
                param.copy_(master)
        return losses


def build(scenario: Scenario, stage: int, seed: int) -> Model:
    """The model as a user builds it for this stage; buffers and all are those of `seed`."""
    torch.manual_seed(seed)
    if not (scenario.under_init and stage == 3):
        return scenario.finish(Model(scenario))
    with deepspeedlite.zero.Init(config_dict_or_path=scenario.config(dist.get_world_size(), stage, at_init=True)):
        model = Model(scenario)
    return scenario.finish(model)


def start(scenario: Scenario, stage: int, seed: int) -> torch.nn.Module:
    model = build(scenario, stage, seed)
    if "chooser" in scenario.parts:
        deepspeedlite.utils.set_z3_leaf_modules(model, LEAVES)
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = scenario.groups_of(trained) if scenario.groups > 1 else [{"params": trained}]
    config = scenario.config(dist.get_world_size(), stage)
    if scenario.passed:
        made = scenario.make_optimizer(groups)
        return deepspeedlite.initialize(model=model, optimizer=made, config=config)[0]
    return deepspeedlite.initialize(model=model, model_parameters=groups, config=config)[0]


def train(engine: torch.nn.Module, scenario: Scenario, step: int, expected: list[float]) -> None:
    """One step of this rank's micro-batches, with the losses that the reference had."""
    for micro in range(dist.get_rank(), scenario.micro_batches, dist.get_world_size()):
        loss = engine(*scenario.batch(step, micro))
        engine.backward(loss)
        engine.step()
        check(f"the loss of micro-batch {micro} in step {step}", loss, expected[micro], LOSS_TOLERANCE[scenario.dtype])


def check(what: str, found: Tensor, wanted: Tensor | float, tolerance: dict[str, float]) -> None:
    found, wanted = found.detach().float(), torch.as_tensor(wanted).float()
    torch.testing.assert_close(found, wanted, **tolerance, msg=lambda text: f"{what}: {text}")


def check_weights(what: str, found: dict[str, Tensor], reference: Reference) -> None:
    wanted = reference.model.state_dict()
    assert list(found) == list(wanted), f"{what} has other entries: {set(found) ^ set(wanted)}"
    for name, value in wanted.items():
        check(f"{what}, {name}", found[name], value, WEIGHT_TOLERANCE[reference.scenario.dtype])


def check_copies(engine: torch.nn.Module, reference: Reference) -> None:
    """State dicts, saved ones, and deep copies hold the values."""
    state = engine.module.state_dict()
    check_weights("the state dict", state, reference)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    check_weights("the saved state dict", torch.load(file), reference)
    with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters())):
        copied = copy.deepcopy(engine.module)
    check_weights("the copy", copied.state_dict(), reference)


def explained(scenario: Scenario, error: BaseException) -> AssertionError:
    return AssertionError(f"{type(error).__name__} in {scenario}: {error}")


def first_half(seed: int, folder: str) -> None:
    scenario = Scenario.draw(seed)
    try:
        reference = Reference(scenario)
        engine = start(scenario, scenario.stage, seed)
        check_weights("the state dict before training", engine.module.state_dict(), reference)
        for step in range(BEFORE):
            train(engine, scenario, step, reference.step(step))
        check_copies(engine, reference)
        engine.save_checkpoint(folder)
        for step in range(BEFORE, BEFORE + AFTER):
            train(engine, scenario, step, reference.step(step))
        check_weights("the state dict after more steps", engine.module.state_dict(), reference)
        engine.destroy()
    except Exception as error:
        raise explained(scenario, error) from error


def second_half(seed: int, folder: str) -> None:
    scenario = Scenario.draw(seed)
    try:
        reference = Reference(scenario)
        for step in range(BEFORE):
            reference.step(step)
        engine = start(scenario, scenario.resumed_stage, seed + 7)  # with other values, which the checkpoint replaces
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        check_weights("the state dict that was loaded", engine.module.state_dict(), reference)
        for step in range(BEFORE, BEFORE + AFTER):
            train(engine, scenario, step, reference.step(step))
        check_weights("the state dict at the end", engine.module.state_dict(), reference)
        engine.destroy()
    except Exception as error:
        raise explained(scenario, error) from error


@distributed(world_size=1)
def one_trains(seed: int, folder: str) -> None:
    first_half(seed, folder)


@distributed(world_size=2)
def two_train(seed: int, folder: str) -> None:
    first_half(seed, folder)


@distributed(world_size=1)
def one_resumes(seed: int, folder: str) -> None:
    second_half(seed, folder)


@distributed(world_size=2)
def two_resume(seed: int, folder: str) -> None:
    second_half(seed, folder)


def run_scenario(seed: int) -> None:
    starts_on = Scenario.draw(seed).starts_on
    with tempfile.TemporaryDirectory(prefix="dsl-fuzz-") as folder:
        (one_trains if starts_on == 1 else two_train)(seed=seed, folder=folder)
        (two_resume if starts_on == 1 else one_resumes)(seed=seed, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SHORT_RUN)
def test_random_models_follow_an_unsharded_loop(seed):
    run_scenario(seed)


@pytest.mark.skipif("DSL_FUZZ_S" not in os.environ, reason="an hour's run: make fuzz")
@pytest.mark.timeout(0)
def test_for_a_while():
    seed = first = int(os.environ.get("DSL_FUZZ_SEED", "1000"))
    end = time.monotonic() + float(os.environ["DSL_FUZZ_S"])
    failed: dict[int, str] = {}
    while seed == first or time.monotonic() < end:
        try:
            run_scenario(seed)
        except pytest.fail.Exception as error:
            failed[seed] = str(error)
            print(f"seed {seed}: {error}")
        seed += 1
    shown = "\n\n".join(f"seed {one}: {text}" for one, text in list(failed.items())[:5])
    assert not failed, f"{len(failed)} of {seed - first} scenarios failed: {sorted(failed)}\n{shown}"
