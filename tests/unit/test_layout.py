"""FlatLayout is plain index arithmetic; its promises hold for any shapes, groups and shard counts."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeedlite.zero.layout import ALIGN_NUMEL, FlatLayout

SHAPES = st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple)
ENTRIES = st.lists(st.tuples(SHAPES, st.integers(0, 3)), max_size=12)


def layout_of(entries, shard_count, run_numel=None):
    return FlatLayout([(f"p{i}", shape, group) for i, (shape, group) in enumerate(entries)], shard_count, run_numel)


@given(ENTRIES, st.integers(1, 9))
def test_every_parameter_has_its_own_aligned_place(entries, shard_count):
    layout = layout_of(entries, shard_count)
    assert sorted(slot.name for slot in layout.slots) == sorted(f"p{i}" for i in range(len(entries)))
    cursor = 0
    for slot in layout.slots:
        assert slot.numel == prod(slot.shape)
        assert slot.start % ALIGN_NUMEL == 0 and slot.start >= cursor
        cursor = slot.stop
    assert cursor <= layout.numel
    groups = [slot.group for slot in layout.slots]
    assert groups == sorted(groups)


@given(ENTRIES, st.integers(1, 9))
def test_shards_tile_the_buffer(entries, shard_count):
    layout = layout_of(entries, shard_count)
    edges = [layout.shard(index) for index in range(shard_count)]
    assert edges[0][0] == 0 and edges[-1][1] == layout.numel
    assert all(stop == start for (_, stop), (start, _) in pairwise(edges))
    assert {stop - start for start, stop in edges} == {layout.shard_numel}


@given(ENTRIES, st.integers(1, 9), st.none() | st.integers(0, 9000))
def test_runs_hold_every_element_of_their_group_once(entries, shard_count, run_numel):
    layout = layout_of(entries, shard_count, run_numel)
    owner = [None] * layout.numel
    for index in range(shard_count):
        start, stop = layout.shard(index)
        for run in layout.runs(index):
            assert start <= run.start < run.stop <= stop
            assert run_numel is None or run.numel <= max(run_numel, ALIGN_NUMEL)
            for element in range(run.start, run.stop):
                assert owner[element] is None
                owner[element] = run.group
    for slot in layout.slots:
        assert owner[slot.start : slot.stop] == [slot.group] * slot.numel


@given(ENTRIES, st.integers(1, 9))
def test_segments_rebuild_every_parameter(entries, shard_count):
    layout = layout_of(entries, shard_count)
    pieces: dict[str, list[tuple[int, int]]] = {}
    for index in range(shard_count):
        for run in layout.runs(index):
            for slot, start, stop in layout.segments(run):
                assert 0 <= start < stop <= run.numel
                pieces.setdefault(slot.name, []).append((run.start + start, run.start + stop))
    for slot in layout.slots:
        covered = sum(stop - start for start, stop in pieces.get(slot.name, []))
        assert covered == slot.numel
        if slot.numel:
            assert pieces[slot.name][0][0] == slot.start and pieces[slot.name][-1][1] == slot.stop


def test_a_layout_needs_a_shard():
    with pytest.raises(ValueError, match="shard_count"):
        FlatLayout([], 0)


@pytest.mark.parametrize(
    "numel, run_numel, lengths",
    [
        (4_196_352, 4_718_592, [4_196_352]),  # a weight of 2048 x 2048 and its bias
        (8_392_704, 4_718_592, [4_198_400, 4_194_304]),  # two of them: no small one is left over
        (1000, 300, [256, 256, 256, 256]),
        (100, 0, [64, 64]),
    ],
)
def test_pieces_of_runs_are_alike(numel, run_numel, lengths):
    assert [run.numel for run in FlatLayout([("a", (numel,), 0)], 1, run_numel).runs()] == lengths
