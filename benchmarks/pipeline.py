"""A batch through a pipeline of two stages, beside the real DeepSpeed's and torch.distributed.pipelining's.

    python benchmarks/pipeline.py [--peer-python ENV/bin/python] [--micro-batches 8] [--rounds 3] [--steps 8]

The 33.6 M-parameter GPT of examples/gpt, from the same weights, on the same batches, cut at the same layer: 2 ranks,
gloo, CPU, one thread a rank, torch's fused AdamW, no clipping, 1F1B. The engines train with ZeRO 1 on one replica.
"alone" is what the second stage has to compute, half the blocks and the head, on both ranks at once with nothing to
wait for: with m micro-batches a pipeline of 2 can at best take (m + 1) / m of it.

Contenders take turns: in every round each of them trains in two fresh processes, in an order that moves on by one. The
first steps of a turn are not counted. A figure is the median over the rounds of a turn's median step, from barrier to
barrier; a ratio the median over the rounds of the ratio in a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import machine, print_json, print_table
from torch import nn
from training import MICRO_BATCH, Batch, GPTConfig, batch, engine_config, fresh_model, fused_adamw

RANKS, WARM_UP_STEPS = 2, 3
OURS = "deepspeedlite"
Step = Callable[[list[Batch]], float | None]


class Embed(nn.Module):
    """Tokens and positions to hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tokens, self.positions = model.tokens, model.positions

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, D)."""
        return self.tokens(tokens_bt) + self.positions(torch.arange(tokens_bt.shape[1]))


def layers() -> list[nn.Module]:
    """The GPT as a list."""
    model = fresh_model(GPTConfig.benchmark())
    return [Embed(model), *model.blocks, nn.Sequential(model.norm, model.head)]


def cross_entropy(logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """The mean over tokens."""
    return nn.functional.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten())


def engine(deepspeed: Any, micro_batches: int) -> Step:
    """Either engine, by the names that both have."""
    net = deepspeed.pipe.PipelineModule(layers=layers(), num_stages=RANKS, loss_fn=cross_entropy)
    config = engine_config({"stage": 1}, accumulation=micro_batches)
    made = deepspeed.initialize(model=net, optimizer=fused_adamw(net.parameters()), config=config)[0]

    def step(data: list[Batch]) -> float | None:
        loss = made.train_batch(iter(data)).item()
        return loss if dist.get_rank() == RANKS - 1 else None

    return step


def ours(micro_batches: int) -> Step:
    """Ours."""
    import deepspeedlite
    from deepspeedlite import pipe

    deepspeedlite.init_distributed("gloo", verbose=False)
    assert pipe
    return engine(deepspeedlite, micro_batches)


def theirs(micro_batches: int) -> Step:
    """The real DeepSpeed."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    return engine(deepspeed, micro_batches)


def torchs(micro_batches: int) -> Step:
    """The schedule of torch, without an engine around it."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    dist.init_process_group("gloo")
    net, middle = layers(), 5  # where the engines cut by parameters
    mine = nn.Sequential(*(net[middle:] if dist.get_rank() else net[:middle]))
    stage = PipelineStage(mine, dist.get_rank(), RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micro_batches, loss_fn=cross_entropy)
    optimizer = fused_adamw(mine.parameters())

    def step(data: list[Batch]) -> float | None:
        losses: list[torch.Tensor] = []
        if dist.get_rank() == 0:
            schedule.step(torch.cat([tokens for tokens, _ in data]))
        else:
            schedule.step(target=torch.cat([targets for _, targets in data]), losses=losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().item() if losses else None

    return step


def alone(micro_batches: int) -> Step:
    """On each rank what the second stage computes, after an embedding, which costs next to nothing."""
    dist.init_process_group("gloo")
    embed, *blocks, head = layers()
    mine = nn.Sequential(embed, *blocks[4:], head)
    optimizer = fused_adamw(mine.parameters())

    def step(data: list[Batch]) -> float | None:
        for tokens, targets in data:
            (cross_entropy(mine(tokens), targets) / len(data)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return None

    return step


MAKERS = {OURS: ours, "DeepSpeed": theirs, "torch.distributed.pipelining": torchs, "alone": alone}


def work(kind: str, micro_batches: int, steps: int) -> None:
    """One rank of a contender: prints its figures as JSON."""
    torch.set_num_threads(1)
    step = MAKERS[kind](micro_batches)
    sizes = GPTConfig.benchmark()
    times_ms, losses = [], []
    for number in range(WARM_UP_STEPS + steps):
        data = [batch(sizes, 0, number * micro_batches + index) for index in range(micro_batches)]
        dist.barrier()
        start_s = time.perf_counter()
        losses.append(step(data))
        dist.barrier()
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("FOUND" + json.dumps({"ms": statistics.median(times_ms[WARM_UP_STEPS:]), "peak": peak_mib, "losses": losses}))
    dist.destroy_process_group()


def turn(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both ranks of a contender, from start to end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = args.peer_python if kind == "DeepSpeed" else sys.executable
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"DS_ACCELERATOR": "cpu", "DSL_LOG_LEVEL": "warning", "PYTHONWARNINGS": "ignore"}
    common["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [
        python,
        __file__,
        "--worker",
        kind,
        "--micro-batches",
        str(args.micro_batches),
        "--steps",
        str(args.steps),
    ]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    told = [process.communicate(timeout=600) for process in started]
    for process, (_, errors) in zip(started, told):
        if process.returncode:
            raise SystemExit(f"{kind} failed:\n{errors[-3000:]}")
    found = [json.loads(out.partition("FOUND")[2].splitlines()[0]) for out, _ in told]
    return {"ms": found[0]["ms"], "peak": max(one["peak"] for one in found), "losses": found[1]["losses"]}


def main() -> None:
    """Measure, or be one rank of what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", choices=list(MAKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.micro_batches, args.steps)
        return
    kinds = [kind for kind in MAKERS if kind != "DeepSpeed" or args.peer_python]
    turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        first = number % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            turns[kind].append(turn(kind, args))
    report(args, turns)


def report(args: argparse.Namespace, turns: dict[str, list[dict[str, Any]]]) -> None:
    """JSON lines and the table."""
    rows = []
    mine = turns[OURS]
    for kind, found in turns.items():
        ms, peak = (statistics.median(one[key] for one in found) for key in ("ms", "peak"))
        ratio = statistics.median(own["ms"] / one["ms"] for own, one in zip(mine, found))
        losses, own_losses = found[0]["losses"], mine[0]["losses"]
        apart = max(abs(a / b - 1) for a, b in zip(own_losses, losses)) if losses[0] is not None else None
        print_json(
            benchmark="pipeline", what=kind, ms=ms, peak_mib=peak, our_time_to_its=ratio, apart=apart, **machine()
        )
        shown = "" if apart is None else f"{apart:.1e}"
        rows.append([kind, f"{ms:.1f}", f"{ratio:.2f}", f"{peak:.0f}", shown])
    title = (
        f"A batch of {args.micro_batches} micro-batches of {MICRO_BATCH} x 64 tokens through 2 pipeline stages, "
        f"33.6 M-parameter GPT, fp32, 2 ranks with one thread each, gloo, {args.rounds} rounds of {args.steps} steps"
    )
    print_table(title, ["contender", "median ms", "our time to its", "peak MiB of a rank", "losses off ours"], rows)


if __name__ == "__main__":
    main()
