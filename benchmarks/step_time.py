"""Time of a training step: deepspeedlite at stage 0 beside a hand-written DistributedDataParallel loop.

    python benchmarks/step_time.py [--rounds 7] [--steps 5] [--layers 8] [--ranks 2]

Both train the same 33.6 M-parameter GPT (examples/gpt: width 512, 8 layers, vocabulary 8192, context 64) in fp32 with
AdamW, micro-batch 2 per rank, over gloo on the CPU with one thread a rank. All contenders live in the same worker
processes and take turns, a round of `--steps` steps each, in an order that changes from round to round; they see
the same batches, so their losses can be compared step by step. DDP gets its best settings: fused AdamW, and
gradient_as_bucket_view both on and off, of which the faster one is the peer. The ratio is the median over the
rounds of (our step time / the peer's in that round).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import machine, print_json, print_table
from torch.nn.parallel import DistributedDataParallel
from training import GPT, Batch, GPTConfig, Step, batch, ddp_step, engine_config, engine_step, fresh_model, our_engine

OURS, DDP, DDP_VIEWS = "deepspeedlite stage 0", "DDP + fused AdamW", "DDP (gradient_as_bucket_view) + fused AdamW"


def main() -> None:
    """Start the ranks, wait for them; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (a first one is not counted)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=GPTConfig.benchmark().layers)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DSL_LOG_LEVEL", "warning")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(args, str(Path(folder) / "store")), nprocs=args.ranks, join=True)


def worker(rank: int, args: argparse.Namespace, store_path: str) -> None:
    """One rank: build every contender, let them take turns, report."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, args.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    sizes = replace(GPTConfig.benchmark(), layers=args.layers)
    makers = {
        DDP: lambda: ddp_step(DistributedDataParallel(fresh_model(sizes))),
        DDP_VIEWS: lambda: ddp_step(DistributedDataParallel(fresh_model(sizes), gradient_as_bucket_view=True)),
        OURS: lambda: engine_step(our_engine(fresh_model(sizes), engine_config())),
    }
    contenders = {name: make() for name, make in makers.items()}

    times_ms: dict[str, list[float]] = {name: [] for name in contenders}  # per counted round: median of its steps
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_number in range(args.rounds + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            found_ms = [
                timed_step(contenders[name], batch(sizes, rank, round_number * args.steps + i), losses[name])
                for i in range(args.steps)
            ]
            if round_number:
                times_ms[name].append(statistics.median(found_ms))
    apart = torch.tensor([max(abs(a - b) for a, b in zip(losses[OURS], losses[name])) for name in (DDP, DDP_VIEWS)])
    dist.all_reduce(apart, op=dist.ReduceOp.MAX)
    if rank == 0:
        report(args, GPT(sizes).numel(), times_ms, float(apart.max()), losses[OURS])
    dist.barrier()
    dist.destroy_process_group()


def timed_step(step: Step, data: Batch, losses: list[float]) -> float:
    """Milliseconds of one step, from where all ranks are ready; the loss is put on the list."""
    dist.barrier()
    start_s = time.perf_counter()
    losses += step([data])
    return (time.perf_counter() - start_s) * 1e3


def report(args, numel: int, times_ms: dict[str, list[float]], apart: float, losses: list[float]) -> None:
    """JSON lines and the table."""
    medians_ms = {name: statistics.median(found) for name, found in times_ms.items()}
    peer = min((DDP, DDP_VIEWS), key=medians_ms.__getitem__)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times_ms[OURS], times_ms[peer]))
    about = {"torch": torch.__version__, "ranks": args.ranks, "rounds": args.rounds, "steps": args.steps, **machine()}
    rows = []
    for name, found_ms in times_ms.items():
        figures = {"median_ms": round(medians_ms[name], 2), "min_ms": round(min(found_ms), 2)}
        print_json(benchmark="step_time", what=name, **figures, max_ms=round(max(found_ms), 2), numel=numel, **about)
        of_peer = f"{medians_ms[name] / medians_ms[peer]:.3f}"
        rows.append((name, *(f"{ms:.1f}" for ms in (medians_ms[name], min(found_ms), max(found_ms))), of_peer))
    print_json(
        benchmark="step_time", what="ratio", peer=peer, ratio=round(ratio, 4), max_loss_difference=apart, **about
    )
    title = f"Training step, {numel / 1e6:.1f} M-parameter GPT, fp32, {args.ranks} ranks, torch {torch.__version__}"
    print_table(title, ("what", "median ms", "min", "max", "to the faster DDP"), rows)
    print(f"paired ratio to {peer}: {ratio:.3f}; largest difference of a loss on any rank: {apart:.2e}")
    print(f"(loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last, {len(losses)} steps each)", flush=True)


if __name__ == "__main__":
    main()
