"""LAMB with parameters spread over ranks and runs: trajectories against whole tensors and against the formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from harness import distributed

from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.zero.layout import FlatLayout, Run

STEPS = 5
# Of two optimizer groups. With these sizes, 2 and 3 shards cut through parameters and never between two.
SHAPES = ((13, 27), (200,), (5,), (9, 31), (1,), (130,), (40, 7), (64,))
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1)
OPTIONS = (
    {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0},
    {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-6, "weight_decay": 0.3},
)
BOUNDS = {"wide": (0.01, 100.0), "narrow": (0.6, 1.2)}  # "wide" clamps none of the ratios, "narrow" most
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def drawn(seed: int, shapes=SHAPES) -> list[torch.Tensor]:
    """One tensor per shape, the same on every rank; the sizes of their elements differ, and so will the ratios."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) * 0.15 * 1.6**k for k, s in enumerate(shapes)]


def formula(
    options, steps=STEPS, shapes=SHAPES, groups=GROUPS, skipped: Callable[[int, int], bool] = lambda k, t: False
):
    """Weights after `steps`, and the last ratios, in float64: parameter k at step t is left alone where `skipped`."""
    weights = [p.double() for p in drawn(0, shapes)]
    m, v, count = [0.0] * len(weights), [0.0] * len(weights), [0] * len(weights)
    ratios = [1.0] * len(weights)
    for t in range(1, steps + 1):
        for k, g in enumerate(drawn(t, shapes)):
            if skipped(k, t):
                continue
            o, g = options[groups[k]], g.double()
            b1, b2 = o["betas"]
            count[k] += 1
            m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g * g
            u = m[k] / (v[k].sqrt() + o["eps"]) + o["weight_decay"] * weights[k]
            ratio = weights[k].square().sum().sqrt().item() / u.square().sum().sqrt().item()
            ratios[k] = min(max(ratio, o["min_coeff"]), o["max_coeff"])
            c = math.sqrt(1 - b2 ** count[k]) / (1 - b1 ** count[k])
            weights[k] = weights[k] - o["lr"] * c * ratios[k] * u
    return weights, ratios


def unsharded(options, steps=STEPS, shapes=SHAPES, groups=GROUPS) -> tuple[list[torch.Tensor], list[float]]:
    """The same by Lamb on whole tensors."""
    params = [torch.nn.Parameter(p) for p in drawn(0, shapes)]
    whole = FusedLamb([{"params": [p for p, g in zip(params, groups) if g == k], **o} for k, o in enumerate(options)])
    for t in range(1, steps + 1):
        for param, grad in zip(params, drawn(t, shapes)):
            param.grad = grad
        whole.step()
    return [p.detach() for p in params], whole.get_lamb_coeffs()


@dataclass
class Sum:
    """Sums over the ranks, and keeps what it was given."""

    calls: list[tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, sums: torch.Tensor) -> None:
        self.calls.append((sums.dtype, tuple(sums.shape)))
        dist.all_reduce(sums)


class Shard:
    """This rank's runs of the flat buffer behind SHAPES, and Lamb on them."""

    def __init__(self, options, shard_count: int, sum_over_ranks, pieces_per_run: int = 1) -> None:
        self.layout = FlatLayout([(str(k), s, g) for k, (s, g) in enumerate(zip(SHAPES, GROUPS))], shard_count)
        rank = dist.get_rank() if shard_count > 1 else 0
        spans = self.layout.runs(rank) if rank < shard_count else []
        self.spans = [part for span in spans for part in self._cut(span, pieces_per_run)]
        values = self.flat(drawn(0))
        self.runs = [torch.nn.Parameter(values[s.start : s.stop].clone()) for s in self.spans]
        self.optimizer = FusedLamb(
            [{"params": [r for r, s in zip(self.runs, self.spans) if s.group == k], **o} for k, o in enumerate(options)]
        )
        segments = {
            run: [(found.start, found.stop, int(found.slot.name)) for found in self.layout.segments(span)]
            for run, span in zip(self.runs, self.spans)
        }
        self.optimizer.set_segments(segments, len(SHAPES), sum_over_ranks)

    @staticmethod
    def _cut(span: Run, count: int) -> list[Run]:
        ends = [span.start + span.numel * k // count for k in range(count + 1)]
        return [Run(span.group, *pair) for pair in itertools.pairwise(ends)]

    def flat(self, tensors) -> torch.Tensor:
        buffer = torch.zeros(self.layout.numel, dtype=tensors[0].dtype)
        for slot, tensor in zip(self.layout.slots, tensors):
            buffer[slot.start : slot.stop] = tensor.flatten()
        return buffer

    def give_grads(self, t: int, wanted: Callable[[Run], bool] = lambda span: True) -> None:
        flat = self.flat(drawn(t))
        for run, span in zip(self.runs, self.spans):
            run.grad = flat[span.start : span.stop].clone() if wanted(span) else None

    def train(self) -> None:
        for t in range(1, STEPS + 1):
            self.give_grads(t)
            self.optimizer.step()

    def assert_holds(self, expected: list[torch.Tensor]) -> None:
        """Also that padding is still zero: `expected` has zeros there."""
        flat = self.flat(expected)
        for run, span in zip(self.runs, self.spans):
            torch.testing.assert_close(run.detach().to(flat.dtype), flat[span.start : span.stop], **CLOSE)


def options_within(bounds: str) -> list[dict]:
    low, high = BOUNDS[bounds]
    return [{**o, "min_coeff": low, "max_coeff": high} for o in OPTIONS]


def assert_cut_by_shards(layout: FlatLayout) -> None:
    """Otherwise a test with this layout says nothing about sums over ranks."""
    inner = [k * layout.shard_numel for k in range(1, layout.shard_count)]
    assert all(any(slot.start < cut < slot.stop for slot in layout.slots) for cut in inner)


@pytest.mark.parametrize("bounds", list(BOUNDS))
@distributed(world_size=[2, 3])
def test_split_parameters_follow_whole_ones(bounds, world_size):
    options = options_within(bounds)
    total = Sum()
    shard = Shard(options, world_size, total)
    assert_cut_by_shards(shard.layout)
    shard.train()
    by_formula, formula_ratios = formula(options)
    by_lamb, lamb_ratios = unsharded(options)
    shard.assert_holds(by_lamb)
    shard.assert_holds(by_formula)
    assert total.calls == [(torch.float32, (2 * len(SHAPES),))] * STEPS
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(lamb_ratios, rel=1e-5)
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(formula_ratios, rel=1e-5)
    clamped = set(formula_ratios) & set(BOUNDS[bounds])
    assert clamped == (set(BOUNDS["narrow"]) if bounds == "narrow" else set())


@distributed(world_size=2)
def test_norms_of_a_shard_alone_give_another_trajectory(world_size):
    """The test above can fail."""
    options = options_within("wide")
    shard = Shard(options, world_size, None)
    shard.train()
    with pytest.raises(AssertionError):
        shard.assert_holds(formula(options)[0])


@distributed(world_size=[2, 3])
def test_one_parameter_in_several_runs_of_a_rank(world_size):
    options = options_within("wide")
    total = Sum()
    shard = Shard(options, world_size, total, pieces_per_run=3)
    owners = [{found.slot.name for found in shard.layout.segments(span)} for span in shard.spans]
    assert any(a & b for a, b in itertools.pairwise(owners))
    shard.train()
    shard.assert_holds(formula(options)[0])
    assert len(total.calls) == STEPS


@pytest.mark.parametrize("pieces_per_run", [1, 4])
def test_one_process_that_holds_everything_sums_over_its_runs(pieces_per_run):
    options = options_within("wide")
    shard = Shard(options, 1, None, pieces_per_run)
    shard.train()
    expected, ratios = formula(options)
    shard.assert_holds(expected)
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(ratios, rel=1e-5)


@pytest.mark.parametrize("holding", ["no run", "an empty run"])
@distributed(world_size=3)
def test_a_rank_that_holds_nothing_takes_part_in_the_sums(holding, world_size):
    options = options_within("wide")
    total = Sum()
    shard = Shard(options, world_size - 1, total)  # the last rank has no shard
    if dist.get_rank() == world_size - 1:
        assert not shard.runs
        if holding == "an empty run":
            empty = torch.nn.Parameter(torch.zeros(0))
            shard.runs, shard.spans = [empty], [Run(0, 0, 0)]
            shard.optimizer.param_groups[0]["params"] = [empty]
            shard.optimizer.set_segments({empty: []}, len(SHAPES), total)
    shard.train()
    expected, ratios = formula(options)
    shard.assert_holds(expected)
    assert len(total.calls) == STEPS
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(ratios, rel=1e-5)


@distributed(world_size=[2, 3])
def test_a_group_without_gradients_rests_and_its_rank_still_sums(world_size):
    options = options_within("wide")
    total = Sum()
    shard = Shard(options, world_size, total)
    if dist.get_rank() == 0:  # when group 0 rests, this rank has no gradient at all
        assert {span.group for span in shard.spans} == {0}
    for t in range(1, STEPS + 1):
        shard.give_grads(t, lambda span, t=t: span.group == 1 or t % 2 == 1)
        shard.optimizer.step()
    expected, ratios = formula(options, skipped=lambda k, t: GROUPS[k] == 0 and t % 2 == 0)
    shard.assert_holds(expected)
    assert len(total.calls) == STEPS
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(ratios, rel=1e-5)
    for run, span in zip(shard.runs, shard.spans):
        assert shard.optimizer.state[run]["step"] == (STEPS if span.group == 1 else (STEPS + 1) // 2)


@distributed(world_size=[2, 3])
def test_sub_groups_stepped_one_after_another(world_size):
    options = options_within("wide")
    total = Sum()
    shard = Shard(options, world_size, total)
    for t in range(1, STEPS + 1):
        for group in (0, 1):
            shard.give_grads(t, lambda span, group=group: span.group == group)
            shard.optimizer.step()
    expected, ratios = formula(options)
    shard.assert_holds(expected)
    assert len(total.calls) == 2 * STEPS
    assert shard.optimizer.get_lamb_coeffs() == pytest.approx(ratios, rel=1e-5)


@distributed(world_size=2)
def test_bounds_of_each_group_are_its_own():
    options = [{**OPTIONS[0], "min_coeff": 0.01, "max_coeff": 0.02}, {**OPTIONS[1], "min_coeff": 4.0, "max_coeff": 5.0}]
    shard = Shard(options, 2, Sum())
    shard.train()
    expected, ratios = formula(options)
    shard.assert_holds(expected)
    held = {int(found.slot.name) for span in shard.spans for found in shard.layout.segments(span)}
    coefficients = shard.optimizer.get_lamb_coeffs()
    assert [coefficients[k] for k in held] == pytest.approx([ratios[k] for k in held], rel=1e-5)


@distributed(world_size=2)
def test_zeros_on_every_rank_take_ratio_one_and_zeros_on_one_rank_do_not():
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]])[dist.get_rank()]
    run = torch.nn.Parameter(values.clone())  # two parameters of four elements, half of each on each rank
    optimizer = FusedLamb([run], lr=0.1, betas=(0.5, 0.75), bias_correction=False)
    optimizer.set_segments({run: [(0, 2, 0), (2, 4, 1)]}, 2, Sum())
    run.grad = torch.ones(4)
    optimizer.step()  # each element of the update is 0.5 / sqrt(0.25) = 1
    assert optimizer.get_lamb_coeffs() == pytest.approx([1.0, 5 / 2])
    moved = torch.tensor([-0.1, -0.1, -0.25, -0.25])
    torch.testing.assert_close(run.detach(), values + moved, **CLOSE)


def test_bf16_and_mixed_parameters_without_segments():
    """Norms are taken in fp32, whatever the parameters are."""
    half = torch.nn.Parameter(torch.full((1000,), 0.5, dtype=torch.bfloat16))
    full = torch.nn.Parameter(torch.full((1000,), 0.5))
    optimizer = FusedLamb([half, full], lr=0.25, betas=(0.5, 0.5), bias_correction=False)
    half.grad, full.grad = torch.ones_like(half), torch.ones_like(full)
    optimizer.step()
    exact = 0.5 / (0.5 / math.sqrt(0.5))
    assert optimizer.get_lamb_coeffs() == pytest.approx([exact, exact], rel=4e-3)
    assert optimizer.get_lamb_coeffs()[1] == pytest.approx(exact, rel=1e-6)
    assert full.tolist() == pytest.approx([0.375] * 1000, rel=1e-6)
    assert half.tolist() == pytest.approx([0.375] * 1000, rel=8e-3)


def test_incomplete_segments_are_refused():
    first, second = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = FusedLamb([first, second])
    with pytest.raises(OptimizerError, match="1 of this optimizer's 2 runs"):
        optimizer.set_segments({first: [(0, 4, 0)]})
    with pytest.raises(OptimizerError, match="needs a parameter_count"):
        optimizer.set_segments({first: [], second: []}, sum_over_ranks=lambda sums: None)
    optimizer.set_segments({first: [(0, 4, 0)], second: []})
    added = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones(2)
    with pytest.raises(OptimizerError, match="added after set_segments"):
        optimizer.step()
