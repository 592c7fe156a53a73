"""A step of Adam, LAMB and Lion on a GPU: our ops beside torch's fused AdamW and the bandwidth of a copy.

    python benchmarks/fused_optim.py [--numel 1000000000]

Contenders take turns on one GPU; a turn is a few steps between two CUDA events. Bandwidth counts the bytes that a step
must move at least: 28 per element for Adam on fp32 (28 too with bf16 gradients and a bf16 copy), 40 for LAMB in its two
phases, 20 for Lion, 8 for the copy. Needs a GPU and ops compiled for it; says so and exits with status 2 otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from machine import print_json, print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepspeedlite.ops import load
from deepspeedlite.ops.adam import FusedAdam
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import FusedLion
from deepspeedlite.ops.one_pass import OnePassUpdate
from deepspeedlite.runtime.errors import OpError

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
TENSOR_NUMEL = 1 << 24  # of most tensors; the last is what is left
STEPS_IN_A_TURN = 5


class Contender(NamedTuple):
    """What one step calls, and the bytes that it moves per element."""

    step: Callable[[], object]
    element_bytes: int


def contenders(numel: int, device: str = "cuda") -> dict[str, Contender]:
    """All of them, on the same parameters and gradients, each with moments of its own."""
    sizes = [TENSOR_NUMEL] * (numel // TENSOR_NUMEL) + [numel % TENSOR_NUMEL]
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in sizes if size]
    for param in params:
        param.grad = torch.randn_like(param)
    halves = [param.grad.bfloat16() for param in params if param.grad is not None]
    copies = [torch.empty_like(half) for half in halves]
    source, target = (torch.empty(numel, device=device) for _ in range(2))
    mixed = FusedAdam(params, **OPTIONS)

    def step_mixed() -> None:
        mixed.hand_over([OnePassUpdate(*each) for each in zip(params, halves, copies)], 0.5)
        mixed.step()

    return {
        "copy": Contender(lambda: target.copy_(source), 8),
        "torch fused AdamW": Contender(torch.optim.AdamW(params, fused=True, **OPTIONS).step, 28),
        "FusedAdam": Contender(FusedAdam(params, **OPTIONS).step, 28),
        "FusedAdam, bf16 gradients and copy": Contender(step_mixed, 28),
        "FusedLamb": Contender(FusedLamb(params, **OPTIONS).step, 40),
        "FusedLion": Contender(FusedLion(params, **OPTIONS).step, 20),
    }


def turn_ms(contender: Contender) -> float:
    """Milliseconds per step, on the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS_IN_A_TURN):
        contender.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS_IN_A_TURN


def require_gpu() -> None:
    """End with status 2 where there is nothing to measure."""
    if not torch.cuda.is_available():
        print("fused_optim.py measures kernels on a GPU, and torch finds none here", file=sys.stderr)
        raise SystemExit(2)
    try:
        for op in ("fused_adam", "fused_lamb_moments", "fused_lion"):
            load(op, "cuda")
    except OpError as error:
        print(f"fused_optim.py measures our kernels, and they are not here: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def main() -> None:
    """Measure all, print JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1_000_000_000, help="parameters (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default %(default)s)")
    args = parser.parse_args()
    require_gpu()

    found = contenders(args.numel)
    for contender in found.values():
        turn_ms(contender)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, contender in found.items():
            times[name].append(turn_ms(contender))

    median_ms = {name: statistics.median(each) for name, each in times.items()}
    # bytes per nanosecond are GB/s
    gb_per_s = {name: args.numel * found[name].element_bytes / (median_ms[name] * 1e6) for name in found}
    rows = [
        (name, f"{median_ms[name]:.2f}", f"{min(times[name]):.2f}", f"{gb_per_s[name]:.0f}", f"{to_copy:.2f}")
        for name, to_copy in ((name, gb_per_s[name] / gb_per_s["copy"]) for name in found)
    ]
    title = f"A step on {args.numel:,} parameters, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    print_table(title, ("contender", "median ms", "min", "GB/s", "to copy"), rows)
    limits = [(name, "copy", 0.85) for name in ("FusedAdam", "FusedAdam, bf16 gradients and copy", "FusedLamb")]
    for mine, peer, at_least in [*limits, ("FusedAdam", "torch fused AdamW", 1.0)]:
        ratio = gb_per_s[mine] / gb_per_s[peer]
        verdict = "met" if ratio >= at_least else "MISSED"
        found_ratio = {"mine": mine, "peer": peer, "at_least": at_least, "ratio": round(ratio, 4), "verdict": verdict}
        print_json(benchmark="fused_optim", **found_ratio)


if __name__ == "__main__":
    main()
