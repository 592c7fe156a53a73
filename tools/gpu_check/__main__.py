"""One command that proves and measures the library on this machine's accelerators.

    make gpu-check          or   python -m tools.gpu_check [--only PHASE ...] [--budget S] [--out DIR]

Needs torch 2.10 or newer, and for kernels nvcc or hipcc; no network. Every result is written to DIR/gpu-check.json and
DIR/gpu-check.md as it is found. Exit status: 0 all is right, 1 something failed, 3 there is no accelerator here (then
it says what it would do).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.gpu_check.phases import PHASES
from tools.gpu_check.report import Report
from tools.gpu_check.runner import ROOT, Runner

NO_DEVICE = 3


def main() -> int:
    """Run phases in order; the exit status."""
    args = parse()
    report = Report(args.out)
    if args.device == "threads":
        compile_threads()
    ends_s = time.monotonic() + args.budget
    runner = Runner(report, args.device, args.tiny, ends_s, args.ranks)
    runner.run(PHASES[0])
    if not report.figures_of("here").get("accelerators") and args.device == "auto":
        if report.failed:
            print("\nNo accelerator works here; the rows that failed say why", file=sys.stderr)
            return 1
        print(f"\nThere is no accelerator here. On one it would:\n\n{plan(args.only)}")
        return NO_DEVICE
    for phase in PHASES[1:]:
        if not args.only or phase.name in args.only:
            runner.run(phase)
    print(f"\nAll of it is in {report.json} and {report.table}")
    return int(report.failed)


def compile_threads() -> None:
    """The tests' accelerator, before the clock runs: every process of every phase loads it."""
    os.environ.setdefault("THREADS_DEVICE_DIR", tempfile.mkdtemp(prefix="gpu-check-threads-"))
    code = "import os, threads_device; threads_device.use(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests" / "accelerator", check=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="phases, in order of worth:\n" + plan([]),
    )
    add = parser.add_argument
    names = [phase.name for phase in PHASES]
    add("--only", nargs="+", choices=names, default=[], metavar="PHASE", help="these alone (what is here always)")
    add("--budget", type=float, default=480.0, metavar="S", help="seconds in all (default %(default)g)")
    add("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="for the results (default %(default)s)")
    add("--ranks", type=int, default=8, help="at most so many GPUs (default %(default)s)")
    add("--device", default="auto", help="cpu, or threads (tests/accelerator), to try the check itself")
    add("--tiny", action="store_true", help="shapes that take no time, with --device")
    return parser.parse_args()


def plan(only: list[str]) -> str:
    """What would be done, with what it usually takes."""
    chosen = [phase for phase in PHASES if not only or phase.name in only]
    lines = [
        f"  {phase.name:12}{phase.usual_s:4} s, at most {phase.limit_s:3} s   {phase.says}"
        + (" (needs nvcc or hipcc)" if phase.compiles else "")
        + (" (a process for each GPU)" if phase.every_rank else "")
        for phase in chosen
    ]
    return "\n".join([*lines, f"  in all about {sum(phase.usual_s for phase in chosen)} s"])


if __name__ == "__main__":
    sys.exit(main())
