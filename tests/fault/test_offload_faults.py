"""Disks that fill up or break in the middle of a step, runs that are killed, models that do not fit into memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest
from limits import memory_group
from programs import needs, program

pytestmark = [pytest.mark.slow, needs("c++")]  # each starts processes of its own

# A training in a process of its own; `sizes` are the widths of its linear layers.
COMMON = """
import ctypes, errno, os, sys, torch
import deepspeedlite
from deepspeedlite.runtime.errors import EngineStateError, OffloadError

def engine_of(sizes, path, stage=3, dtype="bf16", **more):
    made_in = torch.bfloat16 if dtype == "bf16" else None
    layers = [torch.nn.Linear(a, b, dtype=made_in) for a, b in zip(sizes, sizes[1:])]
    disk = {"device": "nvme", "nvme_path": path}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
    if path:
        zero["offload_optimizer"] = disk
        zero["offload_param"] = {**disk, "max_in_cpu": 0, "buffer_count": 2}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
    }
    return deepspeedlite.initialize(model=torch.nn.Sequential(*layers), config=config)[0]

def train(engine, steps):
    losses = []
    for step in steps:
        x = torch.randn(2, engine.module[0].in_features, generator=torch.Generator().manual_seed(step))
        loss = engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
"""


def run_forked(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(COMMON + textwrap.dedent(code), *arguments, folder=folder, timeout_s=120)


def run(code: str, *arguments: object, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMON + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


@contextmanager
def small_disk(path: Path, mib: int) -> Iterator[Path]:
    """A file system of its own, which can be filled."""
    path.mkdir()
    program("mount")
    if os.geteuid() != 0:
        pytest.skip("a full disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs mount: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


# --- disks that fill up and break -------------------------------------------------------------------------------------

FILLS_UP = """
path, checkpoint = sys.argv[1:]
torch.manual_seed(0)
expected = train(engine_of([512] * 9, "/tmp"), range(4))
torch.manual_seed(0)
engine = engine_of([512] * 9, path)     # 4 MiB of parameters, 8 of masters; 16 of moments that the first step makes
engine.save_checkpoint(checkpoint)
filler = open(path + "/filler", "wb")
os.posix_fallocate(filler.fileno(), 0, 5 << 20)
try:
    train(engine, range(1))
    sys.exit("nothing happened")
except OffloadError as error:
    print(error)
for call in (lambda: train(engine, range(1)), lambda: engine.save_checkpoint(checkpoint)):
    try:
        call()
        sys.exit("the half-made step was not noticed")
    except EngineStateError as error:
        print(error)
os.unlink(path + "/filler")
filler.close()
engine.load_checkpoint(checkpoint)
assert train(engine, range(4)) == expected
"""


def test_a_disk_that_is_full_in_the_middle_of_a_step(tmp_path):
    with small_disk(tmp_path / "disk", 30) as path:
        done = run_forked(FILLS_UP, path, tmp_path / "checkpoints", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    full, *refused = done.stdout.splitlines()
    assert re.match(rf"{path} has no room for [\d.]+ MiB more \(No space left on device; this rank has ", full)
    assert [re.match(r"engine.(\w+)\(\): a step ended half-way", line).group(1) for line in refused] == [
        "forward",
        "save_checkpoint",
    ]


def test_a_disk_that_is_too_small_from_the_start(tmp_path):
    with small_disk(tmp_path / "disk", 5) as path:
        done = run_forked("engine_of([512] * 9, sys.argv[1])", path, folder=tmp_path)
    assert done.returncode == 1 and f"OffloadError: {path} has no room for" in done.stderr


BREAKS = """
faults = ctypes.CDLL(None)
path, checkpoint = sys.argv[1:]
def fresh():
    torch.manual_seed(0)
    return engine_of([64] * 5, path, sub_group_size=1024)
engine = fresh()
engine.save_checkpoint(checkpoint)
expected = train(engine, range(3))
failures = 0
for every in range(1, 200, int(os.environ["STRIDE"])):
    engine.load_checkpoint(checkpoint)
    faults.faults_every(every, errno.EIO, 1)
    try:
        found = train(engine, range(3))
        assert found == expected and faults.faults_hit() == 0, (every, found)
        print("passed", every)
    except OffloadError as error:
        failures += 1
        assert path in str(error) and "Input/output error" in str(error) and "go on from the last" in str(error), error
        faults.faults_every(0, 0, 0)
        if "half-way" in engine.optimizer.broken:
            try:
                engine.save_checkpoint(checkpoint)
                sys.exit("a half-made step was saved")
            except EngineStateError:
                pass
        engine.destroy()  # of a run that broke while values were gathered
        engine = fresh()
    faults.faults_every(0, 0, 0)
    engine.load_checkpoint(checkpoint)
    assert train(engine, range(3)) == expected, every
assert failures
"""


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_an_error_at_any_transfer_is_told_and_costs_the_step_alone(engine, aio_faults, tmp_path):
    (tmp_path / "disk").mkdir()
    environ = {**os.environ, "LD_PRELOAD": str(aio_faults), "DSL_AIO_ENGINE": engine, "STRIDE": "7"}
    done = run(BREAKS, tmp_path / "disk", tmp_path / "checkpoints", env=environ, timeout=300)
    assert done.returncode == 0, done.stderr


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
path, checkpoint, steps = sys.argv[1:]
torch.manual_seed(0)
engine = engine_of([512] * 9, path)
engine.load_checkpoint(checkpoint)
for step in range(engine.global_steps, int(steps)):
    print(step, train(engine, range(step, step + 1))[0], flush=True)
    if step % 2 == 0:
        engine.save_checkpoint(checkpoint)
"""


def free_nbytes(path: Path) -> int:
    about = os.statvfs(path)
    return about.f_bavail * about.f_frsize


def until(condition: Callable[[], bool], limit_s: float = 60.0, poll_s: float = 0.02) -> None:
    """Wait for what happens by itself."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(poll_s)


def test_a_killed_run_leaves_nothing_and_goes_on_from_its_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", 100) as path:
        before = free_nbytes(path)
        whole = run_forked(KILLED, path, tmp_path / "whole", 6, folder=tmp_path)
        assert whole.returncode == 0, whole.stderr
        expected = dict(line.split() for line in whole.stdout.splitlines())
        found: dict[str, str] = {}
        for delay in (0.0, 0.005, 0.02, 0.05):  # after a line: in the next step, most of which is the disk's work
            told = tmp_path / f"told{delay}"
            arguments = (path, tmp_path / "killed", 6)
            process = forked.start(COMMON + KILLED, *arguments, stdout=told, stderr=tmp_path / "stderr")
            until(lambda told=told: told.exists() and "\n" in told.read_text(), poll_s=0.001)
            time.sleep(delay)
            process.kill()
            process.join()
            found.update(line.split() for line in told.read_text().splitlines(keepends=True) if line.endswith("\n"))
            assert list(path.iterdir()) == []
            until(lambda: free_nbytes(path) == before)  # the kernel ends what was under way by itself
        last = run_forked(KILLED, path, tmp_path / "killed", 6, folder=tmp_path)
        assert last.returncode == 0, last.stderr
        found.update(line.split() for line in last.stdout.splitlines())
        assert found == expected


def test_two_runs_on_one_path_do_not_meet(tmp_path):
    alone = run_forked(KILLED, tmp_path, tmp_path / "alone", 3, folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    told = [tmp_path / f"told{number}" for number in range(2)]
    together = [
        forked.start(COMMON + KILLED, tmp_path, tmp_path / str(number), 3, stdout=told[number], stderr=tmp_path / "err")
        for number in range(2)
    ]
    for process in together:
        process.join(120)
    assert [file.read_text() for file in told] == [alone.stdout] * 2


# --- memory -----------------------------------------------------------------------------------------------------------

LIMITED = """
group, path, layers = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
engine = engine_of([64, 64], path)  # torch and the op have been loaded
train(engine, range(1))
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
torch.manual_seed(0)
engine = engine_of(
    [2048] * (int(layers) + 1),
    path,
    sub_group_size=1 << 20,
    stage3_max_reuse_distance=0,
    stage3_prefetch_bucket_size=2048**2,
)
print(*train(engine, range(3)))
disk = engine._parts.offload.swap_file
print(sum(unit.layout.numel for unit in engine._reducer.units), disk.nbytes if disk else 0)
"""


def test_a_model_whose_states_are_four_times_the_memory_trains(tmp_path):
    """Memory counted from before the model is made: what Python and torch take is outside the group."""
    limit_mib, layers = 512, 32
    with memory_group(limit_mib) as group:
        done = run(LIMITED, group, tmp_path, layers, timeout=400)
    assert done.returncode == 0, done.stderr
    losses, sizes = done.stdout.splitlines()
    numel, on_disk = map(int, sizes.split())
    states = numel * 16  # bf16 values and gradients, fp32 masters and two moments
    assert states >= 4 * (limit_mib << 20)
    assert on_disk >= numel * 14
    in_memory = run(LIMITED, "", "", layers, timeout=200)
    assert in_memory.stdout.splitlines()[0] == losses, in_memory.stderr
