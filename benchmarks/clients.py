"""Losses, training time and peak memory of DeepSpeed's clients on deepspeedlite and on the real DeepSpeed.

    .venv-clients/bin/python benchmarks/clients.py --peer-python ENV/bin/python
        [--llamafactory-python ENV/bin/python] [--only trainer,dpo] [--stages 2,3] [--dtypes fp32] [--every]
        [--rounds 1] [--steps 5] [--write FILE]

The clients are those of tests/clients/, with a larger model: transformers' Trainer, a loop with Accelerate, Lightning's
Trainer, Fabric, a LoRA adapter of PEFT, TRL's supervised fine-tuning, DPO and GRPO, and LLaMA-Factory's supervised
fine-tuning of all weights and of a LoRA and DPO of all weights, by the configurations that it ships. transformers'
models are loaded by `from_pretrained` where the client shards them, by configurations in which "auto" stands wherever
it may. Run it in the environment that `make test-clients` makes; LLaMA-Factory has its own (`make test-llamafactory`)
and is left out where none is named.

Stages 0 to 3 in fp32 and bf16 are 8 trainings of each client, twice. `--every` runs them all. Without it each client
has two, chosen in pairs (`CELLS`): each client with two stages, stage and dtype in every combination, and stage 0 with
most clients that train the whole model. LLaMA-Factory ships configurations for stages 2 and 3 alone.

Two CPU ranks with one thread each, gloo, new processes for each training; ours and DeepSpeed's take turns, and who is
first changes from training to training. A first training of each engine is not counted: DeepSpeed compiles an op in it.
*losses* are the largest relative difference of the first four to the client's own run without any DeepSpeed, ours and
DeepSpeed's. *training* lasts from the set-up to the end of the last step, *step* is the median step without the first.
Ratios are the median over the rounds of the ratios in a round. *memory* is the peak of both ranks together, looked at
ten times a second, in which memory that they share counts once (PSS).
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from machine import machine, print_json, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "clients"))
from drive import run


class Client(NamedTuple):
    """How a client is run."""

    script: str
    job: dict[str, Any]
    stages: tuple[int, ...] = (0, 1, 2, 3)


class Cell(NamedTuple):
    """One training that is compared."""

    client: str
    stage: int
    dtype: str


FILLED = {"auto": True}
CLIENTS = {
    "Trainer": Client("trainer", FILLED),
    "Accelerate": Client("accelerate", FILLED),
    "Lightning": Client("lightning", {}),
    "Fabric": Client("fabric", {}),
    "PEFT LoRA": Client("peft", FILLED),
    "TRL SFT": Client("trl", {**FILLED, "task": "sft"}),
    "TRL DPO": Client("trl", {**FILLED, "task": "dpo"}),
    "TRL GRPO": Client("trl", {**FILLED, "task": "grpo"}),
    "LLaMA-Factory SFT": Client("llamafactory", {"task": "sft", "tuning": "full"}, (2, 3)),
    "LLaMA-Factory SFT LoRA": Client("llamafactory", {"task": "sft", "tuning": "lora"}, (2, 3)),
    "LLaMA-Factory DPO": Client("llamafactory", {"task": "dpo", "tuning": "full"}, (2, 3)),
}
CHOSEN = {
    "Trainer": ((0, "fp32"), (3, "bf16")),
    "Accelerate": ((0, "fp32"), (2, "bf16")),
    "Lightning": ((1, "bf16"), (3, "fp32")),
    "Fabric": ((0, "fp32"), (2, "bf16")),
    "PEFT LoRA": ((1, "fp32"), (3, "bf16")),
    "TRL SFT": ((0, "bf16"), (3, "fp32")),
    "TRL DPO": ((1, "bf16"), (2, "fp32")),
    "TRL GRPO": ((0, "fp32"), (3, "bf16")),
    "LLaMA-Factory SFT": ((2, "fp32"), (3, "bf16")),
    "LLaMA-Factory SFT LoRA": ((2, "bf16"), (3, "fp32")),
    "LLaMA-Factory DPO": ((2, "fp32"), (3, "bf16")),
}
DTYPES = ("fp32", "bf16")
SIZE = {"width": 384, "layers": 6, "heads": 6, "vocabulary": 4096, "length": 64, "batch": 4}
MIB = 2**20
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3}
COMPARED = 4  # losses
MEASURED = ("train_s", "step_ms", "peak_pss_bytes")
HEAD = ("client", "stage", "dtype", "losses", "DeepSpeed's", "training s", "DeepSpeed's", "ratio")
HEAD = (*HEAD, "step ms", "DeepSpeed's", "ratio", "memory MiB", "DeepSpeed's", "ratio")


def main() -> None:
    """Measure, then print JSON lines and the table; exit status 1 if losses differ or a training fails."""
    args = arguments()
    os.environ["DSL_PEER_PYTHON"] = args.peer_python
    rows, apart = [], []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args, folder)
        cells = [cell for cell in chosen(args.every) if is_wanted(cell, args)]
        runs.warm_up(cells)
        for number, cell in enumerate(cells):
            try:
                values = runs.compare(cell, number)
            except AssertionError as error:  # of a rank that failed: the other cells are still worth having
                print(error, file=sys.stderr)
                apart.append(cell)
                continue
            apart += [cell] if values["lite_losses"] > TOLERANCE[cell.dtype] else []
            print_json(
                benchmark="clients", **cell._asdict(), rounds=args.rounds, steps=args.steps, **values, **machine()
            )
            rows.append(row(cell, values))
    print_table(f"{args.steps} steps, 2 ranks with one thread each, {args.rounds} round(s)", HEAD, rows)
    if args.write:
        args.write.write_text(summary(rows))
    for cell in apart:
        print(f"failed, or losses part, at {cell.client}, stage {cell.stage}, {cell.dtype}", file=sys.stderr)
    sys.exit(1 if apart else 0)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--llamafactory-python", help="the Python of an environment that has LLaMA-Factory")
    parser.add_argument("--only", help="clients, with commas between: a part of the name does, whatever its case")
    parser.add_argument("--stages", default="0,1,2,3", help="stages, with commas between")
    parser.add_argument("--dtypes", default="fp32,bf16", help="dtypes, with commas between")
    parser.add_argument("--every", action="store_true", help="every stage in every dtype, not those that are chosen")
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each contender")
    parser.add_argument("--steps", type=int, default=5, help="steps of a training, at least 4")
    parser.add_argument("--write", type=Path, help="a file for the ratios alone, as docs/performance.md has them")
    return parser.parse_args()


def chosen(every: bool) -> list[Cell]:
    """The cells, those of a client together."""
    if every:
        return [Cell(name, stage, dtype) for name in CLIENTS for dtype in DTYPES for stage in CLIENTS[name].stages]
    return [Cell(name, *pair) for name, pairs in CHOSEN.items() for pair in pairs]


def is_wanted(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether the command line leaves it in."""
    names = args.only.lower().split(",") if args.only else [""]
    listed = str(cell.stage) in args.stages.split(",") and cell.dtype in args.dtypes.split(",")
    runs = args.llamafactory_python or CLIENTS[cell.client].script != "llamafactory"
    return bool(runs) and listed and any(name in cell.client.lower() for name in names)


class Runs:
    """Trainings, and what a client does by itself, which is asked for once."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self._args = args
        self._saved = str(Path(folder, "pretrained"))
        self.alone = functools.cache(self._alone)

    def train(self, cell: Cell, engine: str, **more: Any) -> dict[str, Any]:
        """One."""
        client = CLIENTS[cell.client]
        python = self._args.llamafactory_python if client.script == "llamafactory" else sys.executable
        job = {"stage": cell.stage, "bf16": cell.dtype == "bf16", "steps": self._args.steps, **client.job, **more}
        return run(client.script, engine, python=python, samples=True, pretrained=self._saved, size=SIZE, **job)

    def warm_up(self, cells: list[Cell]) -> None:
        """One of each engine and environment, which makes the model, too."""
        first = {CLIENTS[cell.client].script == "llamafactory": cell for cell in reversed(cells)}
        for cell in first.values():
            for engine in ("lite", "peer"):
                self.train(cell, engine, steps=2)

    def _alone(self, client: str, dtype: str) -> list[float]:
        return list(self.train(Cell(client, 0, dtype), "none")["losses"][:COMPARED])

    def compare(self, cell: Cell, number: int) -> dict[str, Any]:
        """Medians of both, ratios, and how far each one's losses are from the client's own."""
        found: dict[str, list[dict[str, Any]]] = {"lite": [], "peer": []}
        for turn in range(number, number + self._args.rounds):
            for engine in ("peer", "lite") if turn % 2 else ("lite", "peer"):
                found[engine].append(self.train(cell, engine))
        alone = self.alone(cell.client, cell.dtype)
        values: dict[str, Any] = {"losses": alone}
        for engine, reports in found.items():
            gaps = [abs(each - own) / abs(own) for each, own in zip(reports[0]["losses"], alone)]
            values[f"{engine}_losses"] = float(f"{max(gaps):.2g}")
            for what in MEASURED:
                values[f"{engine}_{what}"] = round(statistics.median(report[what] for report in reports), 4)
        for what in MEASURED:
            pairs = zip(found["lite"], found["peer"])
            values[f"{what}_ratio"] = round(statistics.median(ours[what] / theirs[what] for ours, theirs in pairs), 4)
        return values


def row(cell: Cell, values: dict[str, Any]) -> tuple[Any, ...]:
    """The same for people."""
    cells: list[Any] = [*cell, *(f"{values[f'{engine}_losses']:.0e}" for engine in ("lite", "peer"))]
    for what, scale, digits in (("train_s", 1, 2), ("step_ms", 1, 1), ("peak_pss_bytes", MIB, 0)):
        cells += [f"{values[f'{engine}_{what}'] / scale:.{digits}f}" for engine in ("lite", "peer")]
        cells.append(f"{values[f'{what}_ratio']:.2f}")
    return tuple(cells)


def summary(rows: list[tuple[Any, ...]]) -> str:
    """The ratios, and how far losses are off, as a Markdown table."""
    head = ("client", "stage", "dtype", "losses off", "DeepSpeed's", "training", "step", "peak memory")
    short = [(*each[:5], each[7], each[10], each[13]) for each in rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in (head, ["---"] * len(head), *short))


if __name__ == "__main__":
    main()
