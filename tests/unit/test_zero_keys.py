"""How often ZeRO communicates, in which order, and what each key of `zero_optimization` changes that a user can see.

Real gloo ranks. A `Tape` writes down, on each rank, every collective that an engine starts and waits for, which unit it
carries, and when each module runs forward and backward: gradients, gathers and modules in one order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise, takewhile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zero_models as zoo
from harness import distributed
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite.runtime.errors import ConfigError, EngineStateError, UnsupportedError

BLOCKS = 6
UNITS = ["first", *(f"blocks.{i}" for i in range(BLOCKS)), "head"]  # of stage 3, in the order of use
BLOCK_NUMEL = sum(param.numel() for param in zoo.Block().parameters())
EVERYTHING = sum(param.numel() for param in zoo.Chain(BLOCKS).parameters())


class _NotedWork:
    """A collective under way whose `wait` is written down."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self._work, self._note = work, note

    def wait(self) -> Any:
        self._note()
        return self._work.wait()


class Tape:
    """`events` is a list of (what, whose): gathers, shares, reductions and the waits for them; forward and backward.

    A *gather* makes sharded values whole, a *share* sends what a step wrote to values that stay whole.
    """

    def __init__(self, engine: Any) -> None:
        self.events: list[tuple[str, str]] = []
        self.most_live_numel = 0
        self._engine, group = engine, engine._parts.group
        self._all_gather, self._reduce_scatter = group.all_gather_into, group.reduce_scatter_into
        self._all_reduce = group.all_reduce
        group.all_gather_into, group.reduce_scatter_into = self._on_all_gather, self._on_reduce_scatter
        group.all_reduce = self._on_all_reduce
        for name, module in engine.module.named_modules():
            if name in UNITS:
                module.register_forward_pre_hook(partial(self._on_forward, name))
                module.register_forward_hook(partial(self._on_output, name))

    @property
    def owners(self) -> list[Any]:
        """Units in launch order, then frozen values."""
        return [*(unit.flat for unit in self._engine._reducer.units), *self._engine._parts.frozen]

    def _note(self, what: str, whose: str) -> None:
        self.events.append((what, whose))
        if self._engine._prefetcher is not None:
            self.most_live_numel = max(self.most_live_numel, self._engine._prefetcher.trace.live_numel)

    def _noted(self, what: str, whose: str, work: Any) -> Any:
        self._note(what, whose)
        return work and _NotedWork(work, partial(self._note, f"wait for {what}", whose))

    def _on_all_gather(self, out: Tensor, shard: Tensor, **options: Any) -> Any:
        owner = next(owner for owner in self.owners if owner.values is out)
        what = "gather" if owner.sharded else "share"
        return self._noted(what, label(owner), self._all_gather(out, shard, **options))

    def _on_reduce_scatter(self, out: Tensor, full: Tensor, *op: str, **options: Any) -> Any:
        owner = next(unit for unit in self._engine._reducer.units if unit.grads.full is full)
        return self._noted("reduce", label(owner), self._reduce_scatter(out, full, *op, **options))

    def _on_all_reduce(self, tensor: Tensor, *op: str, **options: Any) -> Any:
        whole = [unit for unit in self._engine._reducer.units if unit.grads.full is tensor]
        what = "reduce by all-reduce" if whole else "all-reduce"
        whose = label(whole[0]) if whole else f"{tensor.numel()} elements"
        return self._noted(what, whose, self._all_reduce(tensor, *op, **options))

    def _on_forward(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._note("forward", name)

    def _on_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in zoo.tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._note("backward", name))

    def take(self) -> list[tuple[str, str]]:
        """The events so far, which are forgotten."""
        taken, self.events = self.events, []
        return taken


def label(owner: Any) -> str:
    """`blocks.2` for the unit of that block: the modules' common path. A bucket of several has its first module's."""
    homes = [slot.name.split(".")[:-1] for slot in owner.layout.slots]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*homes))]
    return ".".join(shared or homes[0])


def counts(events: list[tuple[str, str]], what: str) -> dict[str, int]:
    return dict(Counter(whose for happened, whose in events if happened == what))


def most_under_way(events: list[tuple[str, str]], what: str) -> int:
    """How many collectives of a kind had been started and not waited for when the next one was started."""
    under_way = most = 0
    for happened, _ in events:
        under_way += {what: 1, f"wait for {what}": -1}.get(happened, 0)
        most = max(most, under_way)
    return most


def make(stage: int, model: nn.Module | None = None, accumulation: int = 1, **zero: Any) -> tuple[Any, Tape]:
    """An engine of a chain of blocks. Stage 3 shards everything and lets go at once unless `zero` says otherwise."""
    if stage == 3:
        zero = {"stage3_prefetch_bucket_size": 64, "stage3_max_reuse_distance": 0, **zero}
        zero = {"stage3_param_persistence_threshold": 0, **zero}
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, **zero},
    }
    engine, *_ = deepspeedlite.initialize(model=model or zoo.Chain(BLOCKS), config=settings)
    return engine, Tape(engine)


def micro_step(engine: Any, *more: Any) -> None:
    loss = engine(torch.randn(4, zoo.WIDTH), *more).square().mean()
    engine.backward(loss)
    engine.step()


def third_step(engine: Any, tape: Tape, *more: Any) -> list[tuple[str, str]]:
    """What happens when the order of use is known."""
    for _ in range(2):
        micro_step(engine, *more)
    tape.take()
    tape.most_live_numel = 0
    micro_step(engine, *more)
    return tape.take()


# --- how often ------------------------------------------------------------------------------------------------------


@distributed(world_size=[2, 3])
def test_stage_3_gathers_each_unit_once_per_forward_and_once_per_backward():
    engine, tape = make(3)
    for step in range(3):
        micro_step(engine)
        events = tape.take()
        # The head is the last in forward and the first in backward: from the second step on it stays for that.
        assert counts(events, "gather") == {name: 2 - (step > 0 and name == "head") for name in UNITS}
        assert counts(events, "reduce") == dict.fromkeys(UNITS, 1)
        assert {what for what, _ in events if not what.startswith("wait")} == {
            "gather",
            "reduce",
            "forward",
            "backward",
            "all-reduce",  # of the norm
        }


@distributed(world_size=2)
def test_stage_3_gathers_and_reduces_in_every_micro_batch():
    engine, tape = make(3, accumulation=3)
    for _ in range(3):  # the first window
        micro_step(engine)
    tape.take()
    for _ in range(3):
        micro_step(engine)
        events = tape.take()
        assert counts(events, "gather") == {name: 2 - (name == "head") for name in UNITS}
        assert counts(events, "reduce") == dict.fromkeys(UNITS, 1)


@pytest.mark.slow_unless(prefetch=(0, 64))
@pytest.mark.parametrize("prefetch", [0, 64, 1_000_000_000])
@distributed(world_size=2)
def test_evaluation_gathers_each_unit_once_and_reduces_nothing(prefetch):
    engine, tape = make(3, stage3_prefetch_bucket_size=prefetch)
    third_step(engine, tape)
    with torch.no_grad():
        engine(torch.randn(4, zoo.WIDTH))
    assert counts(tape.events, "gather") == dict.fromkeys(UNITS, 1)
    assert counts(tape.events, "reduce") == {}


@pytest.mark.parametrize("stage", [1, 2])
@distributed(world_size=[2, 3])
def test_stage_1_reduces_once_per_boundary_and_stage_2_in_every_micro_batch(stage):
    engine, tape = make(stage, accumulation=3, reduce_bucket_size=BLOCK_NUMEL)
    units = [label(unit) for unit in engine._reducer.units]
    assert len(units) > BLOCKS
    for micro in range(6):
        micro_step(engine)
        boundary, events = micro % 3 == 2, tape.take()
        assert counts(events, "reduce") == (dict(Counter(units)) if boundary or stage == 2 else {})
        assert counts(events, "share") == (dict(Counter(units)) if boundary else {})
        assert counts(events, "gather") == {}
        assert counts(events, "all-reduce") == ({"1 elements": 1} if boundary else {})


@pytest.mark.parametrize("stage, clipping, checks", [(0, 0, True), (1, 0.1, True), (2, 0.1, False), (3, 0, True)])
@distributed(world_size=2)
def test_clipping_and_the_check_for_overflows_cost_one_collective_of_one_element_together(stage, clipping, checks):
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": clipping,
        "check_grad_overflow": checks,
        "optimizer": {"type": "AdamW", "params": {}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeedlite.initialize(model=zoo.Chain(BLOCKS), config=settings)
    tape = Tape(engine)
    assert counts(third_step(engine, tape), "all-reduce") == {"1 elements": 1}


# --- overlap --------------------------------------------------------------------------------------------------------


@distributed(world_size=2)
def test_the_next_unit_is_on_its_way_before_a_module_runs_from_the_second_step_on():
    engine, tape = make(3, stage3_prefetch_bucket_size=max(owner.numel for owner in make(3)[1].owners))
    for step in range(3):
        micro_step(engine)
        events = tape.take()
        for direction, order in (("forward", UNITS), ("backward", UNITS[::-1])):
            for this, following in pairwise(order):
                runs = events.index((direction, this))
                started = [i for i, event in enumerate(events) if event == ("gather", following)]
                mine = started[0] if direction == "forward" else started[-1]
                assert (mine < runs) == (step > 0), f"step {step}, {direction}: {following}, gathered before {this} ran"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", [0, 1])
@distributed(world_size=2)
def test_overlap_comm_reduces_while_backward_runs(stage, overlap):
    engine, tape = make(stage, reduce_bucket_size=BLOCK_NUMEL, overlap_comm=overlap)
    events = third_step(engine, tape)
    end, reduce = events.index(("backward", "first")), "reduce" if stage else "reduce by all-reduce"
    during = sum(what == reduce for what, _ in events[:end])
    after = sum(what == reduce for what, _ in events[end:])
    assert during + after == len(engine._reducer.units)
    assert (during >= BLOCKS - 1) if overlap else (during == 0)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
@distributed(world_size=2)
def test_overlap_comm_lets_sharded_gradients_reduce_two_at_a_time(stage, overlap):
    """Whole gradients must go as soon as they can, so without overlap each reduction is waited for on the spot."""
    engine, tape = make(stage, reduce_bucket_size=BLOCK_NUMEL, overlap_comm=overlap)
    under_way = most = in_backward = 0
    events = third_step(engine, tape)
    end = events.index(("backward", "first"))
    for i, (what, _) in enumerate(events):
        under_way += {"reduce": 1, "wait for reduce": -1}.get(what, 0)
        if what in ("forward", "backward"):
            most = max(most, under_way)
            in_backward += i <= end and under_way > 0
    assert most == (2 if overlap else 0)
    assert (in_backward >= BLOCKS - 1) if overlap else (in_backward == 0)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow_unless(stage=(0, 2))
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("bucket, units", [(1, 4 + 6 * BLOCKS), (BLOCK_NUMEL, None), (EVERYTHING, 1), (None, 1)])
@distributed(world_size=2)
def test_reduce_bucket_size_is_elements_per_reduction(stage, bucket, units):
    """With 1 every parameter is reduced alone; without the key the engine's own size holds this model whole."""
    engine, tape = make(stage, reduce_bucket_size=bucket)
    sizes = [sum(slot.numel for slot in unit.layout.slots) for unit in engine._reducer.units]
    assert sum(sizes) == EVERYTHING
    assert len(sizes) == units if units else EVERYTHING / BLOCK_NUMEL <= len(sizes) <= 2 * BLOCKS
    assert bucket is None or max(sizes) <= max(bucket, zoo.WIDTH * 9)
    reduce = "reduce" if stage else "reduce by all-reduce"
    assert sum(counts(third_step(engine, tape), reduce).values()) == len(sizes)


@pytest.mark.slow_unless(stage=(1, 3))
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_sub_group_size_is_elements_per_call_of_the_optimizer(stage):
    for size, expected in ((0, "units"), (1_000_000_000, 1)):
        engine, _ = make(stage, reduce_bucket_size=BLOCK_NUMEL, sub_group_size=size)
        calls: list[int] = []
        engine.optimizer.optimizer.register_step_post_hook(lambda *_: calls.append(1))  # noqa: B023
        micro_step(engine)
        assert len(calls) == (len(engine._reducer.units) if expected == "units" else expected)
    shard = max(unit.layout.shard_numel for unit in engine._reducer.units)
    engine, _ = make(stage, reduce_bucket_size=BLOCK_NUMEL, sub_group_size=2 * shard)
    calls = []
    engine.optimizer.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    micro_step(engine)
    assert 1 < len(calls) < len(engine._reducer.units)


@pytest.mark.slow_unless(stage=2)
@pytest.mark.parametrize("stage", [1, 2])
@distributed(world_size=2)
def test_allgather_bucket_size_is_elements_of_updated_values_under_way(stage):
    most = {}
    for units in (0, 3, 1000):
        engine, tape = make(stage, reduce_bucket_size=1, allgather_bucket_size=units * 128)
        assert {unit.layout.numel for unit in engine._reducer.units} == {128}, "7 x 9 elements and fewer, aligned"
        most[units] = most_under_way(third_step(engine, tape), "share")
    assert most == {0: 1, 3: 3, 1000: len(engine._reducer.units)}


@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_reduce_scatter_false_reduces_all_and_ends_the_same(stage):
    weights = []
    for scatter in (True, False):
        engine, tape = make(stage, reduce_bucket_size=BLOCK_NUMEL, reduce_scatter=scatter)
        events = third_step(engine, tape)
        how, other = ("reduce", "reduce by all-reduce") if scatter else ("reduce by all-reduce", "reduce")
        assert sum(counts(events, how).values()) == len(engine._reducer.units) and not counts(events, other)
        weights.append(engine.module_state_dict())
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_ignore_unused_parameters_false_names_what_no_gradient_reached(stage):
    engine, _ = make(stage, zoo.SometimesUsed())
    micro_step(engine, False)
    engine, _ = make(stage, zoo.SometimesUsed(), ignore_unused_parameters=False)
    with pytest.raises(EngineStateError, match=r"ignore_unused_parameters is false.*never"):
        micro_step(engine, False)


# --- stage 3's limits -----------------------------------------------------------------------------------------------


@distributed(world_size=2)
def test_prefetch_bucket_size_is_how_far_gathering_runs_ahead():
    unit = max(owner.numel for owner in make(3)[1].owners)
    ahead = {}
    for units in (0, 1, 3):
        engine, tape = make(3, stage3_prefetch_bucket_size=units * unit)
        events = third_step(engine, tape)
        started = [i for i, (what, _) in enumerate(events) if what == "gather"]
        runs = events.index(("forward", "blocks.0"))
        ahead[units] = sum(i < runs for i in started) - 2  # but for `first` and the block itself
    assert ahead == {0: 0, 1: 1, 3: 3}


@distributed(world_size=2)
def test_a_unit_larger_than_the_prefetch_bucket_is_gathered_ahead_all_the_same():
    """One unit ahead at the least: blocks of models over a billion parameters are larger than the default."""
    engine, tape = make(3, stage3_prefetch_bucket_size=1)
    events = third_step(engine, tape)
    for this, following in pairwise(UNITS):
        assert events.index(("gather", following)) < events.index(("forward", this))


@distributed(world_size=2)
def test_max_reuse_distance_keeps_what_backward_uses_soon():
    unit = max(owner.numel for owner in make(3)[1].owners)
    gathers = {}
    for units in (0, 4, 1000):
        engine, tape = make(3, stage3_max_reuse_distance=units * unit, stage3_prefetch_bucket_size=0)
        gathers[units] = counts(third_step(engine, tape), "gather")
    assert gathers[1000] == dict.fromkeys(UNITS, 1), "everything stays from forward to backward"
    assert gathers[0] == {name: 2 - (name == "head") for name in UNITS}
    kept = [name for name in UNITS if gathers[4][name] == 1]
    assert kept == UNITS[-len(kept) :] and 1 < len(kept) < len(UNITS), "the last in forward are the first in backward"


@distributed(world_size=2)
def test_max_live_parameters_bounds_what_is_whole_at_once():
    unit = max(owner.numel for owner in make(3)[1].owners)
    eager = {"stage3_max_reuse_distance": 1_000_000_000, "stage3_prefetch_bucket_size": 1_000_000_000}
    for units in (1, 3):
        engine, tape = make(3, stage3_max_live_parameters=units * unit, **eager)
        third_step(engine, tape)
        assert tape.most_live_numel <= (units + 1) * unit, "one unit more than the limit: what a module needs now"
    engine, tape = make(3, **eager)
    third_step(engine, tape)
    assert tape.most_live_numel == sum(owner.numel for owner in tape.owners), "without a limit all stays whole"


@distributed(world_size=2)
def test_param_persistence_threshold_keeps_small_parameters_whole():
    for threshold in (0, 9 * zoo.WIDTH, EVERYTHING):
        model = zoo.Chain(BLOCKS)
        engine, tape = make(3, model, stage3_param_persistence_threshold=threshold)
        small = {name for name, param in zoo.Chain(BLOCKS).named_parameters() if param.numel() < threshold}
        whole = {slot.name for unit in engine._reducer.units if not unit.flat.sharded for slot in unit.layout.slots}
        assert whole == small
        assert {name for name, param in model.named_parameters() if param.numel()} == small
        sharing = sum(counts(third_step(engine, tape), "share").values())
        assert sharing == sum(not unit.flat.sharded for unit in engine._reducer.units) == (threshold > 0)


@distributed(world_size=2)
def test_model_persistence_threshold_bounds_all_that_is_kept_whole():
    sizes = [param.numel() for param in zoo.Chain(BLOCKS).parameters()]
    for most in (0, 2 * BLOCK_NUMEL, EVERYTHING):
        engine, _ = make(3, stage3_param_persistence_threshold=EVERYTHING, stage3_model_persistence_threshold=most)
        kept = sum(slot.numel for unit in engine._reducer.units if not unit.flat.sharded for slot in unit.layout.slots)
        assert most - max(sizes) < kept <= most


# --- leaves and optimizers ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Every row goes through the expert that its route names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(zoo.linear() for _ in range(4))

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        return torch.stack([self.experts[int(index)](row) for row, index in zip(x, route)])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = zoo.linear()
        self.mixture = Experts()
        self.head = zoo.linear()

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        return self.head(self.mixture(self.first(x), route))


@pytest.mark.parametrize("how", ["classes", "names", "name_suffixes"])
@distributed(world_size=2)
def test_leaf_module_is_gathered_as_one_whatever_the_route(how):
    """Each rank uses other experts, yet all gather the same: the whole block, once forward and once backward."""
    engine, _ = make(3, Routed())
    assert sorted(label(unit) for unit in engine._reducer.units)[2:] == [f"mixture.experts.{i}" for i in range(4)]
    given = {"classes": ["Experts"], "names": ["mixture"], "name_suffixes": ["ure"]}
    engine, tape = make(3, Routed(), leaf_module={how: given[how]})
    assert {label(unit) for unit in engine._reducer.units} == {"first", "mixture.experts", "head"}
    events = third_step(engine, tape, torch.tensor([0, 1, 0, 1]) + 2 * dist.get_rank())
    assert counts(events, "gather") == {"first": 2, "mixture.experts": 2, "head": 1}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, [event for event in events if event[0] in ("gather", "reduce")])
    assert everyone[0] == everyone[1]


class RowScaled(torch.optim.SGD):
    """Not elementwise: it looks at a parameter's norm."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.div_(param.grad.norm() + 1)
        super().step(closure)


@distributed(world_size=2)
def test_zero_allow_untested_optimizer_takes_what_was_refused():
    settings = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0, "zero_optimization": {"stage": 2}}

    def build(**more: Any) -> Any:
        model = zoo.Chain(1)
        engine, *_ = deepspeedlite.initialize(
            model=model, optimizer=RowScaled(model.parameters(), lr=0.1), config={**settings, **more}
        )
        return engine

    with pytest.raises(UnsupportedError, match="zero_allow_untested_optimizer"):
        build()
    engine = build(zero_allow_untested_optimizer=True)
    before = [param.detach().clone() for param in engine.parameters()]
    micro_step(engine)
    assert any(not torch.equal(old, new) for old, new in zip(before, engine.parameters()))


def test_leaf_modules_by_name_and_by_the_end_of_it():
    model = zoo.Chain(2)
    named = dict(model.named_modules())
    utils = deepspeedlite.utils
    assert utils.set_z3_leaf_modules_by_name(model, ["blocks.1"]) == ([named["blocks.1"]], [])
    assert utils.get_z3_leaf_modules(model) == [named["blocks.1"]]
    assert utils.set_z3_leaf_modules_by_suffix(model, ["s.0"]) == ([named["blocks.0"]], [])
    assert utils.get_z3_leaf_modules(model) == [named["blocks.0"], named["blocks.1"]]
    with pytest.raises(ConfigError, match=r"no module called blocks\.7"):
        utils.set_z3_leaf_modules_by_name(model, ["blocks.0", "blocks.7"])
    with pytest.raises(ConfigError, match="ends in attention"):
        utils.set_z3_leaf_modules_by_suffix(model, ["attention"])
    assert utils.set_z3_leaf_modules_by_suffix(model, ["attention"], raise_if_not_found=False) == ([], ["attention"])
