"""What compiling costs: the CUDA wheel, cold; and cpu_adam when first needed, cold and warm, beside DeepSpeed's.

    python benchmarks/wheel_time.py [--peer-python ENV/bin/python] [--runs 3]

The wheel has every op for sm_80 and sm_90, is compiled from nothing, and needs nvcc but no GPU. Loading an op is timed
inside a process that has imported torch; user seconds include the compilers'. Cold runs have an empty cache each.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, print_json, print_table

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "8.0;9.0"
TIMED_LOAD = """
import os, time, torch
{before}
def spent_s():
    now = os.times()
    return now.user + now.children_user
start_s, user_s = time.perf_counter(), spent_s()
{load}
print("\\nspent", time.perf_counter() - start_s, spent_s() - user_s)
"""
OURS = {"before": "from deepspeedlite.ops import load", "load": "load('cpu_adam')"}
PEER = {"before": "from deepspeed.ops.op_builder import CPUAdamBuilder", "load": "CPUAdamBuilder().load()"}


def main() -> None:
    """Measure, then print JSON lines and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs per contender, each cold and then warm")
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    args = parser.parse_args()
    print_json(benchmark="wheel_time", machine=machine())
    wheel_row = time_wheel()
    contenders = {"deepspeedlite": (sys.executable, OURS)}
    if args.peer_python:
        contenders["DeepSpeed"] = (args.peer_python, PEER)
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(args.runs):
        for name, (python, code) in contenders.items():
            with tempfile.TemporaryDirectory(prefix="dsl-jit-") as cache:
                for state in ("cold", "warm"):
                    samples.setdefault((name, state), []).append(time_load(python, code, cache))
    rows = []
    for (name, state), spent in samples.items():
        wall_s, user_s = (statistics.median(column) for column in zip(*spent))
        print_json(what=f"cpu_adam, {state}", contender=name, wall_s=round(wall_s, 4), user_s=round(user_s, 3))
        rows.append([name, state, f"{wall_s * 1e3:.1f}", f"{user_s:.2f}"])
    print_table(f"A CUDA wheel of every op, {ARCHS}, cold", ["wall s", "user s", "size MB"], [wheel_row])
    print_table(f"Loading cpu_adam, medians of {args.runs}", ["what", "cache", "wall ms", "user s"], rows)


def time_wheel() -> list[str]:
    """Make the wheel; its row."""
    with tempfile.TemporaryDirectory(prefix="dsl-wheel-") as out:
        before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
        command = [sys.executable, "tools/make_wheel.py", "--accel", "cuda", "--archs", ARCHS, "--out", out]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        wall_s = time.perf_counter() - start_s
        user_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        [wheel] = Path(out).glob("*.whl")
        size_mb = wheel.stat().st_size / 1e6
    print_json(
        what="CUDA wheel", archs=ARCHS, wall_s=round(wall_s, 2), user_s=round(user_s, 2), size_mb=round(size_mb, 3)
    )
    return [f"{wall_s:.1f}", f"{user_s:.1f}", f"{size_mb:.2f}"]


def time_load(python: str, code: dict[str, str], cache: str) -> tuple[float, float]:
    """Wall and user seconds of loading cpu_adam in a process of its own."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed calls the environment's ninja
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": cache, "PATH": path}
    command = [python, "-c", TIMED_LOAD.format(**code)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    _, wall_s, user_s = next(line for line in done.stdout.splitlines() if line.startswith("spent ")).split()
    return float(wall_s), float(user_s)


if __name__ == "__main__":
    main()
