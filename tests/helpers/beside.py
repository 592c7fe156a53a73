"""`pytest --beside image,wheel,cluster`: the tests of these folders run in a second pytest, beside all others.

They wait most of the time, for compilers, containers and hosts. Their reports become this session's: one summary, one
exit status, durations and `-x` included. An interrupt reaches the other session as well; it ends with this one,
however this one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import hear_signals
from paths import TESTS

LAST_WORDS_CHARS = 4000
END_WAIT_S = 60.0  # what an interrupted session may take to remove its containers and hosts
POLL_S = 0.2


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beside")
    group.addoption("--beside", metavar="FOLDERS", help="folders of tests/ to be run in a second pytest, by commas")
    group.addoption("--reports-to", metavar="FILE", help="(what the second pytest is given by the first)")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--reports-to")
    if file:
        pr_set_pdeathsig = 1
        if sys.platform == "linux":  # as if interrupted, so that it tidies up
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)
        config.pluginmanager.register(_Teller(config, file))


class _Teller:
    """In the second session: writes every report down."""

    def __init__(self, config: pytest.Config, file: str) -> None:
        self.config, self.file = config, Path(file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.file.open("a") as file:
            file.write(json.dumps(told) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    folders = {TESTS / name for name in (session.config.getoption("--beside") or "").split(",") if name}
    there = [item for item in session.items if folders & set(item.path.parents)]
    if not there or len(there) == len(session.items) or session.testsfailed or session.config.option.collectonly:
        return (yield)
    session.items[:] = [item for item in session.items if item not in set(there)]
    with tempfile.TemporaryDirectory(prefix="dsl-beside-") as folder:
        other = _Other(session, there, Path(folder))
        try:
            result = yield
            other.follow()
        finally:
            other.end()
    return result


class _Other:
    """The second session, as the first sees it."""

    def __init__(self, session: pytest.Session, items: list[pytest.Item], folder: Path) -> None:
        self.session, self.awaited = session, {item.nodeid: item for item in items}
        self.log, reports = folder / "log", folder / "reports"
        reports.touch()
        self.reports = reports.open()
        root = session.config.rootpath
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={root}"]
        command += [f"--reports-to={reports}", *self.awaited]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the first session alone, which passes it on
                preexec_fn=hear_signals,
            )

    def follow(self) -> None:
        """Report as the other session reports, until it has ended."""
        while self.process.poll() is None:
            self._pass_on()
            time.sleep(POLL_S)
        self._pass_on()
        if self.awaited:
            self._report_missing()

    def _report_missing(self) -> None:
        """It died: the first test of which nothing is known fails, in the name of all."""
        first, *more = self.awaited.values()
        text = (
            f"the session beside this one ended with status {self.process.returncode} in this test or before it, and "
            f"without {len(more)} others\n{self.log.read_text(errors='replace')[-LAST_WORDS_CHARS:]}"
        )
        report = pytest.TestReport(first.nodeid, first.location, {}, "failed", text, "call")
        self.session.config.hook.pytest_runtest_logstart(nodeid=first.nodeid, location=first.location)
        self.session.config.hook.pytest_runtest_logreport(report=report)

    def _pass_on(self) -> None:
        hook, config = self.session.config.hook, self.session.config
        for line in self._lines():
            report: Any = hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if isinstance(report.longrepr, list):  # a skip's place and reason, which JSON has no tuples for
                report.longrepr = tuple(report.longrepr)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                self.awaited.pop(report.nodeid, None)
                hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
        for reason in (self.session.shouldfail, self.session.shouldstop):
            if reason:
                raise self.session.Failed(reason)

    def _lines(self) -> Iterator[str]:
        """Lines that are whole by now."""
        while True:
            start = self.reports.tell()
            line = self.reports.readline()
            if not line.endswith("\n"):
                self.reports.seek(start)
                return
            yield line

    def end(self) -> None:
        """Interrupt it, where it still runs, and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_WAIT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reports.close()
