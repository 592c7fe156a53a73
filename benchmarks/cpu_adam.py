"""One Adam step on the CPU: our op beside torch's fused and foreach AdamW, DeepSpeedCPUAdam and plain memory traffic.

    python benchmarks/cpu_adam.py [--peer-python ENV/bin/python]

Every contender is a process of its own that takes turns; each turn is a few steps. *stream* multiplies a tensor in
place (8 bytes per element), scaled to the 28 bytes per element that a step of Adam reads and writes. The *bf16* rows
take bf16 gradients, undo a loss scale, and leave a bf16 copy of the fp32 masters: in one pass, or in torch's four.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS_IN_A_TURN, ADAM_BYTES, STREAM_BYTES = 4, 28, 8


def make(name: str, numel: int) -> Callable[[], object]:
    """What one step of a contender calls."""
    master = torch.nn.Parameter(torch.randn(numel))
    if name == "stream":
        return lambda: master.data.mul_(1.0000001)
    master.grad = torch.randn(numel)
    if name == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam as Theirs

        return Theirs([master], adamw_mode=True, **OPTIONS).step
    if name in ("fused", "foreach"):
        return torch.optim.AdamW([master], **OPTIONS, **{name: True}).step

    sys.path.insert(0, str(ROOT))
    from deepspeedlite.ops.adam import DeepSpeedCPUAdam
    from deepspeedlite.ops.one_pass import OnePassUpdate

    if name == "ours":
        return DeepSpeedCPUAdam([master], **OPTIONS).step
    grad, copy = torch.randn(numel).bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    if name == "ours bf16":
        optimizer = DeepSpeedCPUAdam([master], **OPTIONS)

        def in_one_pass() -> None:
            optimizer.hand_over([OnePassUpdate(master, grad, copy)], 0.5)
            optimizer.step()

        return in_one_pass
    reference = torch.optim.AdamW([master], **OPTIONS, fused=True)

    def separately() -> None:
        master.grad.copy_(grad)
        master.grad.mul_(0.5)
        reference.step()
        copy.copy_(master.detach())

    return separately


def work(name: str, numel: int, threads: int) -> None:
    """A contender's process: milliseconds per step of each turn that it is told to take."""
    torch.set_num_threads(threads)
    step = make(name, numel)
    step()
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        started_s = time.perf_counter()
        for _ in range(STEPS_IN_A_TURN):
            step()
        ms = (time.perf_counter() - started_s) * 1e3 / STEPS_IN_A_TURN
        print(json.dumps({"ms": ms * ADAM_BYTES / STREAM_BYTES if name == "stream" else ms}), flush=True)


def reply(process: subprocess.Popen[str]) -> dict:
    """The contender's next line that is JSON; what else it prints is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args} ended before it answered")


def main() -> None:
    """Measure all, print JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.numel, args.threads)
        return

    pythons = dict.fromkeys(["stream", "fused", "foreach", "ours", "separate bf16", "ours bf16"], sys.executable)
    if args.peer_python:
        pythons["deepspeed"] = args.peer_python
    contenders = {}
    for name, python in pythons.items():
        command = [python, __file__, "--worker", name, "--numel", str(args.numel), "--threads", str(args.threads)]
        contenders[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for process in contenders.values():
        reply(process)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, process in contenders.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            times[name].append(reply(process)["ms"])
    for process in contenders.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"\nAdam, {args.numel:,} elements, {args.threads} threads, torch {torch.__version__}; ratios of medians\n")
    print("| contender | median ms | min | max | to stream | to torch's fused |\n| --- | --- | --- | --- | --- | --- |")
    for name, found in times.items():
        ratios = [median[name] / median["stream"], median[name] / median["fused"]]
        print(
            f"| {name} | {median[name]:.1f} | {min(found):.1f} | {max(found):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
    limits = [("ours", "fused", 1.0), ("ours", "deepspeed", 0.8), ("ours", "stream", 1.15)]
    print()
    for mine, peer, at_most in [*limits, ("ours bf16", "separate bf16", 0.6)]:
        if peer in median:
            ratio = median[mine] / median[peer]
            verdict = "met" if ratio <= at_most else "MISSED"
            found = {"mine": mine, "peer": peer, "at_most": at_most, "ratio": round(ratio, 4), "verdict": verdict}
            print(json.dumps({"benchmark": "cpu_adam", **found}))


if __name__ == "__main__":
    main()
