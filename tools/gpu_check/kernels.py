"""The tests that run on a GPU (`-m gpu`), on it: kernels through their C ABI and ops through torch, beside float64."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

from tools.gpu_check.report import FAILED, GOOD, NOT_RUN, Row
from tools.gpu_check.setting import ROOT, NotHereError, Rows, Setting

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
    """Of pytest's run, as it goes on."""
    yield from of_tests(setting, ["-m", "gpu"], [f"tests/parity/{name}" for name in FILES])


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
