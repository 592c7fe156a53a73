"""Passes of a model whose weights are streamed from a disk: beside what disk and processor allow, and DeepSpeed.

    python benchmarks/streamed.py --path DIR [--dtype bf16 --peer-python ENV/bin/python] [--tokens 1 256]

A stack of linear layers computes without gradients. DeepSpeed 0.19.8 has no fp32 weights on a disk where a CPU computes
(it reads them as bf16), so it takes part in bf16. Contenders take turns, each in a process of its own:

    memory        the module itself: the processor's part
    streamed      `init_inference` with `zero.offload_param` on the disk, nothing kept in memory
    DeepSpeed     its engine of stage 3 with the same section, in evaluation mode

The disk's rate is measured in every round, by reading a file beside with the same block size and depth. The bound is
the larger of the processor's part and of the weights' bytes by that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine, print_json, print_table
from offload import disk_rates

LIMIT = 1.15
WARM_UP = 2
TURN_S = 600  # with the time that DeepSpeed takes to compile its async_io, the first time
MEMORY, STREAMED, DEEPSPEED = "in memory", "streamed", "DeepSpeed, stage 3 on NVMe"


def work(options: dict[str, Any]) -> None:
    """One contender's turn: prints the seconds of a pass, by its tokens, and the peak of its memory."""
    import torch

    torch.manual_seed(0)
    width = options["width"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["dtype"]]
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(options["layers"]))).eval().to(dtype)
    place = {"device": "nvme", "nvme_path": options["path"], "max_in_cpu": 0, "buffer_count": 5}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": place}
    run: Any = model
    if options["what"] == STREAMED:
        import deepspeedlite

        run = deepspeedlite.init_inference(model, config={"dtype": options["dtype"], "zero": zero})
    elif options["what"] == DEEPSPEED:
        import deepspeed

        zero["offload_param"] = {**place, "pin_memory": True, "buffer_size": 2 * width**2}
        aio = {"block_size": options["block_bytes"], "queue_depth": options["depth"]}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "aio": aio}
        config["bf16"] = {"enabled": options["dtype"] == "bf16"}
        run = deepspeed.initialize(model=model, config=config)[0]
        run.eval()  # which gives nothing back
    found: dict[str, Any] = {}
    with torch.no_grad():
        for tokens in options["tokens"]:
            x, times = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype), []
            for _ in range(WARM_UP + options["passes"]):
                start = time.perf_counter()
                out = run(x)
                times.append(time.perf_counter() - start)
            found[str(tokens)] = {"s": statistics.median(times[WARM_UP:]), "sum": float(out.double().sum())}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**found, "peak_mib": int(peak.split()[1]) >> 10}))


def turn(what: str, args: argparse.Namespace) -> dict[str, Any]:
    """A contender's figures of one turn."""
    job = {"what": what, "path": str(args.path.absolute())}
    shared = ("dtype", "layers", "width", "tokens", "passes", "block_bytes", "depth")
    job |= {key: getattr(args, key) for key in shared}
    python = args.peer_python if what == DEEPSPEED else sys.executable
    environ = {"DS_ACCELERATOR": "cpu", "DSL_LOG_LEVEL": "error", "PYTHONWARNINGS": "ignore", "LOCAL_RANK": "0"}
    environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    environ["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [python, __file__, "--worker", json.dumps(job)]
    try:
        done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=TURN_S)
    except subprocess.TimeoutExpired:
        sys.exit(
            f"{what}: not over in {TURN_S} s; one that was ended while it compiled leaves a file `lock` in "
            "~/.cache/torch_extensions, for which DeepSpeed waits"
        )
    if done.returncode != 0:
        sys.exit(f"{what}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Give the contenders their turns, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("."), help="a directory on the disk (.)")
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="DeepSpeed does bf16 alone")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256], help="of each of the measured passes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5, help="in a turn, after some that are not counted")
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rate-bytes", type=int, default=1 << 30, help="that the disk's rate is measured with")
    parser.add_argument("--port", type=int, default=29873, help="for DeepSpeed's rendezvous")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    names = [MEMORY, STREAMED, *([DEEPSPEED] if args.peer_python else [])]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates = []
    for number in range(args.rounds):
        rates.append(disk_rates(args)[0])
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(turn(name, args))
    report(args, found, statistics.median(rates))


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], rate: float) -> None:
    """JSON lines, the table, and the limit."""
    nbytes = args.layers * (args.width**2 + args.width) * {"fp32": 4, "bf16": 2}[args.dtype]
    rows = []
    for tokens in map(str, args.tokens):
        middle = {name: statistics.median(one[tokens]["s"] for one in turns) for name, turns in found.items()}
        bound = max(middle[MEMORY], nbytes / rate)
        for name, pass_s in middle.items():
            first = found[name][0]
            print_json(benchmark="streamed", what=name, tokens=int(tokens), pass_s=pass_s, bound_s=bound, **machine())
            to_peer = f"{pass_s / middle[DEEPSPEED]:.2f}" if DEEPSPEED in middle else "-"
            same = first[tokens]["sum"] == found[MEMORY][0][tokens]["sum"]
            rows.append((tokens, name, f"{pass_s:.3f}", f"{pass_s / bound:.2f}", to_peer, first["peak_mib"], same))
    title = f"{nbytes >> 20} MiB of {args.dtype} weights in {args.layers} layers; the disk reads {rate / 1e9:.2f} GB/s"
    print_table(title, ("tokens", "what", "pass s", "to the bound", "to DeepSpeed's", "peak MiB", "same output"), rows)
    for tokens, name, _, to_bound, *_ in rows:
        if name == STREAMED:
            verdict = "met" if float(to_bound) <= LIMIT else "MISSED"
            print(f"{tokens} tokens: {to_bound} of the bound, limit {LIMIT}: {verdict}")


if __name__ == "__main__":
    main()
