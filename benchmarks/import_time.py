"""What importing costs beyond torch itself, and how fast the command line answers; DeepSpeed's beside ours.

    python benchmarks/import_time.py [--peer-python ENV/bin/python] [--before CHECKOUT] [--runs 9]

Each run is a fresh process that imports torch first and then times the rest inside itself. The contenders take turns,
so that a slow minute of the machine hits all of them. `deepspeedlite` imports lazily; what a script pays when it first
touches `initialize` is measured as well. `--before` names another checkout of this project, measured beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from machine import machine, print_json, print_table

ROOT = Path(__file__).resolve().parent.parent
TIMED_IMPORT = """
import time, torch
start = time.perf_counter()
{statement}
print("\\nimport_ms", (time.perf_counter() - start) * 1e3, torch.__version__)
"""
STAND_IN = ROOT / "deepspeedlite" / "drop_in" / "stand_in"
OURS = {
    "import deepspeedlite": "import deepspeedlite",
    "import deepspeed (the stand-in)": f"import sys; sys.path.insert(0, {str(STAND_IN)!r}); import deepspeed",
    "import deepspeed (the stand-in); deepspeed.initialize, zero, comm, accelerator": (
        f"import sys; sys.path.insert(0, {str(STAND_IN)!r}); import deepspeed; "
        "deepspeed.initialize, deepspeed.zero.Init, deepspeed.comm.all_reduce, deepspeed.accelerator.get_accelerator"
    ),
    "import deepspeedlite; deepspeedlite.initialize": "import deepspeedlite; deepspeedlite.initialize",
}
PEER = {"import deepspeed": "import deepspeed"}
PEER_VERSION = "from importlib.metadata import version; print(version('deepspeed'))"


def main() -> None:
    """Measure, then print JSON lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="processes per contender (the first round is not counted)")
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    args = parser.parse_args()

    contenders = {name: (sys.executable, statement, ROOT) for name, statement in OURS.items()}
    if args.before:
        earlier = args.before.resolve()
        contenders |= {
            f"{name}, before": (sys.executable, statement.replace(str(ROOT), str(earlier)), earlier)
            for name, statement in OURS.items()
        }
    if args.peer_python:
        version = run([args.peer_python, "-c", PEER_VERSION]).stdout.strip()
        contenders |= {f"{name} ({version})": (args.peer_python, code, ROOT) for name, code in PEER.items()}
    samples_ms: dict[str, list[float]] = {name: [] for name in (*contenders, "deepspeedlite --help")}
    torch_versions: dict[str, str] = {"deepspeedlite --help": "-"}
    for round_number in range(args.runs + 1):
        for name, contender in contenders.items():
            elapsed_ms, torch_versions[name] = time_import(*contender)
            if round_number:  # the first one warms the page cache and writes the .pyc files
                samples_ms[name].append(elapsed_ms)
        elapsed_ms = time_help()
        if round_number:
            samples_ms["deepspeedlite --help"].append(elapsed_ms)

    rows = []
    for name, found_ms in samples_ms.items():
        middle_ms, low_ms, high_ms = statistics.median(found_ms), min(found_ms), max(found_ms)
        what = {"benchmark": "import_time", "what": name, "torch": torch_versions[name], "runs": args.runs}
        print_json(
            **what, median_ms=round(middle_ms, 2), min_ms=round(low_ms, 2), max_ms=round(high_ms, 2), **machine()
        )
        rows.append((name, torch_versions[name], f"{middle_ms:.1f}", f"{low_ms:.1f}", f"{high_ms:.1f}"))
    title = f"Time on top of `import torch` (--help: the whole process), {args.runs} runs each, alternating"
    print_table(title, ("what", "torch", "median ms", "min", "max"), rows)


def time_import(python: str, statement: str, checkout: Path) -> tuple[float, str]:
    """Milliseconds that the statement takes in a fresh process after `import torch`, and torch's version."""
    output = run([python, "-c", TIMED_IMPORT.format(statement=statement)], checkout).stdout
    line = next(line for line in output.splitlines() if line.startswith("import_ms"))
    _, elapsed_ms, torch_version = line.split()
    return float(elapsed_ms), torch_version


def time_help() -> float:
    """Milliseconds from starting `deepspeedlite --help` to its end."""
    script = Path(sysconfig.get_path("scripts")) / "deepspeedlite"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "deepspeedlite.launcher"]
    start_s = time.perf_counter()
    run([*command, "--help"])
    return (time.perf_counter() - start_s) * 1e3


def run(command: list[str], checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run to the end from the root of a checkout, whose code it imports; a failure shows what the process said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its .pyc files, and so has the peer
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    main()
