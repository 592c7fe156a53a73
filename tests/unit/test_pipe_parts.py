"""The parts of a pipeline that are plain arithmetic: cuts, orders, numbering, outlines, layer descriptions."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from deepspeedlite.parallel.pipe.partition import check_no_empty_stage, partition_balanced, partition_uniform
from deepspeedlite.parallel.pipe.schedule import SCHEDULES, before
from deepspeedlite.parallel.pipe.specs import layer_numel
from deepspeedlite.parallel.pipe.stage_comm import Outline
from deepspeedlite.parallel.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)
from deepspeedlite.pipe import LayerSpec, TiedLayerSpec
from deepspeedlite.runtime.errors import ConfigError, PipelineError


def test_uniform_parts():
    assert partition_uniform(10, 3) == [0, 4, 7, 10]
    assert partition_uniform(4, 4) == [0, 1, 2, 3, 4]
    assert partition_uniform(2, 3) == [0, 1, 2, 2]


def heaviest(weights: list[float], edges: list[int]) -> float:
    return max(sum(weights[start:stop]) for start, stop in itertools.pairwise(edges))


@pytest.mark.parametrize("fractions", [False, True])
def test_balanced_parts_are_the_best_there_are(fractions):
    """Against all ways to cut small lists."""
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 8)
        parts = draw.randint(1, count)
        weights = [draw.random() if fractions else draw.choice([0, 0, 1, 5, 17]) for _ in range(count)]
        edges = partition_balanced(weights, parts)
        assert edges[0] == 0 and edges[-1] == count and all(a < b for a, b in itertools.pairwise(edges))
        ways = ([0, *cut, count] for cut in itertools.combinations(range(1, count), parts - 1))
        assert heaviest(weights, edges) <= min(heaviest(weights, way) for way in ways) + 1e-6


def test_more_stages_than_layers():
    assert partition_balanced([5, 5], 3) == [0, 1, 2, 2]
    with pytest.raises(ConfigError, match="2 layers cannot fill 3 pipeline stages"):
        check_no_empty_stage(partition_uniform(2, 3))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages, micro_batches", [(1, 1), (1, 4), (2, 1), (2, 5), (4, 2), (4, 4), (4, 9), (7, 16)])
def test_orders_run_to_their_end(name, stages, micro_batches):
    """Stages that wait for their neighbours' messages, and never for a send, all finish; none holds too much."""
    orders = [SCHEDULES[name](stages, stage, micro_batches) for stage in range(stages)]
    at, done = [0] * stages, set()
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        moved = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, index = order[at[stage]]
                needs = (stage - 1, "forward", index) if kind == "forward" else (stage + 1, "backward", index)
                if 0 <= needs[0] < stages and needs not in done:
                    break
                if kind == "backward":
                    assert (stage, "forward", index) in done
                done.add((stage, kind, index))
                at[stage] += 1
                moved = True
        assert moved, "the stages wait for each other"
    for stage, order in enumerate(orders):
        held = itertools.accumulate(1 if one.kind == "forward" else -1 for one in order)
        assert max(held) == (micro_batches if name == "gpipe" else min(stages - stage, micro_batches))


def test_passes_before():
    order = SCHEDULES["1f1b"](3, 1, 4)  # F0 F1 B0 F2 B1 F3 B2 B3
    assert before(order, "forward", "backward") == [0, 0, 1, 2]
    assert before(order, "backward", "forward") == [2, 3, 4, 4]


def test_topology():
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    assert topology.world_size() == 12 and topology.get_axis_names() == ["pipe", "data", "model"]
    assert topology.get_rank(pipe=1, data=2, model=0) == 10
    assert topology.get_coord(10) == (1, 2, 0) and topology.get_coord(10).data == 2
    assert topology.get_axis_comm_lists("model")[:2] == [[0, 1], [2, 3]]
    assert topology.get_axis_comm_lists("pipe")[0] == [0, 6]
    assert topology.get_axis_list("pipe", 1) == list(range(6, 12))
    assert topology.filter_match(pipe=0, model=1) == [1, 3, 5]
    assert (
        topology.get_rank_repr(11) == "model_01"
        and topology.get_rank_repr(3, omit_axes=()) == "pipe_00-data_01-model_01"
    )
    assert topology.get_dim("model") == 2 and topology.get_dim("expert") == 0
    assert PipeDataParallelTopology(2, 2).get_axis_comm_lists("data") == [[0, 1], [2, 3]]
    assert PipeDataParallelTopology(2, 2).get_axis_comm_lists("model") == []
    with pytest.raises(ConfigError, match="every coordinate"):
        topology.get_rank(pipe=1)
    with pytest.raises(ConfigError, match="outside a grid"):
        topology.get_rank(pipe=2, data=0, model=0)
    with pytest.raises(ConfigError, match="rank 12 is not in"):
        topology.get_coord(12)
    with pytest.raises(ConfigError, match="one length of at least 1 per axis"):
        ProcessTopology(["pipe"], [0])


def test_outlines():
    hidden, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, dtype=torch.bool)
    outline = Outline.of((hidden, mask), 0)
    assert Outline.from_bytes(outline.to_bytes()) == outline
    assert [(t.dtype, t.shape) for t in outline.room(torch.device("cpu"))] == [
        (torch.float32, (2, 3)),
        (torch.bool, (2,)),
    ]
    assert len(outline.room(torch.device("cpu"), grads=True)) == 1
    assert Outline.of(hidden, 0) != Outline.of((hidden,), 0) != Outline.of((hidden.detach(),), 0)
    with pytest.raises(PipelineError, match="stage 3 returned a tuple of Tensor, dict; only dense tensors"):
        Outline.of((hidden, {}), 3)
    with pytest.raises(PipelineError, match="returned a list; only dense"):
        Outline.of([hidden], 0)
    with pytest.raises(PipelineError, match="too many to pass"):
        Outline.of((hidden,) * 400, 0).to_bytes()


def test_layer_specs():
    spec = LayerSpec(torch.nn.Linear, 3, 4, bias=False)
    assert repr(spec) == "Linear(3, 4, bias=False)" and isinstance(spec.build(), torch.nn.Linear)
    before_counting = torch.get_rng_state()
    assert layer_numel(spec) == 12 and layer_numel(torch.nn.Linear(2, 2)) == 6 and layer_numel(torch.relu) == 0
    assert layer_numel(LayerSpec(torch.nn.Linear, 3, 1 << 40)) == 4 << 40  # no memory is spent on it
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    assert layer_numel(frozen) == 0
    torch.set_rng_state(before_counting)
    layer_numel(spec)
    assert torch.equal(torch.get_rng_state(), before_counting)
    with pytest.raises(ConfigError, match="LayerSpec takes a class"):
        LayerSpec(torch.nn.Linear(3, 4).weight)
    with pytest.raises(ConfigError, match=r"TiedLayerSpec\('e', Linear\): the module has no weight 'table'"):
        TiedLayerSpec("e", torch.nn.Linear, 3, 4, tied_weight_attr="table").build()
    assert isinstance(
        TiedLayerSpec("e", torch.nn.Linear, 3, 4, tied_weight_attr=["weight", "bias"]).build(), torch.nn.Linear
    )
