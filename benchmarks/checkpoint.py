"""Saving and loading checkpoints beside DeepSpeed: durable, without fsync, in the background; time and memory.

    python benchmarks/checkpoint.py --peer-python /opt/peer/bin/python

Two ranks of each library live at once on this machine, bf16 and Adam, and take turns: in every round two processes
write and fsync as many bytes, then each library saves once; the first round of each kind is not counted. Then they
load in turns, each time in new processes and from the page cache. Figures are the best of `--repeats` rounds, on the
slowest rank; the JSON lines have all rounds. Without `--peer-python` only ours is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from machine import print_json, print_table

WORLD = 2
GIB = 1 << 30
WIDTH = 2048
OURS, PEER = "ours", "DeepSpeed"
MODES = {"durable": {}, "fast": {"fsync": False}, "async": {"async_save": True}}
SHARD_NBYTES = 256 << 20  # of to_fp32


# --- a rank: does what it reads, one JSON object a line, and answers ----------------------------------------------


class Rank:
    """One rank of one library. Its methods are the commands; times are the slowest rank's, in seconds."""

    def __init__(self, library: str) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        self.package = __import__("deepspeedlite" if library == OURS else "deepspeed")
        self.package.init_distributed("gloo")
        self.engine: Any = None

    def build(self, stage: int, numel: int, checkpoint: dict[str, Any], steps: int) -> dict[str, float]:
        """Another engine in the place of the former, after `steps` steps: none, and Adam has no states yet."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine = None
        gc.collect()
        self.torch.manual_seed(0)
        linear = self.torch.nn.Linear
        model = self.torch.nn.Sequential(*(linear(WIDTH, WIDTH, bias=False) for _ in range(numel // WIDTH**2)))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **({"checkpoint": checkpoint} if checkpoint else {}),
        }
        initialize = self.package.initialize
        self.engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        for _ in range(steps):
            x = self.torch.randn(1, WIDTH, dtype=self.torch.bfloat16)
            self.engine.backward(self.engine(x).float().square().mean())
            self.engine.step()
        return {}

    def save(self, folder: str, then: str) -> dict[str, float]:
        """One save. `then` is what makes it whole: nothing, `sync` (of all disks), or `wait` (for the background)."""
        more = {"": lambda: None, "sync": lambda: self.dist.get_rank() or os.sync(), "wait": self._wait}[then]
        self.dist.barrier()
        start_s = time.perf_counter()
        self.engine.save_checkpoint(folder, tag="t")
        call_s = time.perf_counter() - start_s
        more()
        return {"call_s": self._slowest(call_s), "whole_s": self._slowest(time.perf_counter() - start_s)}

    def _wait(self) -> None:
        self.engine._checkpoints.wait()

    def load(self, folder: str) -> dict[str, float]:
        """Load; the memory that this rank's process grew by at its worst, the larger of the ranks', comes with it."""
        before = resident_nbytes()
        reset_peak()
        self.dist.barrier()
        start_s = time.perf_counter()
        path = self.engine.load_checkpoint(folder, tag="t")[0]
        taken_s = self._slowest(time.perf_counter() - start_s)
        if path is None:
            raise SystemExit("nothing was loaded")
        return {"load_s": taken_s, "growth_nbytes": self._slowest(float(peak_nbytes() - before))}

    def _slowest(self, value: float) -> float:
        most = self.torch.tensor(value, dtype=self.torch.float64)
        self.dist.all_reduce(most, op=self.dist.ReduceOp.MAX)
        return most.item()


def resident_nbytes() -> int:
    """This process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_nbytes() -> int:
    """The most memory this process has held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Start measuring the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(library: str) -> None:
    """The life of a rank: commands from stdin, answers to where stdout was; all that libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank = Rank(library)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(rank, name)(**arguments)), file=answers, flush=True)
    os._exit(0)  # DeepSpeed's threads abort the process while the interpreter ends


# --- the contenders -----------------------------------------------------------------------------------------------


class Contender:
    """The ranks of one library, as the measuring process sees them."""

    def __init__(self, library: str, python: str, folder: Path) -> None:
        self.library, self.folder = library, folder / library
        self.log = folder / f"{library}.log"
        self.ranks: list[subprocess.Popen[str]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(WORLD):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1"}
            env = {**os.environ, **{k: str(v) for k, v in world.items()}, "MASTER_PORT": str(port)}
            env.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
            with self.log.open("a") as log:
                command = [python, __file__, "--serve", library]
                pipe = subprocess.PIPE
                self.ranks.append(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True))

    def ask(self, name: str, **arguments: object) -> dict[str, float]:
        """Have all ranks do one thing; rank 0's answer."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([name, arguments]) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() if rank.stdout else "" for rank in self.ranks]
        if not all(answers):
            raise SystemExit(f"{self.library} ended in {name}:\n{self.log.read_text()[-3000:]}")
        return json.loads(answers[0])

    def save(self, then: str) -> dict[str, float]:
        """Save once, into an empty folder."""
        clear(self.folder)
        return self.ask("save", folder=str(self.folder), then=then)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the ranks end."""
        for rank in self.ranks:
            rank.communicate()


def clear(folder: Path) -> None:
    """Make an empty folder, with nothing waiting to be written to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def raw_s(nbytes: int, folder: Path) -> dict[str, float]:
    """Seconds in which as many processes as there are ranks write and fsync this many bytes together."""
    code = (
        "import os, sys\nb = os.urandom(1 << 23)\nf = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "print(flush=True)\nsys.stdin.readline()\n"
        "for _ in range(int(sys.argv[2]) >> 23): os.write(f, b)\nos.fsync(f)\nprint(flush=True)"
    )
    clear(folder)
    command = [sys.executable, "-c", code]
    share, pipe = str(nbytes // WORLD), subprocess.PIPE
    writers = [
        subprocess.Popen([*command, str(folder / f"raw{rank}"), share], stdin=pipe, stdout=pipe, text=True)
        for rank in range(WORLD)
    ]
    for writer in writers:
        writer.stdout.readline()  # type: ignore[union-attr]
    start_s = time.perf_counter()
    for writer in writers:
        writer.stdin.write("\n"), writer.stdin.flush()  # type: ignore[union-attr]
    for writer in writers:
        writer.stdout.readline()  # type: ignore[union-attr]
    taken_s = time.perf_counter() - start_s
    for writer in writers:
        writer.communicate()
    shutil.rmtree(folder)
    return {"s": taken_s}


# --- what is measured ---------------------------------------------------------------------------------------------


def rounds(count: int, actions: dict[str, Callable[[], dict[str, float]]], warm: int = 0) -> dict[str, list[float]]:
    """Do all actions in turns; the values of each by `action.value`, without those of the first `warm` rounds."""
    found: dict[str, list[float]] = {}
    for number in range(warm + count):
        for name, action in actions.items():
            for key, value in action().items():
                if number >= warm:
                    found.setdefault(f"{name}.{key}", []).append(round(value, 4))
    return found


def measure(options: argparse.Namespace, stage: int, millions: int, folder: Path) -> dict[str, Any]:
    """All figures of one stage and size: the best of each."""
    size = {"stage": stage, "numel": millions << 20}
    pythons = {OURS: sys.executable, **({PEER: options.peer_python} if options.peer_python else {})}
    with ExitStack() as stack:
        found = saves(options, size, {n: stack.enter_context(Contender(n, p, folder)) for n, p in pythons.items()})
    loads = {name: partial(load_fresh, name, python, folder, size) for name, python in pythons.items()}
    found.update({f"load.{key}": values for key, values in rounds(options.repeats, loads).items()})
    sizes = {f"{name}.nbytes": float(size_of(folder / name)) for name in pythons}
    print_json(stage=stage, millions=millions, **sizes, **found)
    return {**sizes, **{key: min(values) for key, values in found.items()}}


def saves(options: argparse.Namespace, size: dict[str, int], those: dict[str, Contender]) -> dict[str, list[float]]:
    """Seconds of every kind of save, as `mode.contender.value`. Each leaves its last checkpoint."""
    found: dict[str, list[float]] = {}
    ours, peer = those[OURS], those.get(PEER)
    if peer is not None:
        peer.ask("build", **size, checkpoint={}, steps=1)
    for mode, settings in MODES.items():
        ours.ask("build", **size, checkpoint=settings, steps=1)
        actions: dict[str, Callable[[], dict[str, float]]] = {}
        if mode == "durable":
            ours.save("")
            actions["raw"] = partial(raw_s, size_of(ours.folder), ours.folder.with_name("raw"))
        actions[OURS] = partial(ours.save, "wait" if mode == "async" else "")
        if peer is not None:
            actions[PEER] = partial(peer.save, "sync")
        found.update({f"{mode}.{key}": v for key, v in rounds(options.repeats, actions, warm=1).items()})
    return found


def load_fresh(library: str, python: str, folder: Path, size: dict[str, int]) -> dict[str, float]:
    """Load into an engine that has not stepped yet, in processes of its own."""
    with Contender(library, python, folder) as one:
        one.ask("build", **size, checkpoint={}, steps=0)
        return one.ask("load", folder=str(one.folder))


def weights_out(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds and peak memory (bytes, of the whole process) of taking whole fp32 weights out of both checkpoints."""
    ours = [sys.executable, "-m", "deepspeedlite.checkpoint", "to_fp32", str(folder / OURS), "OUT"]
    actions = {OURS: lambda: run_out([*ours, "--max_shard_size", str(SHARD_NBYTES)], folder)}
    if options.peer_python:
        # In one file for torch.load: shards and safetensors need packages that DeepSpeed does not install.
        code = "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as f; "
        script = [options.peer_python, "-c", code + "f(*sys.argv[1:3], max_shard_size=None, tag='t')"]
        actions[PEER] = lambda: run_out([*script, str(folder / PEER), "OUT"], folder)
    return rounds(options.repeats, actions, warm=1)


def run_out(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command that writes weights, with its OUT replaced by an empty folder's name."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with (folder / "out.log").open("w") as log:
        start_s = time.perf_counter()
        process = subprocess.Popen([str(out) if w == "OUT" else w for w in command], env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        taken_s = time.perf_counter() - start_s
    if status != 0:
        raise SystemExit((folder / "out.log").read_text()[-3000:])
    return {"s": taken_s, "peak_nbytes": usage.ru_maxrss * 1024.0}


# --- tables -------------------------------------------------------------------------------------------------------


def row(stage: int, millions: int, name: str, best: dict[str, float]) -> list[str]:
    """One contender's line."""
    nbytes, raw = best[f"{name}.nbytes"], best["durable.raw.s"]
    is_ours = name == OURS
    durable = best[f"durable.{name}.{'call_s' if is_ours else 'whole_s'}"]
    raw_share = nbytes / durable / (best[f"{OURS}.nbytes"] / raw)
    shard = nbytes / WORLD
    return [
        f"{millions} M",
        str(stage),
        name,
        f"{nbytes / GIB:.2f}",
        f"{nbytes / raw / GIB:.2f}" if is_ours else "",
        f"{durable:.2f} ({raw_share:.2f})",
        f"{best[f'fast.{name}.call_s']:.2f}",
        f"{best['async.ours.call_s']:.3f} ({best['async.ours.call_s'] / durable:.0%})" if is_ours else "",
        f"{best[f'load.{name}.load_s']:.2f}",
        f"{best[f'load.{name}.growth_nbytes'] / shard:.2f}",
    ]


HEAD = ["Size", "Stage", "", "GiB", "disk GiB/s", "durable s (of the disk's rate)", "no fsync s"]
HEAD += ["async stall s (of durable)", "load s", "peak while loading / own shards"]


def main() -> None:
    """Measure all and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--dir", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--millions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    rows, out_rows = [], []
    for millions in options.millions:
        for stage in options.stages:
            with tempfile.TemporaryDirectory(dir=options.dir) as base:
                best = measure(options, stage, millions, Path(base))
                names = [OURS, PEER] if options.peer_python else [OURS]
                rows += [row(stage, millions, name, best) for name in names]
                if stage == options.stages[0]:
                    out = weights_out(options, Path(base))
                    print_json(millions=millions, **{f"to_fp32.{key}": values for key, values in out.items()})
                    out_rows += [
                        [f"{millions} M", name, min(out[f"{name}.s"]), f"{min(out[f'{name}.peak_nbytes']) / GIB:.2f}"]
                        for name in names
                    ]
    print_table("Checkpoints, bf16 and AdamW, 2 ranks", HEAD, rows)
    head = ["Size", "", "s", "peak memory GiB"]
    print_table(f"Weights out, fp32, shards of {SHARD_NBYTES >> 20} MiB", head, out_rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
