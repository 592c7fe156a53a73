"""Images: how large, and how long until they are built, built again, and have said whether they work.

    python benchmarks/images.py --base local/debian --wheels DIR [--cuda-base local/cuda-devel]

The CPU image is built from nothing, again without a change, and after an edit of a Python file, each in a copy of this
checkout; its size is compared with torch's as pip installs it. Then `docker run --rm IMAGE` is timed. With --cuda-base
the image for sm_80 and sm_90 is built from nothing too, with that same torch, which is for the CPU.
tools/local_base.sh makes the bases; without --base the environments' own are pulled. Images are removed at the end.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, print_json, print_table

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "dsl-benchmark"


def main() -> None:
    """Measure, then print JSON lines and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="base image, of Debian's kind")
    parser.add_argument("--cuda-base", help="the same with nvcc; the image runs on --base")
    parser.add_argument("--wheels", help="a folder with torch's wheel")
    parser.add_argument("--torch-spec", default="torch==2.13.0+cpu")
    parser.add_argument("--cached", action="store_true", help="begin from the engine's cache, not from nothing")
    parser.add_argument("--runs", type=int, default=5, help="of `docker run`")
    args = parser.parse_args()
    print_json(benchmark="images", machine=machine())
    common = ["--repository", REPOSITORY, "--torch-spec", args.torch_spec]
    common += ["--wheels", args.wheels] if args.wheels else []
    base = ["--base", args.base] if args.base else []
    try:
        with tempfile.TemporaryDirectory(prefix="dsl-images-") as folder:
            checkout = copy_of_checkout(Path(folder, "checkout"))
            cpu = build_cpu(checkout, [*base, *common], args.cached)
            print_table("The CPU image", ["what", "build s", "steps cached", "verify s", "MB", "to torch's size"], cpu)
            print_table(
                "docker run --rm IMAGE, to the end of the report",
                ["runs", "median s", "min", "max"],
                [report(args.runs)],
            )
            if args.cuda_base:
                bases = ["--base", args.cuda_base, "--run-base", args.base] if args.base else ["--base", args.cuda_base]
                rows = build_cuda(checkout, [*bases, *common])
                print_table(
                    "The CUDA image, sm_80 and sm_90", ["build s", "verify s", "MB", "GPUs in each library"], rows
                )
    finally:
        tags = subprocess.run(["docker", "images", "-q", REPOSITORY], capture_output=True, text=True).stdout.split()
        subprocess.run(["docker", "rmi", "--force", *dict.fromkeys(tags)], capture_output=True)


def copy_of_checkout(folder: Path) -> Path:
    """The files that git has, as they are now."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(checkout: Path, *options: str) -> str:
    """The tool, to its end; what it printed."""
    command = [sys.executable, "-m", "env", "build", *options]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def numbers(said: str) -> dict[str, float]:
    """The times and sizes in what the tool printed."""
    patterns = {
        "build_s": r"^built in ([\d.]+) s by",
        "cached": r"(\d+) of \d+ steps from the cache",
        "steps": r"\d+ of (\d+) steps from the cache",
        "verify_s": r"verified in ([\d.]+) s",
        "size_mb": r"^([\d,.]+) MB in all",
        "to_torch": r"([\d.]+) times torch's own",
    }
    found = {name: re.search(pattern, said, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match}


def build_cpu(checkout: Path, options: list[str], cached: bool) -> list[list[object]]:
    """From nothing, unchanged, and with an edited file."""
    rows = []
    for what in ("from the cache" if cached else "from nothing", "nothing changed", "a Python file edited"):
        if "edited" in what:
            edited = checkout / "deepspeedlite" / "engine.py"
            edited.write_text(edited.read_text() + "\n# edited\n")
        extra = ["--no-cache"] if what == "from nothing" else []
        found = numbers(build(checkout, "cpu", *options, *extra))
        print_json(image="cpu", what=what, **found)
        cached = f"{found['cached']:.0f} of {found['steps']:.0f}"
        times = [f"{found['build_s']:.1f}", cached, f"{found['verify_s']:.1f}"]
        rows.append([what, *times, f"{found['size_mb']:,.0f}", f"{found['to_torch']:.2f}"])
    return rows


def report(runs: int) -> list[object]:
    """How long `docker run` takes."""
    seconds = []
    for _ in range(runs):
        start_s = time.perf_counter()
        subprocess.run(["docker", "run", "--rm", f"{REPOSITORY}:cpu"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start_s)
    print_json(what="docker run", seconds=[round(each, 3) for each in seconds])
    return [runs, *(f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds)))]


def build_cuda(checkout: Path, options: list[str]) -> list[list[object]]:
    """From nothing; what cuobjdump found inside the build."""
    said = build(checkout, "cuda-13.0", *options, "--archs", "8.0;9.0", "--no-cache", "--verbose")
    found = numbers(said)
    inside = sorted(set(re.findall(r"^ +\w+\.so +(sm_.*)$", said, re.MULTILINE)))
    print_json(image="cuda", inside=inside, **found)
    return [[f"{found['build_s']:.1f}", f"{found['verify_s']:.1f}", f"{found['size_mb']:,.0f}", "; ".join(inside)]]


if __name__ == "__main__":
    main()
