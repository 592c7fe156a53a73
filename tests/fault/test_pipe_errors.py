"""What one stage of a pipeline finds wrong is one PipelineError on every rank, at once, and the next batch trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import VOCABULARY
from pipe_models import Reference, batches, layers, loss_fn
from test_pipe import MICRO_BATCHES, assert_copies_are_equal, assert_same_values, config, pipeline

from deepspeedlite.pipe import LayerSpec
from deepspeedlite.runtime.errors import PipelineError

WITHIN_S = 10


class Trap(torch.nn.Module):
    """A layer that does what `rule` says to its input while it is armed."""

    rule: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        y = x * self.weight
        return y if Trap.rule is None else Trap.rule(self, y)


class Stumbles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("no way back")


def raises(layer: Any, y: torch.Tensor) -> torch.Tensor:
    raise ValueError("no way on")


def raises_later(layer: Any, y: torch.Tensor) -> torch.Tensor:
    if layer.calls % MICRO_BATCHES == 0:
        raise ValueError("no way on")
    return y


FORWARD, BACKWARD = "forward pass of micro-batch", "backward pass of micro-batch"
RULES: dict[str, tuple[Any, str]] = {
    "raises": (raises, rf"{FORWARD} 0: ValueError: no way on"),
    "raises_later": (raises_later, rf"{FORWARD} {MICRO_BATCHES - 1}: ValueError: no way on"),
    "backward": (lambda layer, y: Stumbles.apply(y), rf"{BACKWARD} 0: ValueError: no way back"),
    "no_tensor": (lambda layer, y: {"hidden": y}, rf"{FORWARD} 0: "),
}


def specs() -> list[Any]:
    """Layers with four traps, which `partition_method="type:Trap"` spreads over the stages."""
    first, scale, one, two, three, last = layers()
    trap = LayerSpec(Trap)
    return [first, trap, scale, one, trap, two, trap, three, trap, last]


def fails(engine: Any, message: str, call: Any) -> None:
    """Every rank raises the same, soon."""
    started_s = time.monotonic()
    with pytest.raises(PipelineError, match=message) as caught:
        call()
    assert time.monotonic() - started_s < WITHIN_S
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, str(caught.value))
    assert set(told) == {told[0]}, told


@pytest.mark.parametrize(("stages", "zero", "schedule"), [(2, 1, "1f1b"), (4, 0, "gpipe"), (2, 2, "1f1b")])
@pytest.mark.slow_unless(zero=1)
@distributed(4)
def test_a_stage_that_fails(stages, zero, schedule):
    """On each stage in turn, in one replica alone; between the faults training goes on as if they had not been."""
    engine = pipeline(
        specs(), stages, config(zero, gradient_clipping=0.5), schedule=schedule, partition_method="type:Trap"
    )
    replicas = 4 // stages
    reference = Reference(specs(), MICRO_BATCHES, replicas, clip=0.5)
    data = batches(engine.grid.data_parallel_id, MICRO_BATCHES)
    trap = next(module for module in engine.module.modules() if isinstance(module, Trap))
    for stage in range(stages):
        for name, (rule, message) in RULES.items():
            trap.calls = 0
            if engine.stage_id == stage and engine.grid.data_parallel_id == replicas - 1:
                Trap.rule = staticmethod(rule)
            text = rf"pipeline stage {stage} \(rank {engine.grid.stage_to_global(stage, data=replicas - 1)}\) failed"
            bad = batches(0, MICRO_BATCHES)
            fails(engine, rf"{text} in the {message}", lambda bad=bad: engine.train_batch(bad))
            trap.calls = 0
            if name == "raises_later":
                fails(engine, rf"{text} in the {FORWARD} ", lambda bad=bad: engine.eval_batch(bad))
            Trap.rule = None
            assert engine.module.training and engine.micro_steps == engine.global_steps * MICRO_BATCHES
        loss = engine.train_batch(data)
        assert loss.item() == pytest.approx(reference.step()[0], rel=2e-5)
    assert engine.global_steps == stages
    assert_same_values(engine, reference.model)
    assert_copies_are_equal(engine)


LOSSES: dict[str, tuple[Any, str]] = {
    "tuple": (lambda out, y: (loss_fn(out, y), {"extra": 1}), "micro-batch is a tuple; the PipelineModule's loss_fn"),
    "elements": (lambda out, y: out.float().square(), r"a tensor of shape \(4, 8, \d+\)"),
    "number": (lambda out, y: loss_fn(out, y).item(), "is a float"),
    "none": (lambda out, y: None, "is a NoneType"),
    "raises": (lambda out, y: loss_fn(out, y["labels"]), "IndexError"),
    "detached": (lambda out, y: loss_fn(out, y).detach(), "no parameter that requires grad leads to this loss"),
}


@pytest.mark.parametrize("loss", LOSSES)
@distributed(2)
def test_a_loss_that_is_none(loss):
    """Right on the first batch, then what `loss` says."""
    function, message = LOSSES[loss]
    engine = pipeline(layers(), 2)
    data = batches(0, MICRO_BATCHES)
    first = engine.train_batch(data)
    engine.module.loss_fn, right = function, engine.module.loss_fn
    fails(engine, rf"stage 1 \(rank 1\) failed in .*{message}", lambda: engine.train_batch(data))
    if loss in ("tuple", "number", "none", "raises"):
        fails(engine, r"stage 1 \(rank 1\) failed in", lambda: engine.eval_batch(data))
    engine.module.loss_fn = right
    assert engine.train_batch(data) < first


def garbage(kind: str, position: int) -> Iterator[Any]:
    """Batches of which the one at `position` is no good for the stage that reads it."""
    for index, (x, y) in enumerate(batches(0, MICRO_BATCHES)):
        if index == position:
            x, y = {"float": (x.float(), y), "range": (x + VOCABULARY, y), "labels": (x, y[:1]), "text": ("x", y)}[kind]
        yield x, y


@pytest.mark.parametrize(("kind", "stage"), [("float", 0), ("range", 0), ("text", 0), ("labels", 1)])
@distributed(2)
def test_batches_that_are_no_good(kind, stage):
    engine = pipeline(layers(), 2)
    for position in (0, 2):
        message = rf"stage {stage} \(rank {stage}\) failed in the forward pass of micro-batch {position}: "
        fails(engine, message, lambda at=position: engine.train_batch(garbage(kind, at)))
        fails(engine, message, lambda at=position: engine.eval_batch(garbage(kind, at)))
    engine.train_batch(batches(0, MICRO_BATCHES))


@distributed(2)
def test_shapes_that_change_fail_everywhere():
    """Announced or not; and results of evaluation that cannot be joined on the last stage."""

    def ragged(lengths):
        for length in lengths:
            x = torch.arange(2 * length).view(2, length) % VOCABULARY
            yield x, (x + 1) % VOCABULARY

    engine = pipeline(layers(), 2)
    fails(engine, r"micro-batch 1 is float32\[2, 7, 32\]", lambda: engine.train_batch(ragged([5, 7, 5])))
    changing = pipeline(layers(), 2, dynamic_shape=True)
    changing.train_batch(ragged([5, 7, 2]))
    fails(changing, r"stage 1 .*RuntimeError", lambda: changing.eval_batch(ragged([5, 7, 2]), compute_loss=False))
    changing = pipeline(specs(), 2, dynamic_shape=True, partition_method="type:Trap")
    if changing.is_first_stage():
        Trap.rule = staticmethod(raises_later)
    for call in (changing.train_batch, changing.eval_batch):
        fails(changing, r"stage 0 \(rank 0\) failed in the forward pass of", lambda call=call: call(ragged([5, 7, 2])))
    Trap.rule = None
    changing.train_batch(ragged([5, 7, 2]))
