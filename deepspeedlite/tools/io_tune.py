"""`dslite_io` (or `python -m deepspeedlite.io`): how fast a disk is for async_io, and which settings are best there.

    dslite_io tune --path DIR     # tries engines, block sizes and depths; prints the `aio` section to paste
    dslite_io bench --path DIR    # one setting, beside fio where that is installed

Both write and read a file of their own in DIR, past the page cache, and compare what they read with what they wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deepspeedlite.host.text import parse_size, print_table, size_text
from deepspeedlite.runtime.errors import OpError

if TYPE_CHECKING:
    from torch import Tensor

FIO_ENGINES = {"io_uring": "io_uring", "aio": "libaio", "threads": "psync"}  # ours -> fio's name for the same
# Settings whose rate is so near to the best are as good: of them, the one whose blocks under way take the least memory.
AS_GOOD = 0.97
CACHED = "This file system has no O_DIRECT: these are the rates of the page cache, not of a disk."


@dataclass(frozen=True)
class Setting:
    """What `aio_handle` is given, with overlap_events; all else being its default."""

    engine: str
    block_bytes: int
    queue_depth: int


@dataclass
class Times:
    """Seconds that each turn of a setting took for the whole file."""

    nbytes: int
    read_s: list[float] = field(default_factory=list)
    write_s: list[float] = field(default_factory=list)

    def rate(self, what: str) -> float:
        """MB/s by the median: of "read", "write", or "both", one after the other."""
        times_s = {"read": self.read_s, "write": self.write_s}
        chosen = [statistics.median(found) for name, found in times_s.items() if what in (name, "both")]
        return len(chosen) * self.nbytes / sum(chosen) / 1e6


def bytes_of(text: str) -> int:
    """`1048576`, `1024K`, `1M`, `2G`: a number of bytes.

    Raises:
        argparse.ArgumentTypeError: it is no such text.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is no such text.
    """
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


class Disk:
    """A file in a folder, and memory as long as it, to write and read it with any setting.

    Args:
        folder: where the file is, alone in a folder that is removed at the end.
        nbytes: of the file.

    Raises:
        OpError: the folder cannot be written, or has no room.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        import torch

        from deepspeedlite.ops.aio import aio_handle

        try:
            free_bytes = shutil.disk_usage(folder).free
            if free_bytes < 1.1 * nbytes:
                raise OpError(
                    f"{folder} has {free_bytes} bytes left, and the file takes {nbytes}: give a smaller --size"
                )
            self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="dslite_io-")
        except OSError as error:
            raise OpError(f"{folder} cannot be written: {error.strerror}; name a folder of your own: --path") from error
        self.file = os.path.join(os.path.realpath(self._folder.name), "file")
        self.nbytes = nbytes
        self.cached = False  # whether something went through the page cache: then rates are not the disk's
        handle, example = aio_handle(), torch.empty(0, dtype=torch.uint8)
        self._written: Tensor = handle.new_cpu_locked_tensor(nbytes, example).random_(0, 256)
        self._read: Tensor = handle.new_cpu_locked_tensor(nbytes, example).zero_()
        handle.sync_pwrite(self._written, self.file)  # a new file's first writing is slower than its later ones

    def close(self) -> None:
        """Remove the file."""
        self._folder.cleanup()

    def turn(self, setting: Setting, times: Times) -> None:
        """Write the file with new content and read it, once.

        Raises:
            OpError: what was read is not what was written, or moving it failed.
        """
        from deepspeedlite.ops.aio import aio_handle

        handle = aio_handle(setting.block_bytes, setting.queue_depth, overlap_events=True, engine=setting.engine)
        self._written.add_(1)
        times.write_s.append(_seconds(lambda: handle.sync_pwrite(self._written, self.file)))
        self._read.zero_()
        times.read_s.append(_seconds(lambda: handle.sync_pread(self._read, self.file)))
        if not self._read.equal(self._written):
            raise OpError(f"{self.file}: what was read is not what was written, by {setting}; do not trust this disk")
        self.cached |= handle.get_counts()["direct"] == 0
        handle.close()


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def fio_seconds(setting: Setting, what: str, file: str, nbytes: int) -> float:
    """What fio tells for reading or writing all of a file of `nbytes`, with its engine that is the same as ours.

    Its psync is one thread for each block under way, each with its part of the file.

    Raises:
        OpError: fio failed, or moved another number of bytes.
    """
    engine = FIO_ENGINES[setting.engine]
    jobs, depth = (setting.queue_depth, 1) if engine == "psync" else (1, setting.queue_depth)
    part_bytes = nbytes // jobs
    command = ["fio", "--name=turn", f"--filename={file}", f"--rw={what}", f"--ioengine={engine}", "--direct=1"]
    command += [f"--bs={setting.block_bytes}", f"--iodepth={depth}", f"--size={part_bytes}", f"--numjobs={jobs}"]
    command += [f"--offset_increment={part_bytes}", "--thread", "--group_reporting", "--overwrite=1"]
    command += ["--scramble_buffers=0", "--end_fsync=0", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode != 0:
        raise OpError(f"fio failed, called as {' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][what]
    if found["io_bytes"] != nbytes:
        raise OpError(f"fio moved {found['io_bytes']} bytes of {nbytes}, called as {' '.join(command)}")
    return nbytes / found["bw_bytes"]


def best_of(found: dict[Setting, Times], what: str) -> Setting:
    """The setting to take: of those about as fast as the fastest, the one with the least memory under way."""
    fastest = max(times.rate(what) for times in found.values())
    good = [setting for setting, times in found.items() if times.rate(what) >= AS_GOOD * fastest]
    return min(good, key=lambda setting: (setting.block_bytes * setting.queue_depth, setting.queue_depth))


def engines_here() -> list[str]:
    """Names of the engines that this kernel has, the best first."""
    from deepspeedlite.ops.aio import ENGINES, aio_handle

    def works(engine: str) -> bool:
        try:
            aio_handle(engine=engine).close()
        except OpError:
            return False
        return True

    found = [engine for engine in ENGINES if works(engine)]
    if not found:
        aio_handle()  # raises the reason
    return found


# --- commands ---------------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace) -> None:
    """Try all settings in turns, `args.repeats` times; print the table, and the section to paste."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    engines = args.engines or engines_here()
    settings = [Setting(*each) for each in itertools.product(engines, args.block_sizes, args.depths)]
    disk = Disk(args.path, args.size)
    notes = Console(stderr=True)
    written_gb = (len(settings) * args.repeats + 1) * args.size / 1e9
    notes.print(f"{len(settings)} settings, {args.repeats} times: writes {written_gb:.1f} GB to {args.path}")
    found = {setting: Times(args.size) for setting in settings}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=notes, transient=True) as progress:
            task = progress.add_task("", total=len(settings) * args.repeats)
            for setting in settings * args.repeats:
                text = f"{setting.engine} {size_text(setting.block_bytes)} x {setting.queue_depth}"
                progress.update(task, description=f"{text:<22}")
                disk.turn(setting, found[setting])
                progress.advance(task)
    finally:
        disk.close()
    best = best_of(found, args.best_for)
    if args.json:
        for setting, times in found.items():
            print(json.dumps({**vars(setting), **{f"{what}_mb_per_s": times.rate(what) for what in ("read", "write")}}))
    else:
        _print_table(found, best, args)
    _print_section(best, engines_here()[0], disk.cached, args)


def _print_table(found: dict[Setting, Times], best: Setting, args: argparse.Namespace) -> None:
    order = sorted(found, key=lambda setting: -found[setting].rate(args.best_for))
    fastest = found[order[0]].rate(args.best_for)
    shown = order if args.all else [*order[: args.top], *([] if best in order[: args.top] else [best])]
    right = ("block", "depth", "read", "write")
    rows = []
    for setting in shown:
        times = found[setting]
        bar = "█" * round(24 * times.rate(args.best_for) / fastest)
        words = [setting.engine, size_text(setting.block_bytes), str(setting.queue_depth)]
        words += [f"{times.rate('read'):.0f}", f"{times.rate('write'):.0f}", bar]
        rows.append(words)
    title = f"MB/s, {len(shown)} of {len(found)} settings"
    head = ("engine", *right, args.best_for)
    print_table(head, rows, right=right, title=title, boxed=True, bold=[shown.index(best)])


def _print_section(best: Setting, first_engine: str, cached: bool, args: argparse.Namespace) -> None:
    section = {"block_size": best.block_bytes, "queue_depth": best.queue_depth, "intra_op_parallelism": 1}
    section |= {"single_submit": False, "overlap_events": True}
    if not args.json:
        print(f"The least memory under way within {1 - AS_GOOD:.0%} of the best for {args.best_for}:\n")
    print(json.dumps({"aio": section}, indent=None if args.json else 2))
    if best.engine != first_engine:
        print(
            f"\nIts engine is not the one that is taken by itself: export DSL_AIO_ENGINE={best.engine}", file=sys.stderr
        )
    if cached:
        print(f"\n{CACHED}", file=sys.stderr)


def bench(args: argparse.Namespace) -> None:
    """One setting by every engine, in turns with fio."""
    with_fio = shutil.which("fio") is not None
    settings = [Setting(engine, args.block_size, args.depth) for engine in args.engines or engines_here()]
    whole_bytes = args.block_size * args.depth  # fio's threads have parts of whole blocks
    nbytes = -(-args.size // whole_bytes) * whole_bytes
    ours = {setting: Times(nbytes) for setting in settings}
    theirs = {setting: Times(nbytes) for setting in settings if with_fio}
    disk = Disk(args.path, nbytes)
    try:
        for setting in settings * args.repeats:
            disk.turn(setting, ours[setting])
            if with_fio:
                theirs[setting].write_s.append(fio_seconds(setting, "write", disk.file, nbytes))
                theirs[setting].read_s.append(fio_seconds(setting, "read", disk.file, nbytes))
    finally:
        disk.close()
    rows = list(_bench_rows(ours, theirs))
    if args.json:
        for row in rows:
            print(json.dumps(dict(zip(("engine", "what", "mb_per_s", "fio_mb_per_s", "ratio"), row))))
        return
    title = f"MB/s in blocks of {size_text(args.block_size)}, {args.depth} under way"
    shown = [
        (engine, what, f"{mine:.0f}", f"{fio:.0f}" if fio else "-", f"{ratio:.2f}" if ratio else "-")
        for engine, what, mine, fio, ratio in rows
    ]
    print_table(("engine", "", "async_io", "fio", "ratio"), shown, title=title, boxed=True)
    if not with_fio:
        print("fio is not installed, so there is nothing to compare with.", file=sys.stderr)
    if disk.cached:
        print(CACHED, file=sys.stderr)


def _bench_rows(
    ours: dict[Setting, Times], theirs: dict[Setting, Times]
) -> Iterator[tuple[str, str, float, float | None, float | None]]:
    for setting, times in ours.items():
        for what in ("read", "write"):
            fio = theirs[setting].rate(what) if setting in theirs else None
            yield setting.engine, what, times.rate(what), fio, times.rate(what) / fio if fio else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 where something cannot be had or a disk does not keep its data."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except OpError as error:
        print(f"dslite_io: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dslite_io", description="How fast a disk is for async_io.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, summary in ((tune, "try settings; print the best `aio` section"), (bench, "one setting, beside fio")):
        command = commands.add_parser(run.__name__, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("--path", metavar="DIR", default=".", help="a folder on the disk (the current one)")
        command.add_argument("--size", metavar="BYTES", type=bytes_of, default=256 << 20, help="of the file (256M)")
        command.add_argument("--engines", metavar="NAME", nargs="+", choices=FIO_ENGINES, help="(all that there are)")
        command.add_argument("--repeats", metavar="N", type=count, default=3, help="turns of each setting (3)")
        command.add_argument("--json", action="store_true", help="a JSON object in each line instead of a table")
        if run is tune:
            sizes, depths = [128 << 10, 512 << 10, 1 << 20, 4 << 20], [4, 8, 16, 32]
            command.add_argument("--block-sizes", metavar="BYTES", nargs="+", type=bytes_of, default=sizes)
            command.add_argument("--depths", metavar="N", nargs="+", type=count, default=depths)
            command.add_argument("--best-for", choices=("read", "write", "both"), default="both")
            command.add_argument("--top", metavar="N", type=count, default=10, help="settings to show (10)")
            command.add_argument("--all", action="store_true", help="show all settings")
        else:
            command.add_argument("--block-size", metavar="BYTES", type=bytes_of, default=1 << 20, help="(1M)")
            command.add_argument("--depth", metavar="N", type=count, default=8, help="(8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
