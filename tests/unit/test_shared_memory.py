"""Shards through shared memory: results as over TCP, no order that hangs, nothing left behind, quick errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from paths import ROOT

import deepspeedlite
from deepspeedlite.comm import Group
from deepspeedlite.comm.registry import registry
from deepspeedlite.comm.transport import TorchTransport
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.plugins import plugins
from deepspeedlite.transports import shared_memory
from deepspeedlite.transports.shared_memory import SWITCH, SharedMemoryLink

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create (Linux)")


def link(group: Group) -> SharedMemoryLink:
    found = group.transport.link
    assert found is not None, "the ranks of a test are on one host"
    return found


def everyones(group: Group, make: Any) -> list[torch.Tensor]:
    """What each rank makes of its own generator."""
    return [make(torch.Generator().manual_seed(rank)) for rank in range(group.size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@distributed(world_size=[2, 3, 4])
def test_sums_are_those_of_float64_in_rank_order(dtype: torch.dtype) -> None:
    group = Group()
    for numel in (1, 64, 5000):
        tensors = everyones(group, lambda g, n=numel: torch.randn(group.size * n, generator=g).to(dtype))
        exact = torch.stack([tensor.double() for tensor in tensors]).sum(0)
        full, shard = tensors[group.rank].clone(), torch.empty(numel, dtype=dtype)
        group.reduce_scatter_into(shard, full)
        mine = slice(group.rank * numel, (group.rank + 1) * numel)
        rounding = torch.finfo(dtype).eps * 8
        torch.testing.assert_close(shard.double(), exact[mine], rtol=rounding, atol=rounding)
        out = torch.empty_like(full)
        group.all_gather_into(out, shard)
        torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=rounding)
    assert link(group).held_nbytes > 0, "it went through shared memory"


@distributed(world_size=[2, 3])
def test_a_large_all_reduce_is_split_and_leaves_all_ranks_equal_to_the_bit() -> None:
    group = Group()
    for numel in (16_384, 100_003):
        tensors = everyones(group, lambda g, n=numel: torch.randn(n, generator=g))
        mine = tensors[group.rank].clone()
        works = [group.all_reduce(mine, async_op=True), group.all_reduce(other := mine.clone(), async_op=True)]
        for work in works:
            assert work is not None
            work.wait()
            work.wait()
        torch.testing.assert_close(mine, torch.stack(tensors).sum(0))
        assert all(bool((each == mine).all()) for each in group.all_gather_objects(mine))
        assert other.isfinite().all()
    assert link(group).held_nbytes > 0


@distributed(world_size=[2, 3])
def test_empty_pieces_are_no_message() -> None:
    group = Group()
    group.all_gather_into(torch.empty(0), torch.empty(0))
    group.reduce_scatter_into(torch.empty(0), torch.empty(0))
    assert link(group).held_nbytes == 0


@distributed(world_size=[2, 3])
def test_ranks_may_wait_in_different_orders() -> None:
    group = Group()
    outs = [torch.empty(group.size * 1000) for _ in range(6)]
    works = [group.all_gather_into(out, torch.full((1000,), 10.0 * i + group.rank), True) for i, out in enumerate(outs)]
    for index in sorted(range(6), key=lambda i: (i * (group.rank + 1) + group.rank) % 7):
        work = works[index]
        assert work is not None
        work.wait()
    for i, out in enumerate(outs):
        assert out.view(group.size, -1)[:, 0].tolist() == [10.0 * i + rank for rank in range(group.size)]


@pytest.mark.slow
@distributed(world_size=2)
def test_a_rank_may_run_far_ahead_of_the_others() -> None:
    """More messages than a socket's queue holds."""
    group = Group()
    shared_memory._PATIENCE_S = 0.0
    link(group)
    if group.rank == 1:
        time.sleep(0.5)
    outs = [torch.empty(2 * 16) for _ in range(2000)]
    works = [group.all_gather_into(out, torch.full((16,), i + group.rank / 2), True) for i, out in enumerate(outs)]
    for work in works:
        assert work is not None
        work.wait()
    shared_memory._PATIENCE_S = 1.0
    assert all(out[0] == i and out[16] == i + 0.5 for i, out in enumerate(outs))


@distributed(world_size=[2, 3])
def test_memory_is_used_again() -> None:
    group = Group()
    full = torch.ones(group.size * 100_000)
    held = []
    for _ in range(20):
        works = [group.reduce_scatter_into(torch.empty(100_000), full, async_op=True) for _ in range(3)]
        for work in works:
            assert work is not None
            work.wait()
        held.append(link(group).held_nbytes)
    block = 1 << (100_000 * 4 * (group.size - 1) - 1).bit_length()
    assert held[-1] <= 8 * block, f"three are under way at a time, and a few more are not known to be read: {held}"


@distributed(world_size=[2, 3])
def test_what_is_made_in_shared_memory_is_sent_from_there() -> None:
    group = Group()
    full = group.alloc_shared(group.size * 100_000, torch.float32, torch.device("cpu"))
    full.fill_(group.rank + 1)
    held = link(group).held_nbytes
    shard = torch.empty(100_000)
    group.reduce_scatter_into(shard, full)
    assert link(group).held_nbytes == held >= full.nbytes, "nothing was copied"
    assert set(shard.tolist()) == {sum(range(1, group.size + 1))}


@distributed(world_size=2)
def test_shared_memory_is_used_again_when_it_was_read_and_dropped() -> None:
    group, cpu = Group(), torch.device("cpu")
    full = group.alloc_shared(2 * 100_000, torch.float32, cpu)
    address, view = full.data_ptr(), full[5:7]
    del full
    assert group.alloc_shared(2 * 100_000, torch.float32, cpu).data_ptr() != address, "a view of it is left"
    full = view.as_strided((2 * 100_000,), (1,), 0).fill_(group.rank + 1)
    if group.rank == 1:
        time.sleep(0.5)
    shard = torch.empty(100_000)
    work = group.reduce_scatter_into(shard, full, async_op=True)
    del full, view
    if group.rank == 0:
        assert group.alloc_shared(2 * 100_000, torch.float32, cpu).fill_(9).data_ptr() != address, (
            "rank 1 has not read it"
        )
    assert work is not None
    work.wait()
    assert set(shard.tolist()) == {3}
    del work
    group.barrier()
    assert group.alloc_shared(2 * 100_000, torch.float32, cpu).data_ptr() == address


@distributed(world_size=2)
def test_idle_memory_above_a_limit_is_given_back() -> None:
    group, numel = Group(), 1_000_000
    shared_memory.KEPT_NBYTES = 3 * numel
    before = resident_shared_nbytes()
    for _ in range(3):
        full = group.alloc_shared(2 * numel, torch.float32, torch.device("cpu")).fill_(group.rank + 1)
        shard = torch.empty(numel)
        group.reduce_scatter_into(shard, full)
        assert set(shard.tolist()) == {3}
        del full
        group.barrier()
        group.all_gather_into(torch.empty(2 * 64), torch.ones(64))  # anything: blocks are looked after by the way
        assert link(group).held_nbytes <= shared_memory.KEPT_NBYTES
        assert resident_shared_nbytes() - before <= shared_memory.KEPT_NBYTES


def resident_shared_nbytes() -> int:
    """Bytes of shared memory that this process has touched and that still are there."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))


@distributed(world_size=3)
def test_a_subgroup_has_a_link_of_its_own() -> None:
    subgroup = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return
    group, out = Group(subgroup), torch.empty(2 * 64)
    group.all_gather_into(out, torch.full((64,), float(dist.get_rank())))
    assert (out[0], out[64]) == (0, 2)
    assert link(group) is link(Group(subgroup)), "groups of the same ranks share one"


@distributed(world_size=2)
def test_ranks_that_disagree_on_sizes() -> None:
    group = Group()
    numel = 100 + group.rank
    with pytest.raises(DistributedError, match=rf"rank {1 - group.rank} sent \d+ bytes, not"):
        group.all_gather_into(torch.empty(2 * numel), torch.empty(numel))


@distributed(world_size=3)
def test_ranks_that_wait_for_each_other_in_different_calls_hear_it_at_once() -> None:
    group = Group()
    calls = {1: "the values of first", 2: "the values of second"}
    whole, tag = torch.empty(3 * 64), 2 if group.rank == 1 else 1
    group.all_gather_into(whole, torch.ones(64), tag=1, label=calls[1])
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"out of step: rank . of the group waits in the values of") as caught:
        group.all_gather_into(whole, torch.ones(64), tag=tag, label=calls[tag])
    assert time.monotonic() - started < 10  # the time limit is 60 s
    assert all(call in str(caught.value) for call in calls.values())
    with pytest.raises(DistributedError, match="out of step"):  # what was sent is no answer to what comes now
        group.all_gather_into(whole, torch.ones(64), tag=3 - tag, label=calls[3 - tag])


@distributed(world_size=2)
def test_what_is_for_something_else_is_not_taken() -> None:
    group = Group()
    with pytest.raises(DistributedError, match=rf"rank {1 - group.rank} sent what is for something else than sum"):
        group.all_reduce(torch.ones(100_000), label=f"sum {group.rank}")


@distributed(world_size=2)
def test_ranks_that_start_in_different_orders_are_not_out_of_step() -> None:
    """Nor is one that the other waits for, while it is late for what was sent long ago."""
    group = Group()
    outs = {tag: torch.empty(2 * 64) for tag in (1, 2)}
    works = {}
    for tag in (1, 2) if group.rank else (2, 1):
        shard = torch.full((64,), float(tag))
        works[tag] = group.all_gather_into(outs[tag], shard, async_op=True, tag=tag, label=f"number {tag}")
        time.sleep(0.4 * group.rank)
    for tag in (2, 1) if group.rank else (1, 2):
        works[tag].wait()
        time.sleep(0.6 * (1 - group.rank))
    assert (outs[1] == 1).all() and (outs[2] == 2).all()


@distributed(world_size=2)
def test_one_rank_can_keep_all_on_tcp() -> None:
    group = Group()
    group.transport.close()  # what tests before this one have connected
    os.environ.pop(SWITCH, None)
    if group.rank == 1:
        os.environ[SWITCH] = "0"
    try:
        assert group.transport.link is None
    finally:
        os.environ.pop(SWITCH, None)
    out = torch.empty(2 * 64)
    group.all_gather_into(out, torch.full((64,), float(group.rank)))
    assert (out[0], out[64]) == (0, 1)
    group.transport.close()


@distributed(world_size=3)
def test_a_rank_that_cannot_be_called_keeps_all_on_tcp() -> None:
    """As in containers of one kernel with networks of their own."""
    refused = {"side_effect": ConnectionRefusedError} if dist.get_rank() == 1 else {"wraps": shared_memory._call}
    with patch.object(shared_memory, "_call", **refused):
        assert shared_memory.connect(None, dist.get_rank(), 3) is None


@pytest.mark.slow
@distributed(world_size=2)
def test_nothing_is_left_when_the_process_group_is_gone() -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    subgroup = dist.new_group([0, 1])
    dist.barrier(subgroup)
    before = descriptors()
    group = Group(subgroup)
    group.all_gather_into(torch.empty(2 * 4096), torch.empty(4096))
    assert descriptors() > before
    dist.barrier()
    link(group).close()
    assert descriptors() == before


SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from deepspeedlite.comm import Group
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=30))
group = Group()
group.all_gather_into(torch.empty(2), torch.empty(1))
"""

SENDER_ENDS = """
if rank == 0:
    out = torch.empty(2 * 2**20)
    work = group.all_gather_into(out, torch.full((2**20,), 7.0), async_op=True)
    os._exit(0)
time.sleep(1)
out = torch.empty(2 * 2**20)
group.all_gather_into(out, torch.full((2**20,), 8.0))
print("got", out.view(2, -1).sum(1).tolist(), flush=True)
"""

NEVER_SENT = """
if rank == 0:
    os._exit(0)
started = time.monotonic()
try:
    group.all_gather_into(torch.empty(2 * 64), torch.empty(64), label="the values of a layer")
except RuntimeError as error:
    print(type(error).__name__, time.monotonic() - started < 10, error, flush=True)
os._exit(0)
"""


def run_pair(tmp_path: Path, body: str) -> str:
    """What rank 1 prints."""
    command = [sys.executable, "-c", SCRIPT + body]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "0", str(tmp_path / "store")], env=env) as other:
        ended = subprocess.run(
            [*command, "1", str(tmp_path / "store")], env=env, capture_output=True, text=True, timeout=90
        )
        other.wait(30)
    assert not ended.returncode, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_what_was_sent_can_be_read_after_the_sender_has_ended(tmp_path: Path) -> None:
    assert run_pair(tmp_path, SENDER_ENDS).strip() == f"got {[7.0 * 2**20, 8.0 * 2**20]}"


@pytest.mark.slow
def test_a_rank_that_has_ended_is_named_at_once(tmp_path: Path) -> None:
    said = run_pair(tmp_path, NEVER_SENT)
    assert said.startswith("DistributedError True"), said
    assert "rank 0 has ended" in said
    assert "rank 1 waits in all_gather_into_tensor of the values of a layer" in said


@distributed(world_size=[2, 3])
def test_a_shared_shard_is_gathered_without_a_copy_and_read_before_it_is_written(world_size: int) -> None:
    group, numel = Group(), 50_000
    shard = group.alloc_shared(numel, torch.float32, torch.device("cpu"))
    before = link(group).held_nbytes
    for turn in range(6):
        group.wait_for_readers(shard)  # without it the others would find the next turn's numbers
        shard.fill_(10 * turn + group.rank)
        out = torch.empty(world_size * numel)
        work = group.all_gather_into(out, shard, async_op=True, final=True)
        assert work is not None
        if group.rank == turn % world_size:
            time.sleep(0.05)  # this rank reads late
        work.wait()
        expected = torch.arange(float(world_size)).repeat_interleave(numel) + 10 * turn
        assert torch.equal(out, expected), turn
    assert link(group).held_nbytes == before, "only the shared memory was used"


@pytest.mark.slow
@distributed(world_size=2)
def test_settling_waits_for_a_rank_that_has_not_read_and_not_for_one_that_has_ended(tmp_path: Path) -> None:
    group = Group()
    shard = group.alloc_shared(50_000, torch.float32, torch.device("cpu"))
    shard.fill_(group.rank)
    group.barrier()
    out = torch.empty(100_000)
    if group.rank == 0:
        work = group.all_gather_into(out, shard, async_op=True, final=True)
        assert work is not None
        link(group)._timeout_s, kept = 0.2, link(group)._timeout_s
        with pytest.raises(DistributedError, match=r"ranks \[1\] to read"):
            group.wait_for_readers(shard)
        link(group)._timeout_s = kept
        (tmp_path / "seen").touch()
        work.wait()
        group.wait_for_readers(shard)
        shard.fill_(7)
    else:
        while not (tmp_path / "seen").exists():
            time.sleep(0.01)
        group.all_gather_into(out, shard, final=True)
    assert torch.equal(out, torch.tensor([0.0, 1.0]).repeat_interleave(50_000))


# --- without it -------------------------------------------------------------------------------------------------------


@distributed(world_size=[2, 3])
def test_without_the_plug_in_torchs_own_collectives_do_the_same(tmp_path: Path) -> None:
    """The core alone: every stage trains as it does over shared memory."""

    def losses() -> list[float]:
        found = []
        for stage in range(4):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
            config = {
                "train_micro_batch_size_per_gpu": 4,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
                "zero_optimization": {"stage": stage},
            }
            engine, *_ = deepspeedlite.initialize(model=model, config=config)
            draw = torch.Generator().manual_seed(dist.get_rank())
            for _ in range(3):
                inputs = torch.randn(4, 16, generator=draw)
                loss = (engine(inputs) - inputs).square().mean()
                engine.backward(loss)
                engine.step()
                found.append(loss.item())
            engine.destroy()
        return found

    registry.close()
    shared = losses()
    assert type(Group().transport) is not TorchTransport
    registry.close()
    with patch.object(plugins, "find", lambda kind, name: None):
        alone = losses()
        assert type(Group().transport) is TorchTransport
    registry.close()
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(shared))
