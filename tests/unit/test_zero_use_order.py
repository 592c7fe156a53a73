"""When stage 3 gathers and releases: ahead along the trace, at a cost that grows with the model, and around leaves."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from harness import distributed
from torch import nn

import deepspeedlite
from deepspeedlite.zero.use_order import LookAhead, UseTrace

# --- the trace, beside one that looks at every use to come, every time ----------------------------------------------


class Values:
    """What a trace asks of flat values."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class FullSearch:
    """`UseTrace` and `LookAhead` by their definitions."""

    def __init__(self) -> None:
        self.known: Sequence[Values] = []
        self.position = 0

    def use(self, values: Values) -> None:
        later = [i for i, known in enumerate(self.known) if known is values]
        if later:
            self.position = 1 + next((i for i in later if i >= self.position), later[0])

    def used_within(self, values: Values, numel: int) -> bool:
        total = 0
        for coming in self.known[self.position :]:
            if coming is values:
                return True
            total += coming.numel
            if total > numel:
                break
        return False

    def ahead(self, act: Callable[[Values], bool], numel: int, stop: int) -> None:
        for coming in self.known[self.position : stop]:
            if numel <= 0 or not act(coming):
                break
            numel -= coming.numel


@pytest.mark.parametrize("seed", range(40))
def test_the_trace_is_what_a_full_search_finds(seed):
    draw = random.Random(seed)
    everything = [Values(draw.choice([0, 1, 5, 20])) for _ in range(12)]
    never_seen = Values(3)
    room, reuse, most_live = draw.choice([0, 6, 30, 1000]), draw.choice([0, 6, 30, 1000]), draw.choice([20, 60, 1000])
    forward = draw.choices(everything, k=15)
    uses = forward + forward[::-1]
    trace, plain = UseTrace(), FullSearch()
    look = LookAhead(trace)
    for values in forward:
        trace.use(values)
    trace.turn()
    for values in forward[::-1]:
        trace.use(values)
    trace.end()
    plain.known = uses
    live = {"trace": set(), "plain": set()}
    gathered: dict[str, list[Values]] = {"trace": [], "plain": []}

    def gather(whose: str, values: Values) -> bool:
        if values not in live[whose]:
            if sum(v.numel for v in live[whose]) + values.numel > most_live:
                return False
            live[whose].add(values)
            gathered[whose].append(values)
        return True

    for _ in range(3):
        trace.begin()
        plain.position = 0
        order = [values for values in uses if draw.random() > 0.1]  # some are left out, two are swapped, one is new
        a, b = draw.sample(range(len(order)), 2)
        order[a], order[b] = order[b], order[a]
        order.insert(draw.randrange(len(order)), never_seen)
        for number, values in enumerate(order):
            trace.use(values)
            plain.use(values)
            forward_only = number < 5
            look.each(lambda v: gather("trace", v), room, forward_only)
            plain.ahead(lambda v: gather("plain", v), room, 15 if forward_only else len(uses))
            assert gathered["trace"] == gathered["plain"]
            assert trace.used_within(values, reuse) == plain.used_within(values, reuse)
            if not trace.used_within(values, reuse) and values in live["trace"]:
                trace.live_changed(values, -1)
                for whole in live.values():
                    whole.discard(values)


def test_a_pass_without_a_backward_pass_is_learnt_from_until_one_has_one():
    trace, (a, b, c) = UseTrace(), [Values(1) for _ in range(3)]
    look, ahead = LookAhead(trace), []

    def coming(*uses):
        """What is looked at ahead when `uses` have begun a forward pass."""
        ahead.clear()
        trace.begin()
        for values in uses:
            trace.use(values)
        look.each(lambda values: not ahead.append(values), None, True)
        return list(ahead)

    assert coming(a, b, c) == []  # the first
    assert coming(a) == [b, c]  # as evaluation and generation go on
    trace.turn()
    look.each(lambda values: not ahead.append(values), None, False)
    assert ahead == [b, c], "the way back is not the way forth: nothing is known of it"
    trace.use(a)
    trace.end()
    assert coming() == [a], "what a training pass used counts from then on, not what came of it for evaluation"
    assert coming(b) == [a] == coming()


# --- what a step costs ----------------------------------------------------------------------------------------------


def lines_run(call: Callable[[], Any]) -> int:
    """How many lines of Python run in a call, those of hooks in its backward passes too."""
    lines: Counter[str] = Counter()

    def local(frame: Any, event: str, argument: Any) -> Any:
        lines[event] += 1
        return local

    before = sys.gettrace()
    sys.settrace(local)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines["line"] + lines["call"]


def work_of_a_model(modules: int, stage: int, **zero: Any) -> dict[str, int]:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(modules)))
    for part in list(net)[::3]:
        part.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    work: dict[str, int] = {}
    made: list[Any] = []
    work["initialize"] = lines_run(lambda: made.append(deepspeedlite.initialize(model=net, config=config)[0]))
    engine = made[0]

    def step() -> None:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()

    for name in ("first step", "second step", "third step"):
        work[name] = lines_run(step)
    work["evaluation"] = lines_run(lambda: torch.no_grad()(engine)(torch.ones(1, 4)))
    work["parameters"] = lines_run(lambda: list(engine.module.parameters()))
    work["state_dict"] = lines_run(engine.module.state_dict)
    engine.destroy()
    return work


TIGHT = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
COSTS = [(0, {}), (3, {}), (3, {"stage3_max_reuse_distance": 0}), (3, TIGHT), (3, {"offload_param": {"device": "cpu"}})]


@pytest.mark.slow
@pytest.mark.parametrize("stage, zero", COSTS)
@distributed(world_size=1)
def test_the_work_grows_as_the_number_of_modules(stage, zero):
    work_of_a_model(3, stage, **zero)  # what is imported and compiled at first use
    small, large = (work_of_a_model(count, stage, **zero) for count in (60, 180))
    for what in small:
        assert large[what] < 3.3 * small[what], f"{what}: {small[what]} lines for 60 modules, {large[what]} for 180"


# --- leaves that choose ---------------------------------------------------------------------------------------------


class Choice(nn.Module):
    """Uses one of its children, another one in each call or on each rank, and a frozen one beside it."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.shift = nn.Linear(8, 8).requires_grad_(False)
        self.by, self.calls, self.rank = by, 0, dist.get_rank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        chosen = self.calls % 3 if self.by == "counter" else self.rank
        return self.layers[chosen](x) + self.shift(x).tanh()


class Around(nn.Module):
    """A leaf that chooses, alone or between layers, its calls recomputed or not."""

    def __init__(self, by: str, alone: bool, checkpoint: bool) -> None:
        super().__init__()
        self.first, self.last = (nn.Identity() if alone else nn.Linear(8, 8) for _ in range(2))
        self.choice, self.checkpoint = Choice(by), checkpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.checkpoint:
            y = torch.utils.checkpoint.checkpoint(self.choice, y, use_reentrant=True)
        else:
            y = self.choice(y)
        return self.last(y).square().mean()


def choosing(rank: int, by: str, alone: bool, checkpoint: bool) -> Around:
    torch.manual_seed(0)
    model = Around(by, alone, checkpoint)
    model.choice.rank = rank
    return model


@pytest.mark.slow_unless(distance=0)
@pytest.mark.parametrize("distance", [0, 10**9])
@pytest.mark.parametrize("by", ["counter", "rank"])
@distributed(world_size=2)
def test_a_leaf_that_chooses_among_its_children(by, distance):
    for alone, checkpoint, wants_grad in [
        (True, False, True),
        (True, False, False),
        (False, False, True),
        (True, True, True),
        (False, True, False),
    ]:
        model = choosing(dist.get_rank(), by, alone, checkpoint)
        deepspeedlite.utils.set_z3_leaf_modules(model, [Choice])
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": distance}
        engine, *_ = deepspeedlite.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": zero,
            },
        )
        replicas = [choosing(rank, by, alone, checkpoint) for rank in range(2)]
        for step in range(4):
            inputs = [
                torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_(wants_grad)
                for rank in range(2)
            ]
            loss = engine(inputs[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            expected = [replica(x) for replica, x in zip(replicas, inputs)]
            assert loss.item() == pytest.approx(expected[dist.get_rank()].item(), abs=1e-6), (alone, checkpoint, step)
            follow_sgd(replicas, expected)
        assert engine.module.choice.shift.weight.numel() == 0, "frozen values are released when the pass is over"
        with deepspeedlite.zero.GatheredParameters(list(engine.module.parameters())):
            for name, param in engine.module.named_parameters():
                torch.testing.assert_close(param.data, replicas[0].get_parameter(name).data, msg=name)
        engine.destroy()


def follow_sgd(replicas: Sequence[nn.Module], losses: Sequence[torch.Tensor]) -> None:
    """The update of a loop without sharding; a parameter without gradient on any rank stays as it is."""
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        for same in zip(*(replica.parameters() for replica in replicas)):
            grads = [param.grad for param in same if param.grad is not None]
            for param in same:
                param -= 0.1 * sum(grads, torch.zeros_like(param)) / len(same)
                param.grad = None


class Narrow(nn.Module):
    """A frozen layer on an input that is a leaf of the graph, and one on its own parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.scale @ self.mix  # the oldest node, so the last one backward
        return (x @ self.scale @ mixed).tanh() + self.offset


@pytest.mark.parametrize("reentrant", [False, True])
@distributed(world_size=2)
def test_values_outlast_the_gradient_of_an_input_that_is_a_leaf(reentrant):
    """Autograd takes a leaf's gradient first of what is ready, also while nodes of the module are to come."""
    torch.manual_seed(0)
    plain = nn.ModuleList(Narrow() for _ in range(3))
    torch.manual_seed(0)
    model = Chained(Narrow() for _ in range(3))
    model.reentrant = reentrant
    scales = [part.scale for part in model]  # read from a module, they would be gathered
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    engine, *_ = deepspeedlite.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_optimization": {**zero, "stage3_prefetch_bucket_size": 0},
        },
    )
    most: list[int] = []

    def watch(block: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: most.append(sum(scale.numel() > 0 for scale in scales)))

    for block in model:
        block.register_forward_hook(watch)
    for step in range(3):
        x = torch.ones(2, 8) * (step + 1)
        loss = engine(x.clone().requires_grad_())
        engine.backward(loss)
        engine.step()
        expected = x
        for part in plain:
            expected = part(expected)
        expected = expected.square().mean()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        follow_sgd([plain], [expected])
    assert max(most) <= 2, "a block's frozen values are released when its backward is over"
    engine.destroy()


class Chained(nn.ModuleList):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self:
            x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=True) if self.reentrant else part(x)
        return x.square().mean()
