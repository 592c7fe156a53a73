"""Training with optimizer states, or all, on a disk: beside what the disk and the processor allow, and DeepSpeed.

    python benchmarks/offload.py --path DIR [--peer-python ENV/bin/python] [--layers 24] [--width 2048] [--rounds 3]

One rank trains a stack of linear layers in bf16 with AdamW. Contenders take turns, each in a process of its own:

    memory        deepspeedlite, nothing offloaded: its times are the processor's part
    optimizer     states on the disk
    both          states and parameters on the disk (`max_in_cpu` 0, nothing kept from forward to backward)
    DeepSpeed     the same two

Two times are taken: of the forward and backward pass, and of `engine.step()`. The disk's rates are measured in every
round, on a file beside, with the same block size and depth: reading alone, and reading one half while the other is
written. A bound is the larger of the processor's part and of the bytes that ours moves by those rates: the step reads
and writes at once, the passes read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine, print_json, print_table

LIMIT = 1.15
ROWS = {
    "memory": ("deepspeedlite, in memory", "lite", ()),
    "optimizer": ("deepspeedlite, optimizer on NVMe", "lite", ("offload_optimizer",)),
    "both": ("deepspeedlite, optimizer and parameters on NVMe", "lite", ("offload_optimizer", "offload_param")),
    "ds-optimizer": ("DeepSpeed, optimizer on NVMe", "deepspeed", ("offload_optimizer",)),
    "ds-both": ("DeepSpeed, optimizer and parameters on NVMe", "deepspeed", ("offload_optimizer", "offload_param")),
}
WARM_UP = 2


def config(options: dict[str, Any]) -> dict[str, Any]:
    """What both engines are given."""
    disk = {"device": "nvme", "nvme_path": options["path"], "pin_memory": True, "buffer_count": 4}
    sections: dict[str, Any] = {}
    for name in options["offloads"]:
        sections[name] = dict(disk)
    if "offload_param" in sections:
        sections["offload_param"] |= {"max_in_cpu": 0, "buffer_count": 5, "buffer_size": 2 * options["width"] ** 2}
    if options["kind"] == "deepspeed" and "offload_optimizer" in sections:
        # The fastest that it has: reading and writing while it steps, with the buffers that this takes.
        sections["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 4 * options["width"] ** 2,
        "sub_group_size": options["sub_group_numel"],
        **sections,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "aio": {"block_size": options["block_bytes"], "queue_depth": options["depth"]},
    }


def work(options: dict[str, Any]) -> None:
    """One contender's turn: prints its times, and what it moves."""
    import torch

    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(options["width"], options["width"], dtype=torch.bfloat16) for _ in range(options["layers"])
    ]
    model = torch.nn.Sequential(*layers)
    numel = sum(param.numel() for param in model.parameters())
    if options["kind"] == "lite":
        import deepspeedlite as library
    else:
        import deepspeed as library  # type: ignore[no-redef]
    engine = library.initialize(model=model, model_parameters=model.parameters(), config=config(options))[0]
    x = torch.randn(options["tokens"], options["width"], dtype=torch.bfloat16)
    passes, steps, losses = [], [], []
    for number in range(WARM_UP + options["steps"]):
        start = time.perf_counter()
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        middle = time.perf_counter()
        engine.step()
        end = time.perf_counter()
        losses.append(float(loss))
        if number >= WARM_UP:
            passes.append(middle - start)
            steps.append(end - middle)
    found = {"passes_s": statistics.median(passes), "step_s": statistics.median(steps), "numel": numel}
    if options["kind"] == "lite":
        pipeline = engine._parts.offload.pipeline
        found["written"] = pipeline.written_nbytes
        found["read"] = pipeline.written_nbytes - 2 * numel * ("offload_param" in options["offloads"])
        found["passes_read"] = 4 * numel * ("offload_param" in options["offloads"])  # in forward, and in backward
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps(
            {**found, "peak_mib": int(peak.split()[1]) >> 10, "loss": losses[-1], "version": library.__version__}
        )
    )


def disk_rates(options: argparse.Namespace) -> tuple[float, float]:
    """Bytes per second: read alone, and moved both ways together while one half of a file is read and one written."""
    import torch

    from deepspeedlite.ops.aio import aio_handle

    handles = [aio_handle(options.block_bytes, options.depth, overlap_events=True) for _ in range(2)]
    nbytes = options.rate_bytes
    buffers = [handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)) for handle in handles]
    with tempfile.NamedTemporaryFile(dir=options.path) as file:
        for number in range(2):
            buffers[number].fill_(number)
            handles[0].sync_pwrite(buffers[number], file.name, number * nbytes)
        start = time.perf_counter()
        handles[0].sync_pread(buffers[0], file.name)
        alone_s = time.perf_counter() - start
        start = time.perf_counter()
        handles[0].async_pread(buffers[0], file.name)
        handles[1].async_pwrite(buffers[1], file.name, nbytes)
        for handle in handles:
            handle.wait()
        both_s = time.perf_counter() - start
    return nbytes / alone_s, 2 * nbytes / both_s


def turn(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """A contender's figures of one turn."""
    _, kind, offloads = ROWS[name]
    job = {"kind": kind, "offloads": offloads, "path": str(args.path)}
    job |= {key: getattr(args, key) for key in ("layers", "width", "tokens", "steps", "block_bytes", "depth")}
    job["sub_group_numel"] = args.sub_group_numel
    python = args.peer_python if kind == "deepspeed" else sys.executable
    environment = {"DS_ACCELERATOR": "cpu", "DSL_LOG_LEVEL": "error", "PYTHONWARNINGS": "ignore", "LOCAL_RANK": "0"}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    environment["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [python, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"NOT MEASURED: {name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Give the contenders their turns, report. Exit status 1 if one that was asked for could not run."""
    args = parse()
    if args.worker:
        work(json.loads(args.worker))
        return
    names = [name for name in ROWS if args.peer_python or not name.startswith("ds-")]
    names = [name for name in names if not args.only or name in args.only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates: list[tuple[float, float]] = []
    for number in range(args.rounds):
        rates.append(disk_rates(args))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if (figures := turn(name, args)) is not None:
                found[name].append(figures)
    report(args, found, rates)
    sys.exit(0 if all(len(figures) == args.rounds for figures in found.values()) else 1)


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], rates: list[tuple[float, float]]) -> None:
    """JSON lines, the table, and the limit."""
    reads, both = (statistics.median(each) for each in zip(*rates))
    middle = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in ("passes_s", "step_s", "peak_mib")}
        for name, turns in found.items()
        if turns
    }
    rows = []
    for name, figures in middle.items():
        first = found[name][0]
        print_json(
            benchmark="offload", what=name, **first, **{f"median_{k}": v for k, v in figures.items()}, **machine()
        )
        bounds = bounds_of(first, middle.get("memory"), reads, both) if name in ("optimizer", "both") else (None, None)
        shown = [f"{t / b:.2f}" if b else "-" for t, b in zip((figures["passes_s"], figures["step_s"]), bounds)]
        peer = middle.get(f"ds-{name}")
        ratio = (figures["passes_s"] + figures["step_s"]) / (peer["passes_s"] + peer["step_s"]) if peer else None
        gib = f"{(first.get('read', 0) + first.get('written', 0) + first.get('passes_read', 0)) / 2**30:.2f}"
        rows.append(
            (
                ROWS[name][0] + (f" ({first['version']})" if name.startswith("ds-") else ""),
                *(f"{figures[key]:.3f}" for key in ("passes_s", "step_s")),
                gib if "read" in first else "-",
                *shown,
                "-" if ratio is None else f"{ratio:.2f}",
                f"{figures['peak_mib']:.0f}",
                f"{first['loss']:.6g}",
            )
        )
    numel = next(iter(found.values()))[0]["numel"]
    title = (
        f"{numel / 1e6:.0f} M parameters in {args.layers} linear layers, bf16, {args.tokens} tokens, 1 rank, medians "
        f"of {args.rounds} turns of {args.steps} steps; the disk reads {reads / 1e9:.2f} GB/s alone, and reads and "
        f"writes {both / 1e9:.2f} GB/s together (blocks of {args.block_bytes >> 10} KiB x {args.depth})"
    )
    head = ("contender", "passes s", "step s", "GiB moved", "passes to bound", "step to bound", "to DeepSpeed's")
    print_table(title, (*head, "peak MiB", "last loss"), rows)
    for row in rows:
        if row[5] != "-":
            print(
                f"{row[0]}: step {row[5]} of its bound, limit {LIMIT}: {'met' if float(row[5]) <= LIMIT else 'MISSED'}"
            )


def bounds_of(
    moved: dict[str, Any], memory: dict[str, float] | None, reads: float, both: float
) -> tuple[float | None, float | None]:
    """The least seconds of passes and step: the processor's, or the disk's."""
    if memory is None:
        return None, None
    return max(memory["passes_s"], moved["passes_read"] / reads), max(
        memory["step_s"], (moved["read"] + moved["written"]) / both
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("."), help="a directory on the disk (.)")
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="in a turn, after some that are not counted")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of {list(ROWS)}")
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--sub-group-numel", type=int, default=1 << 23)
    parser.add_argument("--rate-bytes", type=int, default=1 << 30, help="that the disk's rates are measured with")
    parser.add_argument("--port", type=int, default=29871, help="for the contenders' rendezvous")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(name.startswith("ds-") for name in args.only or ()) and not args.peer_python:
        parser.error("DeepSpeed's rows need --peer-python")
    return args


if __name__ == "__main__":
    main()
