"""Sparsity patterns: layouts entry by entry against definitions in plain Python, alike on all ranks, configured."""

from __future__ import annotations

import inspect
import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from pairwise import each_pair

from deepspeedlite.config import load_config
from deepspeedlite.ops.sparse_attention.sparsity_config import (
    PATTERNS,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
    sparsity_of,
)
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError

HEADS, BLOCK = 4, 16


def assert_defined_by(pattern, blocks, sees) -> None:
    """`sees(head, row, column)` says of one entry whether it is there; a unidirectional one looks back alone."""
    layout = pattern.make_layout(blocks * BLOCK)
    assert layout.dtype is torch.int64 and layout.shape == (HEADS, blocks, blocks)
    for head, row, column in itertools.product(range(HEADS), range(blocks), range(blocks)):
        head_of_layout = head if pattern.different_layout_per_head else 0
        expected = sees(head_of_layout, row, column) and (pattern.attention == "bidirectional" or column <= row)
        assert layout[head, row, column] == int(expected), (head, row, column)


def windows(sizes, blocks):
    """[[0, 1], [2, 3, 4], ...]: the blocks of each window; the last size repeats, and the last window may be short."""
    found, start = [], 0
    while start < blocks:
        size = sizes[min(len(found), len(sizes) - 1)]
        found.append(list(range(start, min(start + size, blocks))))
        start += size
    return found


def representatives(window, local, group, choice, blocks):
    """The blocks that stand for a window: a group counted from its end, for a short window no later than the last."""
    first = local - (choice + 1) * group
    if len(window) == local:
        return window[first : first + group]
    start = min(window[0] + first, blocks - group)
    return list(range(start, start + group))


@each_pair(
    blocks=[1, 3, 8, 11],
    shape=[(4, 1), (4, 2), (3, 3), (1, 1)],
    attention=["bidirectional", "unidirectional"],
    horizontal=[False, True],
    choices=[1, 2, 4],
)
def test_fixed(blocks, shape, attention, horizontal, choices):
    local, group = shape
    arguments = {
        "num_local_blocks": local,
        "num_global_blocks": group,
        "attention": attention,
        "horizontal_global_attention": horizontal and attention == "bidirectional",
        "num_different_global_patterns": min(choices, local // group),
        "different_layout_per_head": choices > 1,
    }
    pattern = FixedSparsityConfig(HEADS, BLOCK, **arguments)

    def sees(head, row, column):
        parts = windows([local], blocks)
        choice = head % arguments["num_different_global_patterns"]
        stand = {one for part in parts for one in representatives(part, local, group, choice, blocks)}
        together = any(row in part and column in part for part in parts)
        return together or column in stand or (arguments["horizontal_global_attention"] and row in stand)

    assert_defined_by(pattern, blocks, sees)


@each_pair(
    blocks=[1, 4, 9, 11],
    sizes=[(4,), (1,), (1, 2, 3)],
    shared=[((0,), None), ((), None), ((0, 3, 20), None), ((1, 5), (3, 7))],
    attention=["bidirectional", "unidirectional"],
    horizontal=[False, True],
)
def test_variable(blocks, sizes, shared, attention, horizontal):
    horizontal = horizontal and attention == "bidirectional"
    starts, ends = shared
    pattern = VariableSparsityConfig(
        HEADS,
        BLOCK,
        local_window_blocks=sizes,
        global_block_indices=starts,
        global_block_end_indices=ends,
        attention=attention,
        horizontal_global_attention=horizontal,
    )
    named = set(starts) if ends is None else {one for start, end in zip(*shared) for one in range(start, end)}

    def sees(head, row, column):
        together = any(row in part and column in part for part in windows(sizes, blocks))
        return together or column in named or (horizontal and row in named)

    assert_defined_by(pattern, blocks, sees)


@pytest.mark.parametrize("attention", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("blocks, wide", [(5, 1), (5, 3), (8, 4), (9, 5)])
def test_patterns_with_a_sliding_window(blocks, wide, attention):
    def near(row, column):
        return abs(row - column) <= wide // 2

    local = LocalSlidingWindowSparsityConfig(HEADS, BLOCK, wide, attention)
    assert_defined_by(local, blocks, lambda head, row, column: near(row, column))
    bird = BigBirdSparsityConfig(HEADS, BLOCK, False, 0, wide, 2, attention)
    assert_defined_by(bird, blocks, lambda head, row, column: near(row, column) or row < 2 or column < 2)
    former = BSLongformerSparsityConfig(HEADS, BLOCK, True, wide, [1, 4], [2, 6], attention)
    named = (1, 4, 5)
    assert_defined_by(former, blocks, lambda head, row, column: near(row, column) or row in named or column in named)


def test_dense_and_patterns_of_ones_own():
    assert_defined_by(DenseSparsityConfig(HEADS, BLOCK), 3, lambda head, row, column: True)

    class Strided(SparsityConfig):  # as those who used DeepSpeed's wrote one
        def make_layout(self, seq_len):
            layout = self.setup_layout(seq_len)
            layout[0, :, ::2] = 1
            return self.check_and_propagate_first_head_layout(layout)

    class EveryThird(SparsityConfig):
        def visible(self, head, row, column):
            return (row - column) % 3 == head % 3

    assert_defined_by(Strided(HEADS, BLOCK), 5, lambda head, row, column: column % 2 == 0)
    assert_defined_by(EveryThird(HEADS, BLOCK, True), 7, lambda head, row, column: (row - column) % 3 == head % 3)
    with pytest.raises(UnsupportedError, match="SparsityConfig is no pattern"):
        SparsityConfig(4).make_layout(64)


# --- random blocks ----------------------------------------------------------------------------------------------------


def random_alone(per_row, attention="bidirectional", different=True, seed=0):
    """Windows of one block, none for all: what else is seen is random."""
    return VariableSparsityConfig(
        HEADS, BLOCK, different, per_row, [1], [], attention=attention, seed=seed
    ).make_layout(40 * BLOCK)


def test_random_blocks_are_as_many_as_asked_for():
    """In each row, differing between heads and rows, and spread over all columns."""
    layout = random_alone(3)
    layout[:, range(40), range(40)] = 0  # the windows
    assert set(layout.sum(2).flatten().tolist()) <= {2, 3}  # one of the three may lie in the window
    assert not torch.equal(layout[0], layout[1]) and not torch.equal(layout[0, 0], layout[0, 1])
    assert bool((layout.sum((0, 1)) > 0).all())
    assert all(torch.equal(one, other) for one, other in itertools.pairwise(random_alone(3, different=False)))


def test_random_blocks_look_back_where_all_do():
    layout = random_alone(4, "unidirectional")
    assert bool((layout.triu(1) == 0).all())
    assert layout.sum(2)[:, :4].tolist() == [[1, 2, 3, 4]] * HEADS  # fewer than four are all there are
    assert bool((layout.sum(2)[:, 4:] >= 4).all())
    bird = BigBirdSparsityConfig(HEADS, BLOCK, True, 2, 1, 0, "unidirectional").make_layout(20 * BLOCK)
    assert bool((bird.triu(1) == 0).all()) and bool((bird.sum(2)[:, 2:] >= 2).all())


def test_random_blocks_change_with_the_seed_alone():
    first = random_alone(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            again = random_alone(3)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, random_alone(3, seed=1))


@distributed(world_size=2)
def test_ranks_make_the_same_layouts():
    """Without asking each other, whatever their own generators stand at."""
    torch.manual_seed(dist.get_rank())
    bird = BigBirdSparsityConfig(HEADS, BLOCK, True, 3).make_layout(30 * BLOCK)
    both = [torch.empty_like(bird) for _ in range(2)]
    dist.all_gather(both, bird)
    assert torch.equal(*both)


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: FixedSparsityConfig(4).make_layout(65), "65 tokens is no multiple of block=16"),
        (lambda: FixedSparsityConfig(4, num_local_blocks=4, num_global_blocks=3), "does not divide"),
        (lambda: FixedSparsityConfig(4, num_global_blocks=0), "does not divide"),
        (lambda: FixedSparsityConfig(4, num_different_global_patterns=2), "different_layout_per_head=True"),
        (lambda: FixedSparsityConfig(4, 16, True, 4, 2, num_different_global_patterns=3), "2 groups of 2"),
        (lambda: FixedSparsityConfig(4, attention="both"), "one of bidirectional, unidirectional"),
        (
            lambda: VariableSparsityConfig(4, attention="unidirectional", horizontal_global_attention=True),
            "needs attention='bidirectional'",
        ),
        (lambda: VariableSparsityConfig(4, local_window_blocks=[]), "no list of sizes"),
        (lambda: VariableSparsityConfig(4, global_block_indices=[0, 2], global_block_end_indices=[1]), "2 entries"),
        (lambda: BSLongformerSparsityConfig(4, global_block_indices=[2], global_block_end_indices=[2]), "are none"),
        (lambda: BSLongformerSparsityConfig(4, global_block_indices=[-1]), "count from the first"),
        (lambda: VariableSparsityConfig(4, num_random_blocks=5).make_layout(64), "a row has 4 blocks"),
        (lambda: BigBirdSparsityConfig(4).make_layout(32), "num_sliding_window_blocks=3, and a row has 2"),
        (lambda: BigBirdSparsityConfig(4, num_global_blocks=9).make_layout(64), "num_global_blocks=9"),
    ],
)
def test_what_cannot_be_is_said(make, says):
    with pytest.raises(ValueError, match=says) as raised:
        make()
    assert isinstance(raised.value, ConfigError)


def test_an_unknown_direction_is_deepspeeds_error_too():
    with pytest.raises(NotImplementedError):
        BigBirdSparsityConfig(4, attention="both")


# --- the configuration ------------------------------------------------------------------------------------------------


def section(**keys):
    return load_config({"train_batch_size": 1, "sparse_attention": keys}).sparse_attention


@pytest.mark.parametrize("mode", PATTERNS)
def test_every_mode_makes_its_pattern(mode):
    """With nothing given, DeepSpeed's defaults: those of the class, and no random blocks."""
    made = sparsity_of(section(mode=mode), HEADS)
    given = {"num_random_blocks": 0} if mode == "bigbird" else {}
    assert vars(made) == vars(PATTERNS[mode](HEADS, **given))
    known = set(inspect.signature(PATTERNS[mode]).parameters) - {"num_heads"}
    assert known <= set(type(section()).model_fields), "a key of the pattern that the section has not"


def test_the_section_of_deepspeeds_own_example():
    keys = {
        "mode": "fixed",
        "block": 16,
        "different_layout_per_head": True,
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 4,
    }
    made = sparsity_of(section(**keys), 16)
    assert vars(made) == vars(FixedSparsityConfig(16, 16, True, 4, 1, "bidirectional", False, 4))
    assert load_config({"train_batch_size": 1}).sparse_attention is None


def test_keys_of_other_patterns_are_told_of(caplog):
    with caplog.at_level(logging.INFO):
        sparsity_of(section(mode="local", num_random_blocks=2), 4)
    assert 'sparse_attention.num_random_blocks: changes nothing: mode "local" does not read it' in caplog.text


def test_contradictions_of_the_section_are_the_patterns():
    with pytest.raises(ConfigError, match="different_layout_per_head"):
        sparsity_of(section(mode="fixed", num_different_global_patterns=2), 4)


def test_scripts_read_the_section_as_a_dict():
    """As DeepSpeedExamples' bing_bert and GPT-2 do, which take the mode out and hand the rest to the mode's class."""
    from deepspeedlite.compat.config import DeepSpeedConfig

    config = DeepSpeedConfig({"train_batch_size": 1, "sparse_attention": {"mode": "bslongformer", "block": 32}})
    found = config.sparse_attention
    assert found.get("mode") == "bslongformer"
    del found["mode"]
    made = BSLongformerSparsityConfig(num_heads=8, **found)
    assert vars(made) == vars(BSLongformerSparsityConfig(8, 32)) and config.sparse_attention["mode"] == "bslongformer"
    assert not DeepSpeedConfig({"train_batch_size": 1}).sparse_attention
