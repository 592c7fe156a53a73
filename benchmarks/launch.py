"""The launcher beside torchrun and DeepSpeed's: how long until the script's first line, and until all ranks have ended.

    python benchmarks/launch.py --peer-python /opt/peer/bin/python

Start: from the command to the first line of the later of two local ranks; the script imports nothing. Failure: from the
moment at which one rank exits with an error until no other rank is left, here and, as root, between hosts of
tests/helpers/cluster.py over ssh, where no peer is timed. Contenders take turns. Without --peer-python DeepSpeed is
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import print_json, print_table

ROOT = Path(__file__).resolve().parent.parent
FIRST_LINE = "import os, sys, time\nopen(sys.argv[-1] + '/' + os.environ['RANK'], 'w').write(repr(time.time()))\n"
WAITING = """import os, signal, sys, time
folder, rank = sys.argv[-1], os.environ["RANK"]
if sys.argv[-2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{folder}/{rank}.pid", "w").write(str(os.getpid()))
while not (rank == "1" and os.path.exists(f"{folder}/go")):
    time.sleep(0.005)
open(f"{folder}/left", "w").write(repr(time.time()))
sys.exit(3)
"""


def environment() -> dict[str, str]:
    """CPU ranks, and this checkout for ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def contenders(peer: str | None) -> dict[str, list[str]]:
    """Name -> the command up to the script."""
    found = {
        "deepspeedlite": [
            sys.executable,
            "-m",
            "deepspeedlite.launcher",
            "-q",
            "--num_gpus",
            "2",
            "--master_port",
            "0",
        ],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"],
    }
    if peer:
        found["DeepSpeed"] = [str(Path(peer).with_name("deepspeed")), "--num_gpus", "2"]
    return found


def start_s(command: list[str]) -> float:
    """From the command to the script's first line in both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "first.py")
        script.write_text(FIRST_LINE)
        began_s = time.time()
        subprocess.run([*command, str(script), folder], env=environment(), check=True, capture_output=True)
        return max(float(Path(folder, rank).read_text()) for rank in "01") - began_s


Popen = Callable[..., "subprocess.Popen[bytes]"]
Pids = Callable[[str], "list[int]"]


def end_s(popen: Popen, command: list[str], ranks: int, kind: str, pids: Pids) -> float:
    """From one rank's exit until no rank is left."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "waiting.py")
        script.write_text(WAITING)
        devnull = subprocess.DEVNULL
        process = popen([*command, str(script), kind, folder], env=environment(), stdout=devnull, stderr=devnull)
        names = [Path(folder, f"{rank}.pid") for rank in range(ranks)]
        while not all(name.exists() and name.read_text() for name in names):
            time.sleep(0.01)
        Path(folder, "go").touch()
        while pids(str(script)):
            time.sleep(0.01)
        ended_s = time.time()
        process.wait()
        return ended_s - float(Path(folder, "left").read_text())


def local_pids(script: str) -> list[int]:
    """Ranks on this machine: a Python that runs the script itself, not a launcher that only names it."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
            found += [int(entry)] * (script in words[1:3])
    return found


def report(title: str, head: list[str], times: dict[str, list[float]]) -> None:
    """Medians and their ratio to the first."""
    ours = statistics.median(next(iter(times.values())))
    rows = []
    for name, found in times.items():
        middle = statistics.median(found)
        print_json(what=title, who=name, median_s=middle, min_s=min(found), max_s=max(found))
        rows.append([name, f"{middle:.3f}", f"{min(found):.3f}", f"{max(found):.3f}", f"{ours / middle:.2f}"])
    print_table(title, head, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    commands = contenders(options.peer_python)
    starts: dict[str, list[float]] = {name: [] for name in commands}
    ends: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, command in commands.items():
            starts[name].append(start_s(command))
    head = ["who", "median s", "min", "max", "deepspeedlite's / this"]
    report("From the command to the script's first line, 2 local ranks", head, starts)
    for _ in range(options.repeats):
        for name, command in commands.items():
            for kind in ("plain", "deaf") if name == "deepspeedlite" else ("plain",):
                what = name + (", ranks that ignore SIGTERM" if kind == "deaf" else "")
                ends.setdefault(what, []).append(end_s(subprocess.Popen, command, 2, kind, local_pids))
    report("From a rank's failure until no rank is left, 2 local ranks", head, ends)
    across(options.repeats, head)


def across(repeats: int, head: list[str]) -> None:
    """Between hosts, where this machine can have some."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from cluster import Cluster, missing_for_cluster

    if missing := missing_for_cluster():
        print(f"between hosts: not measured: {missing}")
        return
    times: dict[str, list[float]] = {}
    workers = ["worker-1", "worker-2", "worker-3"]
    with Cluster(workers) as cluster:
        command = [sys.executable, "-m", "deepspeedlite.launcher", "-q", "--hostfile", str(cluster.hostfile(2))]
        command += ["--launcher", "ssh", "--master_port", "0"]

        def pids(script: str) -> list[int]:
            return [pid for host in workers for pid in cluster.processes(host, script)]

        for _ in range(repeats):
            for kind in ("plain", "deaf"):
                what = "3 hosts of 2 ranks" + (", that ignore SIGTERM" if kind == "deaf" else "")
                run = lambda *words, **more: cluster.popen("head", *words, **more)  # noqa: E731
                times.setdefault(what, []).append(end_s(run, command, 6, kind, pids))
    report("From a rank's failure until no rank is left on any host, over ssh", head, times)


if __name__ == "__main__":
    main()
