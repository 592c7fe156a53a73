"""Training time and peak memory of DeepSpeed's clients on deepspeedlite and on the real DeepSpeed, stage by stage.

    .venv-clients/bin/python benchmarks/clients.py --peer-python ENV/bin/python [--only trainer,trl] [--stages 2,3]
                                                   [--bf16] [--rounds 3] [--steps 12]

The clients are those of tests/clients/, unchanged, with a larger model: transformers' Trainer, a loop with Accelerate,
Lightning's Trainer, Fabric, a LoRA adapter of PEFT and TRL's supervised fine-tuning. Run it in the environment that
`make test-clients` makes. Two CPU ranks with one thread each, gloo, AdamW of torch, new processes for each training;
ours and DeepSpeed's take turns, and the order changes from round to round. A first training of both is not counted,
since DeepSpeed compiles an op in it. *training* lasts from the set-up to the end of the last step, *step* is the median
step without the first two. Ratios are the median over the rounds of the ratios in a round. Peak is the larger rank's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import machine, print_json, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "clients"))
from drive import run

STAGES = {
    **dict.fromkeys(("trainer", "accelerate", "lightning", "fabric"), (0, 1, 2, 3)),
    "peft": (3,),
    "trl": (2, 3),
}
SIZE = {"width": 384, "layers": 6, "heads": 6, "vocabulary": 4096, "length": 64, "batch": 4}
MIB = 2**20
TOLERANCE = {False: 2e-5, True: 5e-3}  # of losses, fp32 and bf16
MEASURED = ("train_s", "step_ms", "peak_rss_bytes")


def main() -> None:
    """Measure, then print JSON lines and the table; exit status 1 if losses differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--only", help="clients, with commas between")
    parser.add_argument("--stages", help="stages, with commas between")
    parser.add_argument("--bf16", action="store_true", help="bf16 with fp32 masters")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each contender")
    parser.add_argument("--steps", type=int, default=10, help="steps of a training")
    args = parser.parse_args()
    os.environ["DSL_PEER_PYTHON"] = args.peer_python
    clients = args.only.split(",") if args.only else list(STAGES)
    wanted = [int(stage) for stage in args.stages.split(",")] if args.stages else [0, 1, 2, 3]
    rows, apart = [], False
    for engine in ("lite", "peer"):
        run(clients[0], engine, stage=STAGES[clients[0]][0], steps=2, size=SIZE)
    for client in clients:
        for stage in (each for each in STAGES[client] if each in wanted):
            found = race(client, stage, args)
            values = compare(found)
            apart |= values["losses_apart"] > TOLERANCE[args.bf16]
            kind = {"client": client, "stage": stage, "bf16": args.bf16, "rounds": args.rounds, "steps": args.steps}
            print_json(benchmark="clients", **kind, **values, **machine())
            rows.append(row(client, stage, values))
    head = ("client", "stage", "training s", "DeepSpeed's", "ratio", "step ms", "DeepSpeed's", "ratio")
    head = (*head, "peak MiB", "DeepSpeed's", "ratio", "losses apart")
    dtype = "bf16" if args.bf16 else "fp32"
    print_table(f"{args.steps} steps, {dtype}, 2 ranks with one thread each, {args.rounds} rounds", head, rows)
    sys.exit(1 if apart else 0)


def race(client: str, stage: int, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each contender reported in each round."""
    found: dict[str, list[dict[str, Any]]] = {"lite": [], "peer": []}
    for number in range(args.rounds):
        for engine in ("peer", "lite") if number % 2 else ("lite", "peer"):
            found[engine].append(run(client, engine, stage=stage, steps=args.steps, bf16=args.bf16, size=SIZE))
    return found


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both, ratios, and the largest relative difference of a loss."""
    values: dict[str, Any] = {}
    for what in MEASURED:
        for engine, reports in found.items():
            values[f"{engine}_{what}"] = round(statistics.median(report[what] for report in reports), 4)
        pairs = zip(found["lite"], found["peer"])
        values[f"{what}_ratio"] = round(statistics.median(ours[what] / theirs[what] for ours, theirs in pairs), 4)
    both = zip(found["lite"][0]["losses"], found["peer"][0]["losses"], strict=True)
    values["losses_apart"] = float(f"{max(abs(ours - theirs) / abs(theirs) for ours, theirs in both):.2g}")
    return values


def row(client: str, stage: int, values: dict[str, Any]) -> tuple[Any, ...]:
    """The same for people."""
    cells: list[Any] = [client, stage]
    for what, scale, digits in (("train_s", 1, 2), ("step_ms", 1, 1), ("peak_rss_bytes", MIB, 0)):
        cells += [f"{values[f'{engine}_{what}'] / scale:.{digits}f}" for engine in ("lite", "peer")]
        cells.append(f"{values[f'{what}_ratio']:.2f}")
    return (*cells, f"{values['losses_apart']:.1e}")


if __name__ == "__main__":
    main()
