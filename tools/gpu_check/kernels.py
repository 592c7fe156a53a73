"""The tests that run on a GPU (`-m gpu`), on it: kernels through their C ABI and ops through torch, beside float64."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from deepspeedlite.runtime.device import pick_device
from tools.gpu_check.report import FAILED, GOOD, NOT_RUN, Row
from tools.gpu_check.setting import ROOT, NotHereError, Rows, Setting
from tools.gpu_check.worker import MARK, give, leave

FILES = (
    "test_gpu_kernels.py",
    "test_inference_gpu_kernels.py",
    "test_transformer_gpu_kernels.py",
    "test_sparse_gpu_kernels.py",
    "test_quantizer.py",
    "test_gpu_ops.py",
)
MOST_SAID = 12  # failures of a file that get a row of their own


class Watcher:
    """A plugin of pytest's that hands rows on: each failure at once, and each file when it is done."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.rows: queue.Queue[Row | None] = queue.Queue()
        self._counts: dict[str, int] = {}
        self._file, self._begun_s, self._reason = "", time.monotonic(), ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once: by its call, or by a set-up that failed or skipped."""
        file = Path(report.nodeid.partition("::")[0]).name or "elsewhere"  # what lies outside of the checkout
        if file != self._file:
            self._done()
            self._file, self._counts, self._begun_s, self._reason = file, {}, time.monotonic(), ""
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] = self._counts.get(report.outcome, 0) + 1
        if report.skipped:
            self._reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if report.failed and self._counts["failed"] <= MOST_SAID:
            said = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)[-400:]
            self.rows.put(Row(self.phase, report.nodeid.rpartition("::")[2], FAILED, {}, said, report.duration))

    def pytest_sessionfinish(self) -> None:
        """The last file's row, and the end of all."""
        self._done()

    def _done(self) -> None:
        if not self._file:
            return
        failed, passed = self._counts.get("failed"), self._counts.get("passed")
        state = FAILED if failed else GOOD if passed else NOT_RUN
        seconds = time.monotonic() - self._begun_s
        self.rows.put(Row(self.phase, self._file, state, dict(self._counts), self._reason, seconds))


def rows(setting: Setting) -> Rows:
    """Of pytest's run of each file, as it goes on.

    Each in a process of its own: after an illegal access to memory nothing works any more in that process.
    """
    for name in FILES:
        told = {"phase": setting.phase, "arguments": ["-m", "gpu"], "file": f"tests/parity/{name}"}
        yield from of_process(setting, told)


def of_process(setting: Setting, told: dict[str, Any]) -> Rows:
    """Those of `of_tests` elsewhere; a process that dies says nothing more, which is a row too."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.gpu_check.kernels", json.dumps(told)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(MARK):
            yield Row(**json.loads(line[len(MARK) :]))
    if status := child.wait():
        yield Row(setting.phase, Path(told["file"]).name, FAILED, {}, f"its process ended with status {status}")


def main() -> None:
    """One file's tests, in this process: rows on stdout, all else on stderr."""
    told = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    device = pick_device(0)
    setting = Setting(told["phase"], device, 0, 1, False, time.monotonic() + 600, ROOT)
    give(of_tests(setting, told["arguments"], [told["file"]]), out)
    leave()


def of_tests(setting: Setting, arguments: list[str], files: list[str]) -> Rows:
    """Run these tests beside this thread, and yield their rows."""
    try:
        import pytest
    except ImportError as error:
        why = str(error)
        yield setting.tried("pytest", lambda: not_here(why))
        return
    watcher = Watcher(setting.phase)
    # In a thread signals tell of nothing, which pytest-timeout would use; the phase has its own limit.
    usual = ["-q", "-p", "no:cacheprovider", "-p", "no:timeout", f"--rootdir={ROOT}", "-W", "ignore"]
    codes: list[int] = []

    def run() -> None:
        try:
            codes.append(int(pytest.main([*usual, *arguments, *(str(ROOT / file) for file in files)], [watcher])))
        finally:
            watcher.rows.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    count = 0
    while (row := watcher.rows.get()) is not None:
        count += 1
        yield row
    if codes not in ([0], [1]) or not count:
        yield setting.tried("pytest", lambda: broken(codes))


def not_here(why: str) -> dict[str, Any]:
    """Raises NotHereError."""
    raise NotHereError(f"{why}: pip install pytest numpy")


def broken(codes: list[int]) -> dict[str, Any]:
    """Raises RuntimeError: it collected nothing, or broke off."""
    raise RuntimeError(f"pytest ended with {codes or 'no status'} (5: no tests), see the phase's last words")


if __name__ == "__main__":
    main()
