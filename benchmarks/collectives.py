"""Time of the collectives of a sharded step between CPU ranks of one host: shared memory, our TCP, gloo's own.

    python benchmarks/collectives.py [--ranks 2] [--megabytes 136] [--rounds 9]

A buffer of that size is cut into 12 equal units, as a model is. At most three units are under way at a time, except
in the all-reduce, which starts all of them, as DDP does. The ways take turns on the same buffers; a round lasts from
one barrier to the next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import print_json, print_table

UNITS, UNDER_WAY = 12, 3
ALL_REDUCE = "all-reduce"
SHARED, TCP, GLOO = "shared memory", "TCP, piece by piece", "gloo's own"
Start = Callable[[torch.Tensor, torch.Tensor], Any]  # (whole unit, this rank's shard of it) -> work


def main() -> None:
    """Start the ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=136.0, help="of the whole buffer, fp32")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each way (two more are not counted)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(args, str(Path(folder) / "store")), nprocs=args.ranks, join=True)


def worker(rank: int, args: argparse.Namespace, store_path: str) -> None:
    """One rank: every collective in every way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, args.ranks), rank=rank, world_size=args.ranks)
    numel = int(args.megabytes * 1e6 / 4 / UNITS / args.ranks) * args.ranks
    units = [torch.randn(numel) for _ in range(UNITS)]
    shards = [unit.view(args.ranks, -1)[rank].clone() for unit in units]
    found = {}
    for what, ways in collectives().items():
        under_way = UNITS if what == ALL_REDUCE else UNDER_WAY
        found[what] = race(ways, units, shards, args.rounds, under_way)
    if rank == 0:
        report(args, found)
    dist.destroy_process_group()


def collectives() -> dict[str, dict[str, Start]]:
    """How each way starts each collective on one unit."""
    from deepspeedlite.comm import Group
    from deepspeedlite.transports.shared_memory import SWITCH

    groups = {SHARED: Group(), TCP: Group(dist.new_group())}
    for name, group in groups.items():
        os.environ[SWITCH] = "1" if name == SHARED else "0"
        link = group.transport.link
        assert (link is not None) == (name == SHARED), f"{name}: this machine's ranks cannot be made to use it"
    return {
        "reduce-scatter": {
            **{
                n: lambda unit, shard, g=g: g.reduce_scatter_into(shard, unit, async_op=True) for n, g in groups.items()
            },
            GLOO: lambda unit, shard: dist.reduce_scatter_tensor(shard, unit, async_op=True),
        },
        "all-gather": {
            **{n: lambda unit, shard, g=g: g.all_gather_into(unit, shard, async_op=True) for n, g in groups.items()},
            GLOO: lambda unit, shard: dist.all_gather_into_tensor(unit, shard, async_op=True),
        },
        ALL_REDUCE: {
            SHARED: lambda unit, shard: groups[SHARED].all_reduce(unit, async_op=True),
            GLOO: lambda unit, shard: dist.all_reduce(unit, async_op=True),
        },
    }


def race(
    ways: dict[str, Start], units: list[torch.Tensor], shards: list[torch.Tensor], rounds: int, most: int
) -> dict[str, list[float]]:
    """Milliseconds of each counted round of each way, with at most so many units under way."""
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, start in ways.items():
            dist.barrier()
            began_s = time.perf_counter()
            under_way: deque[Any] = deque()
            for unit, shard in zip(units, shards):
                under_way.append(start(unit, shard))
                if len(under_way) == most:
                    under_way.popleft().wait()
            for work in under_way:
                work.wait()
            dist.barrier()
            if number >= 2:
                times_ms[name].append((time.perf_counter() - began_s) * 1e3)
            for unit in units:
                unit.mul_(0.5)  # sums of sums would overflow
    return times_ms


def report(args: argparse.Namespace, found: dict[str, dict[str, list[float]]]) -> None:
    """One JSON line per figure and the table."""
    rows = []
    for what, ways in found.items():
        for name, times_ms in ways.items():
            median_ms = statistics.median(times_ms)
            ratio = statistics.median(a / b for a, b in zip(times_ms, ways[GLOO]))
            print_json(
                benchmark="collectives", what=what, how=name, median_ms=round(median_ms, 1), to_gloo=round(ratio, 3)
            )
            rows.append((what, name, f"{median_ms:.1f}", f"{min(times_ms):.1f}", f"{ratio:.2f}"))
    print_table(
        f"{args.megabytes:g} MB in {UNITS} units, fp32, {args.ranks} ranks with one thread each",
        ("collective", "how", "median ms", "min", "to gloo's own"),
        rows,
    )


if __name__ == "__main__":
    main()
