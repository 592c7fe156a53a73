"""Saving and loading checkpoints beside DeepSpeed: durable, without fsync, in the background; time and memory.

    python benchmarks/checkpoint.py --peer-python /opt/peer/bin/python

Two ranks on this machine, bf16 and Adam, ZeRO stages 2 and 3. Figures are the best of `--repeats`, on the slowest
rank. The disk's raw rate is that of writing and fsyncing as many bytes by as many processes, in this run.
Without `--peer-python` only ours is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from machine import print_json, print_table

WORLD = 2
GIB = 1 << 30


def config(stage: int, **checkpoint: bool) -> dict:
    """Both libraries'; the keys of `checkpoint` are ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }


def resident_nbytes() -> int:
    """This process's memory, without pages of files."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_nbytes() -> int:
    """The most memory this process has held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Start measuring the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def worker(library: str, stage: int, numel: int, folder: Path, repeats: int) -> dict[str, float]:
    """One rank's figures, the slowest rank's where they are times."""
    import torch
    import torch.distributed as dist

    package = __import__("deepspeedlite" if library == "ours" else "deepspeed")
    package.init_distributed("gloo")
    width = 2048

    def engine_of(**checkpoint: bool) -> object:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(round(numel / width**2))]
        model = torch.nn.Sequential(*layers)
        engine = package.initialize(
            model=model, model_parameters=model.parameters(), config=config(stage, **checkpoint)
        )[0]
        engine.backward(engine(torch.randn(1, width, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        return engine

    def slowest(action: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        action()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    def best_save(engine: object, then: Callable[[], object] = lambda: None) -> tuple[float, float]:
        calls, wholes = [], []
        for repeat in range(repeats):
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                os.sync()
            dist.barrier()
            begin = time.perf_counter()
            save = partial(engine.save_checkpoint, str(folder), tag=f"t{repeat}")
            calls.append(slowest(save))
            then()
            dist.barrier()
            wholes.append(time.perf_counter() - begin)
        return min(calls), min(wholes)

    found: dict[str, float] = {}
    if library == "ours":
        engine = engine_of(fsync=False)
        found["save_s"], _ = best_save(engine)
        engine.destroy()
        del engine
        engine = engine_of(async_save=True)
        best_save(engine, engine._saver.wait)  # the first snapshot allocates
        found["stall_s"], _ = best_save(engine, engine._saver.wait)
        engine.destroy()
        del engine
        engine = engine_of()
        found["durable_s"], _ = best_save(engine)
    else:
        engine = engine_of()
        found["save_s"], found["durable_s"] = best_save(engine, lambda: dist.get_rank() or os.sync())
    found["nbytes"] = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    engine.destroy()
    del engine
    engine = engine_of()
    if engine.load_checkpoint(str(folder))[0] is None:  # states exist from here on
        raise SystemExit(f"{library} loaded nothing")
    before = resident_nbytes()
    reset_peak()
    found["load_s"] = min(slowest(lambda: engine.load_checkpoint(str(folder))) for _ in range(repeats))
    found["growth_nbytes"] = float(peak_nbytes() - before)
    return found


def measure(python: str, library: str, stage: int, numel: int, folder: Path, repeats: int) -> dict[str, float]:
    """Run `worker` on two ranks and return rank 0's figures."""
    with tempfile.TemporaryDirectory() as meeting:
        ranks = []
        arguments = [library, str(stage), str(numel), str(folder), str(repeats)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(WORLD):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1"}
            env = {**os.environ, **{k: str(v) for k, v in world.items()}, "MASTER_PORT": str(port)}
            env.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
            out = Path(meeting) / str(rank)
            with out.open("w") as log:
                command = [python, __file__, "--worker", *arguments, str(Path(meeting) / "figures")]
                ranks.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), out))
        for process, out in ranks:
            if process.wait() != 0:
                raise SystemExit(out.read_text()[-3000:])
        return json.loads((Path(meeting) / "figures").read_text())


def raw_rate(nbytes: int, folder: Path) -> float:
    """Bytes per second of two processes that write and fsync as much."""
    code = (
        "import os, sys\nb = os.urandom(1 << 23)\nf = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "for _ in range(int(sys.argv[2]) >> 23): os.write(f, b)\nos.fsync(f)"
    )
    os.sync()
    start = time.perf_counter()
    share = nbytes // WORLD
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder / f"raw{i}"), str(share)]) for i in range(WORLD)
    ]
    for writer in writers:
        writer.wait()
    taken = time.perf_counter() - start
    for number in range(WORLD):
        (folder / f"raw{number}").unlink()
    return nbytes / taken


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--dir", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--millions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as base:
        for millions in options.millions:
            for stage in options.stages:
                for library, python in (("ours", sys.executable), ("DeepSpeed", options.peer_python)):
                    if python is None:
                        continue
                    size = (millions << 20, Path(base) / "ckpt", options.repeats)
                    found = measure(python, library, stage, *size)
                    raw = max(raw_rate(int(found["nbytes"]), Path(base)) for _ in range(2))
                    print_json(library=library, stage=stage, millions=millions, raw_bytes_per_s=raw, **found)
                    durable = found["nbytes"] / found["durable_s"]
                    rows.append(
                        [
                            f"{millions} M",
                            stage,
                            library,
                            f"{found['nbytes'] / GIB:.2f}",
                            f"{raw / GIB:.2f}",
                            f"{durable / GIB:.2f} ({durable / raw:.2f})",
                            f"{found['durable_s']:.2f}",
                            f"{found['save_s']:.2f}",
                            f"{found['stall_s']:.2f}" if "stall_s" in found else "",
                            f"{found['load_s']:.2f}",
                            f"{found['growth_nbytes'] / GIB:.2f}",
                        ]
                    )
    head = [
        "Size",
        "Stage",
        "",
        "GiB",
        "disk GiB/s",
        "durable GiB/s (of the disk's)",
        "durable s",
        "no fsync s",
        "async stall s",
        "load s",
        "load peak GiB",
    ]
    print_table("Checkpoints, bf16 and AdamW, 2 ranks", head, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        library, stage, numel, folder, repeats, out = sys.argv[2:]
        figures = worker(library, int(stage), int(numel), Path(folder), int(repeats))
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(figures))
        os._exit(0)  # DeepSpeed's threads abort the process while the interpreter ends
    else:
        main()
