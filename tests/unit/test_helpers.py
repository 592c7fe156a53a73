"""What tests share, tried itself: matrices in fewer cases, and sessions that run beside each other."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from children import hear_signals
from pairwise import covering
from paths import HELPERS, ROOT


@pytest.mark.parametrize("strength", [2, 3])
def test_every_combination_of_so_many_values_is_met(strength):
    values = {"stage": range(4), "dtype": "abc", "accumulation": (1, 3), "clip": (False, True), "world_size": (1, 2, 4)}
    always = [(stage, "a", 3, True, 2) for stage in range(4)]
    cases = covering(values, strength, always)
    assert len(cases) < 144 / strength and {*always} <= {*cases} and len({*cases}) == len(cases)
    for places in itertools.combinations(range(5), strength):
        met = {tuple(case[i] for i in places) for case in cases}
        assert met == set(itertools.product(*([*values.values()][i] for i in places)))


WAITS = "import os, pathlib, time\ndef test_waits(): pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(90)\n"
GOOD = "def test_good(): pass\n"
BAD = "import pytest\ndef test_bad(): assert 1 == 2\ndef test_skips(): pytest.skip('lacks it')\n"
DIES = "import os\ndef test_good(): pass\ndef test_dies(): os._exit(9)\n"


FIXTURE = "\nimport pathlib, pytest, time\n@pytest.fixture(autouse=True, scope='module')\ndef taken():\n"
BEFORE = f"{FIXTURE}    pathlib.Path('taken').touch()\n"
AFTER = f"{FIXTURE}    while not pathlib.Path('taken').exists():\n        time.sleep(0.02)\n"


def start(folder: Path, here: str, there: str, *options: str) -> subprocess.Popen[str]:
    """Two sessions on three generated files: `here` is the first one's, `there` the other's, the last anybody's."""
    (folder / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(HELPERS)!r})\nimport pathlib, paths\n"
        "paths.TESTS = pathlib.Path(__file__).parent\npytest_plugins = ['sessions']\n"
    )
    for name, source in (("here", here + AFTER), ("there", there + BEFORE), ("third", GOOD)):
        (folder / name).mkdir()
        (folder / name / f"test_{name}.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--sessions", "2", *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environ.pop("PYTEST_ADDOPTS", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environ, preexec_fn=hear_signals, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("here, there, status, said", [
    (GOOD, GOOD, 0, "3 passed"),
    (BAD, BAD, 1, "2 failed, 1 passed, 2 skipped"),
    (GOOD, DIES, 1, "1 failed, 3 passed"),
], ids=["good", "both bad", "death"])  # fmt: skip
def test_sessions_are_told_of_as_one(tmp_path, here, there, status, said):
    process = start(tmp_path, here, there)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == status, text
    assert re.fullmatch(rf"=+ {said} in .*s.* =+", text.splitlines()[-1]), text
    if there is BAD:
        assert re.search(r"^FAILED there/test_there.py::test_bad - assert 1 == 2$", text, re.MULTILINE)
        assert "def test_bad(): assert 1 == 2" in text and re.search(r"SKIPPED \[\d\] .*: lacks it", text)
    if there is DIES:
        assert "session 2 ended with status 9 in this test or before it, and without 0 others" in text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_neither_outlives_the_other(tmp_path, number):
    process, pid = start(tmp_path, GOOD, WAITS), tmp_path / "pid"
    until = time.monotonic() + 60
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=50)
    assert process.returncode == (2 if number == signal.SIGINT else -signal.SIGKILL), text
    while psutil.pid_exists(int(pid.read_text())):
        assert time.monotonic() < until
        time.sleep(0.05)
