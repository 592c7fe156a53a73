"""`deepspeedlite.comm`'s functions: what each rank gets, handles, groups, the log, and errors. Real gloo processes."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import distributed

from deepspeedlite import comm
from deepspeedlite.runtime.errors import DistributedError


def of(rank: int, numel: int = 6) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) + 10 * rank


@distributed(3)
def test_what_each_rank_gets() -> None:
    """Every collective against what it is defined to give; sync and async alike."""
    rank, world = comm.get_rank(), comm.get_world_size()
    all_ranks = [of(r) for r in range(world)]
    total = torch.stack(all_ranks).sum(0)
    for async_op in (False, True):

        def done(work: object, async_op: bool = async_op) -> None:
            assert (work is not None) == async_op
            if async_op:
                work.wait()

        for op, expected in (("sum", total), (comm.ReduceOp.AVG, total / world), (comm.ReduceOp.MAX, all_ranks[-1])):
            x = of(rank)
            done(comm.all_reduce(x, op, async_op=async_op))
            torch.testing.assert_close(x, expected)
        x = of(rank) + 1
        done(comm.all_reduce(x, comm.ReduceOp.PRODUCT, async_op=async_op))
        torch.testing.assert_close(x, torch.stack([each + 1 for each in all_ranks]).prod(0))
        several = [of(rank), of(rank, 2).double().float().view(2, 1)]
        done(comm.all_reduce_coalesced(several, async_op=async_op))
        torch.testing.assert_close(several[0], total)
        torch.testing.assert_close(several[1], total[:2].view(2, 1))

        x = of(rank)
        done(comm.broadcast(x, src=1, async_op=async_op))
        assert torch.equal(x, of(1))
        pieces = [torch.empty(6) for _ in range(world)]
        done(comm.all_gather(pieces, of(rank), async_op=async_op))
        assert torch.equal(torch.stack(pieces), torch.stack(all_ranks))
        for gather in (comm.all_gather_into_tensor, comm.allgather_fn):
            whole = torch.empty(6 * world)
            done(gather(whole, of(rank), async_op=async_op))
            assert torch.equal(whole, torch.cat(all_ranks))
        wholes = [torch.empty(6 * world), torch.empty(2 * world)]
        done(comm.all_gather_coalesced(wholes, [of(rank), of(rank, 2)], async_op=async_op))
        assert torch.equal(wholes[1], torch.cat([of(r, 2) for r in range(world)]))
        for scatter in (comm.reduce_scatter_tensor, comm.reduce_scatter_fn):
            shard = torch.empty(2)
            done(scatter(shard, of(rank), comm.ReduceOp.AVG, async_op=async_op))
            torch.testing.assert_close(shard, total[2 * rank : 2 * rank + 2] / world)
        done(comm.reduce_scatter(shard, list(of(rank).split(2)), async_op=async_op))
        torch.testing.assert_close(shard, total[2 * rank : 2 * rank + 2])

        out = torch.empty(6)
        done(comm.all_to_all_single(out, of(rank), async_op=async_op))
        assert torch.equal(out, torch.cat([of(r)[2 * rank : 2 * rank + 2] for r in range(world)]))
        outs = [torch.empty(2) for _ in range(world)]
        done(comm.all_to_all(outs, list(of(rank).split(2)), async_op=async_op))
        assert torch.equal(torch.cat(outs), out)
        x = of(rank)
        done(comm.reduce(x, dst=2, async_op=async_op))
        if rank == 2:
            torch.testing.assert_close(x, total)
        pieces = [torch.empty(6) for _ in range(world)] if rank == 1 else None
        done(comm.gather(of(rank), pieces, dst=1, async_op=async_op))
        assert pieces is None or torch.equal(torch.stack(pieces), torch.stack(all_ranks))
        x = torch.empty(6)
        done(comm.scatter(x, all_ranks if rank == 0 else None, src=0, async_op=async_op))
        assert torch.equal(x, of(rank))
        done(comm.barrier(async_op=async_op))


@distributed(3)
def test_messages_objects_and_groups() -> None:
    """Between two ranks, pickled, and in groups whose ranks count as the world's."""
    rank, world = comm.get_rank(), comm.get_world_size()
    after, before = (rank + 1) % world, (rank - 1) % world
    x = torch.empty(6)
    handles = [comm.isend(of(rank), after), comm.irecv(x, before)]
    for handle in handles:
        handle.wait()
    assert torch.equal(x, of(before))
    for work in comm.batch_isend_irecv(
        [comm.P2POp(comm.isend, of(rank, 3), before), comm.P2POp(comm.irecv, y := torch.empty(3), after)]
    ):
        work.wait()
    assert torch.equal(y, of(after, 3))
    if rank == 0:
        comm.send(of(7), dst=1, tag=3)
    elif rank == 1:
        assert comm.recv(x, src=0, tag=3) == 0 and torch.equal(x, of(7))
    objects = [None] * world
    comm.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(world)]
    box = [f"from {rank}"]
    comm.broadcast_object_list(box, src=2)
    assert box == ["from 2"]

    pair = comm.new_group([0, 2])
    if rank != 1:
        x = of(rank)
        comm.all_reduce(x, group=pair)
        assert torch.equal(x, of(0) + of(2))
        comm.broadcast(x.copy_(of(rank)), src=2, group=pair)
        assert torch.equal(x, of(2))
        assert (comm.get_rank(pair), comm.get_world_size(pair)) == (rank // 2, 2)
    assert comm.get_all_ranks_from_group(pair) == [0, 2]
    assert (comm.get_global_rank(pair, 1), comm.get_global_rank(None, 1)) == (2, 1)
    assert comm.get_all_ranks_from_group(comm.get_world_group()) == [0, 1, 2]
    comm.monitored_barrier(timeout=timedelta(seconds=30))


@distributed(2)
def test_the_mesh_and_the_log() -> None:
    """A grid of ranks; calls are counted with their sizes, by name, and one by one where asked."""
    mesh = comm.initialize_mesh_device((1, 2), ("data_parallel", "sequence_parallel"))
    assert dist.get_world_size(mesh.get_group("sequence_parallel")) == 2
    comm.reset_log()
    comm.configure(enabled=True, prof_all=True)
    try:
        comm.all_reduce(of(0))
        comm.all_gather_into_tensor(torch.empty(12), of(0))
        comm.all_gather([torch.empty(6), torch.empty(6)], of(0), log_name="mine")
        comm.isend(of(0), 1).wait() if comm.get_rank() == 0 else comm.irecv(torch.empty(6), 0).wait()
        found = comm.log_summary(return_dict=True)
        assert found["all_reduce"] == {24: [1, *found["all_reduce"][24][1:]]}
        assert set(found["all_gather_into_tensor"]) == set(found["mine"]) == {48}
        assert ("isend" in found) == (comm.get_rank() == 0)
        comm.reset_log()
        comm.configure(prof_all=False, prof_ops=["broadcast"])
        comm.all_reduce(of(0))
        comm.all_reduce(of(0), prof=True)
        comm.broadcast(of(0), 0)
        found = comm.log_summary(return_dict=True)
        assert {op: [calls for calls, *_ in sizes.values()] for op, sizes in found.items()} == {
            "all_reduce": [1],
            "broadcast": [1],
        }
    finally:
        comm.configure(enabled=False, prof_all=True, prof_ops=[])
        comm.reset_log()


def test_before_init_distributed() -> None:
    """Ranks that have not met cannot communicate, and are told how to."""
    for call in (comm.all_reduce, comm.barrier, comm.broadcast):
        with pytest.raises(DistributedError, match="before init_distributed"):
            call(*[torch.ones(1)][: call is not comm.barrier])
    assert (comm.get_rank(), comm.get_world_size(), comm.is_available()) == (0, 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@distributed(world_size=[2, 3])
def test_small_sums_go_through_memory_that_is_shared_already(dtype, world_size):
    group = comm.Group()
    group.all_gather_into(torch.empty(4 * world_size), torch.ones(4))  # connects
    for number in range(3):
        x = (torch.arange(5) + number).to(dtype) * (group.rank + 1)
        with mock.patch("torch.distributed.all_reduce", side_effect=AssertionError("by gloo")):
            group.all_reduce(x)
        assert torch.equal(x, (torch.arange(5) + number).to(dtype) * sum(range(1, world_size + 1)))
