"""Small sums through slots: right however late ranks are, and told as others when the ranks do not meet."""

from __future__ import annotations

import os
import time
from unittest.mock import patch

import pytest
import torch
from harness import distributed
from test_shared_memory import NEVER_SENT, link, run_pair

from deepspeedlite.comm import Group
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.transports import slots

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or not slots.ARE_ORDERED, reason="needs memfd_create, and x86's order of stores"
)


def connected() -> Group:
    """A group whose small sums go by slots from now on."""
    group = Group()
    link(group)
    group.all_reduce(torch.ones(1))
    return group


@distributed(world_size=[2, 3])
def test_sums_are_right_however_late_the_ranks_are() -> None:
    group = connected()
    shown = link(group)._board.count
    for number in range(60):
        dtype = (torch.float32, torch.bfloat16, torch.int64)[number % 3]
        x = torch.full((1 + 7 * number,), number + group.rank + 1, dtype=dtype)
        if number % 20 == 10 + group.rank:
            time.sleep(0.05)  # the others sleep by then
        group.all_reduce(x)
        assert (x == sum(number + rank + 1 for rank in range(group.size))).all()
        if number % 5 == 0:  # other exchanges in between, smaller and larger
            group.all_gather_into(torch.empty(64 * group.size), torch.ones(64), tag=3)
            large = torch.ones(30_000)
            group.all_reduce(large, "max")
            group.all_reduce(large)
            assert (large == group.size).all()
    assert link(group)._board.count == shown + 60
    assert not link(group)._pending and not link(group)._arrived


@distributed(world_size=2)
def test_nothing_goes_by_slots_where_stores_have_no_order() -> None:
    group = connected()
    shown = link(group)._board.count
    with patch("deepspeedlite.transports.shared_memory.ARE_ORDERED", False):
        x = torch.ones(8)
        group.all_reduce(x)
    assert (x == 2).all() and link(group)._board.count == shown


@pytest.mark.parametrize("how", ["another sum", "another size", "another call"])
@distributed(world_size=2)
def test_ranks_that_do_not_meet_hear_it(how: str) -> None:
    group = connected()
    numel = 8 + group.rank if how == "another size" else 8
    label = f"sum {group.rank}" if how == "another sum" else "sum"
    problem = {"another sum": "something else than", "another size": "bytes, not", "another call": "waits in a"}[how]
    started = time.monotonic()
    with pytest.raises(DistributedError, match=problem):
        if how == "another call" and group.rank:
            group.all_gather_into(torch.empty(16), torch.empty(8), tag=5, label="a shard")
        else:
            group.all_reduce(torch.ones(numel), label=label)
    assert time.monotonic() - started < 20  # the time limit is 60 s
    with pytest.raises(DistributedError, match="out of step"):
        group.all_reduce(torch.ones(8), label="the next")


@pytest.mark.slow
def test_a_rank_that_has_ended_is_named_at_once(tmp_path) -> None:
    first = "group.all_reduce(torch.ones(4))\ngroup.all_reduce(torch.ones(4))\n"
    gather = "group.all_gather_into(torch.empty(2 * 64), torch.empty(64),"
    by_slots = NEVER_SENT.replace(gather, "group.all_reduce(torch.ones(4),")
    said = run_pair(tmp_path, first + by_slots)
    assert said.startswith("DistributedError True") and "rank 0 has ended" in said, said
    assert "rank 1 waits in all_reduce of the values of a layer" in said
