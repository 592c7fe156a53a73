"""`pytest --beside image,wheel,cluster --beside fault`: the tests of these folders run in pytests of their own.

One session for each `--beside`, beside all other tests: they wait much of the time, for compilers, containers, hosts
and the ends of processes. Their reports become this session's: one summary, one exit status, durations and `-x`
included. An interrupt reaches the other sessions as well; they end with this one, however this one ends.
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
    more = "folders of tests/ to be run in another pytest, by commas; may be given several times"
    group.addoption("--beside", metavar="FOLDERS", action="append", default=[], help=more)
    group.addoption("--reports-to", metavar="FILE", help="(what another pytest is given by the first)")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--reports-to")
    if file:
        pr_set_pdeathsig = 1
        if sys.platform == "linux":  # as if interrupted, so that it tidies up
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)
        config.pluginmanager.register(_Teller(config, file))


class _Teller:
    """In another session: writes every report down."""

    def __init__(self, config: pytest.Config, file: str) -> None:
        self.config, self.file = config, Path(file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.file.open("a") as file:
            file.write(json.dumps(told) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    if session.testsfailed or session.config.option.collectonly:
        return (yield)
    others: list[_Other] = []
    with tempfile.TemporaryDirectory(prefix="dsl-beside-") as folder, contextlib.ExitStack() as stack:
        stack.callback(_end, others)
        for number, names in enumerate(session.config.getoption("--beside")):
            folders = {TESTS / name for name in names.split(",")}
            there = [item for item in session.items if folders & set(item.path.parents)]
            if there and len(there) < len(session.items):
                session.items[:] = [item for item in session.items if item not in set(there)]
                others.append(_Other(session, names, there, Path(folder) / str(number)))
        began_s = time.time()
        result = yield
        if others:
            _took_s(session.config)["the other tests"] = time.time() - began_s
        while sum(other.follow() for other in others):
            time.sleep(POLL_S)
    return result


def _end(others: list[_Other]) -> None:
    """Interrupt those that still run, and wait for them."""
    for other in others:
        other.interrupt()
    for other in others:
        other.end()


_TOOK_S = pytest.StashKey[dict[str, float]]()


def _took_s(config: pytest.Config) -> dict[str, float]:
    """How long each session ran, by its folders."""
    return config.stash.setdefault(_TOOK_S, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if took_s := _took_s(config):
        told = "; ".join(f"{names} {seconds:.0f} s" for names, seconds in took_s.items())
        terminalreporter.write_line(f"sessions beside each other: {told}")


class _Other:
    """Another session, as the first sees it."""

    def __init__(self, session: pytest.Session, names: str, items: list[pytest.Item], folder: Path) -> None:
        self.session, self.names, self.awaited = session, names, {item.nodeid: item for item in items}
        self.began_s = time.time()
        folder.mkdir()
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

    def follow(self) -> bool:
        """Report what the other session has reported since; whether there may be more."""
        runs = self.process.poll() is None
        self._pass_on()
        if not runs and self.names not in _took_s(self.session.config):
            _took_s(self.session.config)[self.names] = self.log.stat().st_mtime - self.began_s
            if self.awaited:
                self._report_missing()
        return runs

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

    def interrupt(self) -> None:
        """As Ctrl-C does, where it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Wait for it, and kill what does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WAIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reports.close()
