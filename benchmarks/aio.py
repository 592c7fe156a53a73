"""Reading and writing a file past the page cache: async_io's engines beside fio's same ones and DeepSpeed's async_io.

    python benchmarks/aio.py --path DIR [--peer-python ENV/bin/python]

One file, which is there before the first turn, is read and written over from beginning to end by all contenders in
turns, with O_DIRECT and the same block size and depth. fio keeps its own time, without its start. async_io and
DeepSpeed move the whole file in one request, from or to memory of its size that begins at a page (*unaligned*: that
does not). fio uses as much memory as there is under way, over and over, which stays in the processor's cache; *small
buffer* does so too, with a request for each time around. fio's psync is one thread for each block under way, each with
its part of the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from machine import print_json, print_table

ROOT = Path(__file__).resolve().parent.parent
FIO = {"io_uring": "io_uring", "aio": "libaio", "threads": "psync"}  # ours -> its name for the same
LEAST = 0.95  # of fio's rate
Turn = Callable[[str], float]  # "read" or "write" -> seconds


def fio_turns(names: Iterable[str], file: str, options: argparse.Namespace) -> dict[str, Turn]:
    """By name, fio's engines that are the same as ours of these names."""
    if not shutil.which("fio"):
        print("fio is not measured: it is not installed")
        return {}
    from deepspeedlite.tools.io_tune import Setting, fio_seconds

    settings = {FIO[name]: Setting(name, options.block_bytes, options.depth) for name in names if name in FIO}
    return {
        f"fio {engine}": lambda what, setting=setting: fio_seconds(setting, what, file, options.file_bytes)
        for engine, setting in settings.items()
    }


def ours(file: str, options: argparse.Namespace) -> dict[str, Turn]:
    """By name, every engine that there is."""
    import torch

    from deepspeedlite.ops.aio import ENGINES, aio_handle
    from deepspeedlite.runtime.errors import OpError

    turns: dict[str, Turn] = {}
    memory = None
    small_bytes = options.block_bytes * options.depth
    for name in (*ENGINES, *(f"{engine}, small buffer" for engine in ENGINES), "io_uring, unaligned"):
        try:
            handle = aio_handle(options.block_bytes, options.depth, overlap_events=True, engine=name.split(",")[0])
        except OpError as error:
            print(f"not measured: {error}")
            continue
        if memory is None:
            memory = handle.new_cpu_locked_tensor(options.file_bytes + 1, torch.empty(0, dtype=torch.uint8))
            memory.random_(0, 256, generator=torch.Generator().manual_seed(0))
            handle.write(memory[:-1], file, False)
        if "small buffer" in name:
            turns[name] = over_and_over(handle, memory[:small_bytes].clone(), file, options.file_bytes)
            continue
        buffer = memory[1:] if "unaligned" in name else memory[:-1]
        turns[name] = timed(handle, buffer, file)
        expected = zlib.crc32(buffer.numpy())
        turns[name]("write")
        buffer.zero_()
        turns[name]("read")
        if zlib.crc32(buffer.numpy()) != expected:
            raise SystemExit(f"{name} did not read what it had written")
    return turns


def over_and_over(handle: object, like: object, file: str, file_bytes: int) -> Turn:
    """A turn through one buffer, with the content of `like`, for all of the file."""
    buffer = handle.new_cpu_locked_tensor(like.numel(), like).copy_(like)  # type: ignore[attr-defined]

    def turn(what: str) -> float:
        call = handle.async_pread if what == "read" else handle.async_pwrite  # type: ignore[attr-defined]
        started_s = time.perf_counter()
        for offset in range(0, file_bytes, buffer.numel()):
            call(buffer, file, offset)
        handle.wait()  # type: ignore[attr-defined]
        return time.perf_counter() - started_s

    return turn


def timed(handle: object, buffer: object, file: str) -> Turn:
    """A turn of a handle with DeepSpeed's methods."""

    def turn(what: str) -> float:
        call = handle.sync_pread if what == "read" else handle.sync_pwrite  # type: ignore[attr-defined]
        started_s = time.perf_counter()
        call(buffer, file)
        return time.perf_counter() - started_s

    return turn


def peer_worker(file: str, options: argparse.Namespace) -> None:
    """DeepSpeed's process: seconds of each turn that it is told to take."""
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    module = AsyncIOBuilder().load(verbose=False)
    handle = module.aio_handle(options.block_bytes, options.depth, False, True, 1)
    buffer = handle.new_cpu_locked_tensor(options.file_bytes, torch.empty(0, dtype=torch.uint8))
    turn = timed(handle, buffer.random_(0, 256), file)
    turn("read")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"s": turn(line.strip())}), flush=True)


class Peer:
    """DeepSpeed in the environment of `python`, or, in `missing`, why it is left out."""

    def __init__(self, python: str, file: str, options: argparse.Namespace) -> None:
        command = [python, __file__, "--worker", file, "--block-bytes", str(options.block_bytes)]
        command += ["--depth", str(options.depth), "--file-bytes", str(options.file_bytes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.missing = "" if self._reply() else "its async_io cannot be compiled or run here; see above"

    def turn(self, what: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        reply = self._reply()
        if reply is None:
            raise SystemExit("DeepSpeed's process ended; see above")
        return float(reply["s"])

    def _reply(self) -> dict | None:
        assert self.process.stdout is not None
        return next((json.loads(line) for line in self.process.stdout if line.startswith("{")), None)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def report(times: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """A table, and whether the limits are met."""
    shape = f"{options.file_bytes >> 20} MiB in blocks of {options.block_bytes >> 10} KiB, {options.depth} under way"
    for what, found in times.items():
        rates = {name: options.file_bytes / statistics.median(seconds) / 1e6 for name, seconds in found.items()}
        rows = []
        for name, seconds in found.items():
            engine = name.split(",")[0]
            fio = rates.get(f"fio {FIO.get(engine, '')}")
            ratio = f"{rates[name] / fio:.3f}" if fio else ""
            low, high = (options.file_bytes / limit(seconds) / 1e6 for limit in (max, min))
            rows.append([name, f"{rates[name]:.0f}", f"{low:.0f}", f"{high:.0f}", ratio])
            if fio and "unaligned" not in name:
                verdict = "met" if rates[name] >= LEAST * fio else "MISSED"
                print_json(what=what, mine=name, at_least=LEAST, ratio=round(rates[name] / fio, 4), verdict=verdict)
        if "DeepSpeed" in rates:
            best = max((name for name in rates if name in FIO), key=lambda name: rates[name])
            print_json(what=what, mine=best, peer="DeepSpeed", ratio=round(rates[best] / rates["DeepSpeed"], 4))
        print_table(f"To {what} {shape}", ["who", "median MB/s", "min", "max", "of fio's same engine"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="a folder on the disk to measure (default: this one)")
    parser.add_argument("--peer-python", help="the Python of an environment that has the real DeepSpeed")
    parser.add_argument("--file-bytes", type=int, default=2 << 30)
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        peer_worker(options.worker, options)
        return
    if options.file_bytes % (options.block_bytes * options.depth):
        parser.error("--file-bytes must be a multiple of --block-bytes times --depth")
    with tempfile.TemporaryDirectory(dir=options.path) as folder:
        measure(str(Path(folder, "file").resolve()), options)


def measure(file: str, options: argparse.Namespace) -> None:
    """All contenders in turns."""
    sys.path.insert(0, str(ROOT))
    contenders = ours(file, options)
    contenders |= fio_turns(list(contenders), file, options)
    peer = Peer(options.peer_python, file, options) if options.peer_python else None
    if peer and peer.missing:
        print(f"DeepSpeed is not measured: {peer.missing}")
    elif peer:
        contenders["DeepSpeed"] = peer.turn
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in contenders} for what in ("read", "write")}
    for number in range(options.rounds):
        for what, found in times.items():
            names = list(contenders)
            for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
                found[name].append(contenders[name](what))
    if peer:
        peer.end()
    report(times, options)


if __name__ == "__main__":
    main()
