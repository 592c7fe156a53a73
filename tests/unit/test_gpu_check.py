"""`make gpu-check` where no GPU is: every phase's code with the CPU as its device, its runner, its judgements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from paths import ROOT

sys.path.append(str(ROOT))
from deepspeedlite.runtime.device import Device
from tools.gpu_check import sanitizer
from tools.gpu_check.kernels import of_process, of_tests
from tools.gpu_check.largest import SHARES, largest_share
from tools.gpu_check.overlap import count, judge_collectives, judge_copies
from tools.gpu_check.phases import PHASES, Phase
from tools.gpu_check.report import FAILED, GOOD, NOT_RUN, Report, Row
from tools.gpu_check.runner import Runner
from tools.gpu_check.setting import NotHereError, Setting


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting("kernels", Device(torch.device("cpu")), 0, 2, True, time.monotonic() + 60, tmp_path)


# All phases in one process, which imports torch and transformers once.
EVERY_PHASE = """
import importlib, json, os, sys, time, tempfile
from dataclasses import asdict
from pathlib import Path
from tools.gpu_check import worker
worker.use_device("cpu", 0)
worker.settle(True)
from deepspeedlite.runtime.device import pick_device
from tools.gpu_check.setting import Setting
with tempfile.TemporaryDirectory() as folder:
    for phase in sys.argv[1:]:
        setting = Setting(phase, pick_device(0), 0, 1, True, time.monotonic() + 200, Path(folder))
        for row in importlib.import_module(f"tools.gpu_check.{phase}").rows(setting):
            print(worker.MARK + json.dumps(asdict(row)), flush=True)
worker.leave()
"""


@pytest.mark.slow
def test_every_phase_runs_with_the_cpu_as_its_device(free_port):
    names = [phase.name for phase in PHASES if not phase.compiles]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERY_PHASE, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    rows = [
        json.loads(line.partition(": ")[2]) for line in done.stdout.splitlines() if line.startswith("gpu-check row")
    ]
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["phase"] for row in rows} == set(names)
    assert not [row for row in rows if row["state"] == FAILED], done.stderr[-3000:]
    not_run = {row["phase"] for row in rows if row["state"] == NOT_RUN}
    assert not_run <= {"overlap", "training", "inference"}, (
        "no kernels in a trace, no DeepSpeed, perhaps no transformers"
    )
    by_name = {(row["phase"], row["what"]): row["figures"] for row in rows}
    assert by_name["training", "ours, stage 3"]["tokens_per_s"] > 0
    assert by_name["parity", "stage 3, fp32, all on the host"]["loss_moved"] > 0.01
    assert by_name["optimizers", "FusedAdam"]["of_copy"] > 0
    assert by_name["largest", "stage 2"]["share"] == SHARES[0]


@pytest.mark.slow
def test_without_an_accelerator_it_says_what_it_would_do(tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tools.gpu_check", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stderr
    assert all(f"  {phase.name:12}{phase.usual_s:4} s" in done.stdout for phase in PHASES)
    rows = json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    assert {row["phase"] for row in rows} == {"here"} and "| here | torch | ok |" in (
        tmp_path / "gpu-check.md"
    ).read_text()


def test_what_fails_hangs_or_has_no_time_left_stops_nothing(tmp_path):
    report = Report(tmp_path)
    runner = Runner(report, "cpu", True, time.monotonic() + 100, 1)
    runner.run(Phase("no_such_phase", "", 1, 60))
    runner.run(Phase("inference", "", 1, 0.2))
    runner.run(Phase("kernels", "", 1, 60, compiles=True))
    Runner(report, "cpu", True, time.monotonic(), 1).run(PHASES[0])
    rows = [(row.phase, row.state) for row in report.rows]
    assert rows == [
        ("no_such_phase", FAILED),
        ("inference", FAILED),
        ("kernels", NOT_RUN),
        ("here", NOT_RUN),
    ]
    notes = [row.note for row in report.rows]
    assert "No module named" in notes[0] and "after 0 s" in notes[1] and "budget" in notes[3]
    assert len(json.loads(report.json.read_text())["rows"]) == 4 and report.failed


def test_pytests_results_are_rows(setting, tmp_path):
    """In this process's own pytest, as the phase has it in its."""
    file = tmp_path / "test_some.py"
    tests = ("def test_a(): pass", "def test_b(): assert 1 == 2", "def test_c(): pytest.skip('no')")
    file.write_text("\n".join(("import pytest", *tests)))
    rows = list(of_tests(setting, [], [str(file)]))
    assert [(row.what, row.state) for row in rows] == [("test_b", FAILED), ("elsewhere", FAILED)]
    assert "1 == 2" in rows[0].note and rows[1].figures == {"passed": 1, "failed": 1, "skipped": 1}
    nothing = list(of_tests(setting, ["-k", "nothing"], [str(file)]))
    assert [row.state for row in nothing] == [FAILED] and "5" in nothing[0].note


def test_a_file_of_tests_runs_in_a_process_of_its_own(setting, tmp_path):
    states = []
    for name, body in (("right", "pass"), ("deadly", "import os; os._exit(7)")):
        file = tmp_path / f"test_{name}.py"
        file.write_text(f"def test_it(): {body}\n")
        states += of_process(setting, {"phase": "kernels", "arguments": [], "file": str(file)})
    assert [(row.what, row.state) for row in states] == [("elsewhere", GOOD), ("test_deadly.py", FAILED)]
    assert "status 7" in states[1].note


@pytest.mark.parametrize(("ending", "state"), [("exit 9", FAILED), ("exit 0", GOOD)])
def test_what_a_sanitizer_finds_is_a_failure(setting, tmp_path, monkeypatch, ending, state):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho $1 $2\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    rows = list(sanitizer.rows(setting))
    assert [(row.what, row.state) for row in rows] == [("memcheck", state), ("racecheck", state)]
    assert "--tool memcheck" in rows[0].note + str(rows[0].figures)


def event(category: str, name: str, stream: int, begin: float, duration: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "args": {"stream": stream}}


def test_overlap_is_counted(setting):
    compute = [event("kernel", "gemm", 7, 10 * i, 8) for i in range(4)]
    beside = [
        event("kernel", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 9, 11, 3),
        {
            **event("kernel", "ncclDevKernel_Generic", 9, 21, 3),
            "args": {"stream": 9, "Collective name": "_reduce_scatter_base"},
        },
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 11, 5, 1),
    ]
    alone = [
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 9, 100, 3),
        event("kernel", "ncclDevKernel_ReduceScatter", 9, 110, 3),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 7, 1, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 0, 1),
        event("cpu_op", "aten::mm", 1, 0, 50),
    ]
    counts = count([*compute, *beside, *alone])
    assert counts == (2, 1, 2, 1, 2, 1, 4, 1)
    judge_collectives(counts, setting)
    judge_copies(counts, setting)
    late = count([*compute, *alone])
    with pytest.raises(AssertionError, match="gathers wait"):
        judge_collectives(late, setting)
    with pytest.raises(AssertionError, match="copies wait"):
        judge_copies(late, setting)
    with pytest.raises(AssertionError, match="too often"):
        judge_collectives(counts._replace(syncs=1000), setting)
    with pytest.raises(NotHereError, match="one rank"):
        judge_collectives(counts, Setting("overlap", setting.device, 0, 1, True, 0.0, setting.folder))


def test_the_largest_is_the_first_that_does_not_run_out_of_memory(setting):
    tried = []

    def trains(share: float) -> None:
        tried.append(share)
        if share > 0.8:
            raise torch.OutOfMemoryError("as it would be said")

    assert largest_share(trains, setting) == 0.8 and tried == [1.1, 1.0, 0.9, 0.8]

    def never(share: float) -> None:
        raise torch.OutOfMemoryError("always")

    assert largest_share(never, setting) == 0.0


def test_a_failure_is_a_row(setting):
    row = setting.tried("it", lambda: {"x": 1 / 0})
    assert (row.state, row.figures) == (FAILED, {}) and "ZeroDivisionError" in row.note
    assert setting.tried("it", lambda: {"x": 1.5}).state == GOOD
    assert "| x 1.5 |" in Row("p", "w", GOOD, {"x": 1.5}).line()
