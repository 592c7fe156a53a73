"""The harness itself: pytest runs on generated files in subprocesses, and what it says and leaves is looked at."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from children import hear_signals
from paths import TESTS

pytestmark = pytest.mark.slow

HEAD = """
import os, sys, time
import pytest, torch, torch.distributed as dist
from harness import distributed
"""
OUTCOMES = (
    HEAD
    + """
@pytest.mark.parametrize("k", [5, 7])
@distributed([1, 2])
def test_arguments(k, tmp_path, world_size):
    assert dist.get_world_size() == world_size == int(os.environ["WORLD_SIZE"])
    (tmp_path / f"{k}-{dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world_size

class TestInClass:
    @distributed(2, env={"MARK": "set"})
    def test_method(self):
        assert os.environ["MARK"] == "set" and torch.get_num_threads() == 1
        os.environ["LEAK"] = "1"

@distributed(2)
def test_isolated():
    assert "MARK" not in os.environ and "LEAK" not in os.environ
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()

@distributed(2, init_process_group=False)
def test_uninitialised():
    assert not dist.is_initialized()

@distributed(2)
def test_one_fails():
    print("seen by", dist.get_rank())
    if dist.get_rank() == 1:
        values = [1, 2]
        assert sum(values) == 5
    dist.barrier()

@distributed(2)
def test_first_is_blamed():
    if dist.get_rank() == 0:
        time.sleep(0.3)
    raise KeyError(f"from {dist.get_rank()}")

@distributed(2, timeout_s=1)
def test_hangs():
    def stuck_here():
        time.sleep(1000)
    if dist.get_rank() == 1:
        stuck_here()
    dist.barrier()

@distributed(2)
def test_killed():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()

@distributed(2)
def test_after_all_that():
    dist.barrier()

@distributed(2)
def test_skips():
    if dist.get_rank() == 1:
        pytest.skip("rank 1 lacks something")

@distributed(2)
def test_xfails():
    pytest.xfail("known")

@distributed(2)
def test_wrong_fixture(monkeypatch):
    pass

@pytest.mark.parametrize("f", [lambda: 1], ids=["f"])
@distributed(2)
def test_unpicklable(f):
    pass

@distributed(2)
def test_leaves_a_grandchild_then_fails():
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600) # " + os.environ["GRANDCHILD_MARK"]])
    assert False
"""
)


def start_pytest(folder: Path, source: str, *options: str) -> subprocess.Popen[str]:
    """Pytest on a generated file, with the repository's own conftest."""
    (folder / "test_generated.py").write_text(source)
    real = str(TESTS / "conftest.py")
    (folder / "conftest.py").write_text(
        f"import runpy\npytest_sessionfinish = runpy.run_path({real!r})['pytest_sessionfinish']\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options, "test_generated.py"]
    (folder / "tmp").mkdir()
    environ = {**os.environ, "TMPDIR": str(folder / "tmp"), "GRANDCHILD_MARK": f"mark-{folder}", "COLUMNS": "200"}
    environ.pop("PYTEST_ADDOPTS", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environ, preexec_fn=hear_signals, **pipes)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The text of one pytest run over all kinds of outcomes, and its folder."""
    folder = tmp_path_factory.mktemp("outcomes")
    process = start_pytest(folder, OUTCOMES)
    text, _ = process.communicate(timeout=200)
    yield text, folder


def outcome(text: str, test: str) -> str:
    """PASSED, FAILED, ... of one test in the summary of -rA."""
    found = re.search(rf"^([A-Z]+) (?:\[\d+\] )?test_generated.py::{re.escape(test)}(?: |$)", text, re.MULTILINE)
    assert found, f"{test} is not in:\n{text}"
    return found[1]


def section(text: str, test: str) -> str:
    """What pytest says of one failed test."""
    found = re.search(rf"^_+ {re.escape(test)} _+$\n(.*?)(?=^(?:_+ \S+ _+|=+ .* =+)$)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {test} in:\n{text}"
    return found[1]


def test_passing(outcomes: tuple[str, Path]) -> None:
    """Parameters, fixtures, classes, isolation, uninitialised starts; and the pool after failures."""
    text, _ = outcomes
    names = [f"test_arguments[{size}-{k}]" for size in (1, 2) for k in (5, 7)]
    names += ["TestInClass::test_method", "test_isolated", "test_uninitialised", "test_after_all_that"]
    assert {name: outcome(text, name) for name in names} == dict.fromkeys(names, "PASSED")


def test_a_failing_rank_is_named_with_its_traceback(outcomes: tuple[str, Path]) -> None:
    """The traceback, pytest's explanation of the assertion, where the other rank hung, and what ranks printed."""
    said = section(outcomes[0], "test_one_fails")
    assert "rank 1 of 2 failed first:\nTraceback" in said
    assert "assert sum(values) == 5\n" in said
    assert "AssertionError: assert 3 == 5" in said
    assert "rank 0 was still running, and was killed" in said
    assert " in barrier\n" in said
    assert "[rank 0] seen by 0" in said
    assert "[rank 1] seen by 1" in said


def test_the_first_to_fail_is_blamed(outcomes: tuple[str, Path]) -> None:
    """By time, not by number; the others' errors are a line each."""
    said = section(outcomes[0], "test_first_is_blamed")
    assert said.startswith("rank 1 of 2 failed first:")
    assert "KeyError: 'from 1'" in said
    assert "then rank 0: KeyError: 'from 0'" in said


def test_a_hang_is_a_timeout_with_stacks(outcomes: tuple[str, Path]) -> None:
    """Each rank's stack tells where it stood."""
    said = section(outcomes[0], "test_hangs")
    assert said.startswith("timeout: rank(s) 0, 1 of 2 had not finished after 1 s")
    assert "in barrier" in said.split("rank 1 was still running")[0]
    assert "in stuck_here" in said.split("rank 1 was still running")[1]


def test_a_killed_rank_is_blamed_before_the_connections_it_broke(outcomes: tuple[str, Path]) -> None:
    """Although the other rank's error may be reported sooner."""
    said = section(outcomes[0], "test_killed")
    assert said.startswith("rank 1 of 2 failed first:\nthe process died: killed by SIGKILL")


def test_skip_and_xfail_reach_pytest(outcomes: tuple[str, Path]) -> None:
    """From any rank."""
    text, _ = outcomes
    assert "rank 1 lacks something" in text
    assert outcome(text, "test_xfails") == "XFAIL"
    assert re.search(r"\b1 skipped\b.*\b1 xfailed\b", text)


def test_arguments_that_cannot_travel_are_named(outcomes: tuple[str, Path]) -> None:
    """Before any rank starts the body."""
    text, _ = outcomes
    assert "fixture 'monkeypatch' belongs to pytest's process" in section(text, "test_wrong_fixture")
    assert "argument 'f' cannot be pickled" in section(text, "test_unpicklable[f]")


def test_nothing_is_left(outcomes: tuple[str, Path]) -> None:
    """No worker, none of their children, no temporary folder."""
    text, folder = outcomes
    assert outcome(text, "test_leaves_a_grandchild_then_fails") == "FAILED"
    wait_until(lambda: running_with(f"mark-{folder}") == [], limit_s=60)  # what ranks are forked from ends by itself
    assert list((folder / "tmp").glob("dsl-harness-*")) == []


def running_with(mark: str) -> list[int]:
    """Ids of the living processes that have the mark in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            told = " ".join(process.cmdline()) + " ".join(process.environ().values())
        except psutil.Error:
            continue
        if mark in told:
            found.append(process.pid)
    return found


SLEEPS = (
    HEAD
    + """
@distributed(2, timeout_s=100)
def test_sleeps(tmp_path):
    open(os.environ["TMPDIR"] + f"/ready-{dist.get_rank()}", "w").close()
    time.sleep(1000)
"""
)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_pytest(sent: signal.Signals, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On Ctrl-C, and even when pytest has no chance to clean up."""
    folder = tmp_path_factory.mktemp("ends")  # short: the workers' socket is below it, and its path has a limit
    process = start_pytest(folder, SLEEPS)
    try:
        ready = folder / "tmp"
        wait_until(lambda: process.poll() is not None or len(list(ready.glob("ready-*"))) == 2, limit_s=60)
        assert process.poll() is None, process.communicate()[0]
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == 4  # two ranks, what they are forked from, and multiprocessing's tracker of resources
        process.send_signal(sent)
        process.communicate(timeout=60)
        wait_until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), limit_s=60)
    finally:
        process.kill()
        process.wait()


def wait_until(condition, limit_s: float) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.05)
