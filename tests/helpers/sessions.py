"""`pytest --sessions 4`: the files of tests are run by so many pytests beside each other, as each gets done with one.

Tests wait much of the time: for compilers, containers, hosts, the ends of processes, and each other's ranks. The
first session starts the others, collects, and is told by them: one summary, one exit status, durations and `-x`
included. While it collects they import what tests need. A file is one session's: whoever makes the file of its number
in the queue's folder has taken it. An interrupt reaches the other sessions as well; they end with the first one,
however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from children import hear_signals
from harness import start_origin
from paths import ROOT

LAST_WORDS_CHARS = 4000
END_WAIT_S = 60.0  # what an interrupted session may take to remove its containers and hosts
POLL_S = 0.2
# The files that take longest, in that order: what is begun last should be short. First those that have more than
# a minute each, then those that have 5 s of `make test-fast`.
LONGEST = (
    "image/test_images", "wheel/test_wheel", "cluster/test_launcher_cluster", "fault/test_checkpoint_kills",
    "cluster/test_install", "parity/test_checkpoint_deepspeed_peer", "fault/test_offload_faults",
    "field/test_tutorials", "fault/test_checkpoint_faults", "field/test_examples", "parity/test_checkpoint_elastic",
    "parity/test_pipe_peer", "inference/test_inference_programs", "inference/test_loading", "cluster/test_launcher",
    "parity/test_zero_models", "field/test_same_values", "cluster/test_ssh", "parity/test_mpu_peer",
    "cluster/test_planted", "wheel/test_cache", "wheel/test_op_builder", "cluster/test_cluster_bed",
    "field/test_planted_faults", "unit/test_comm", "unit/test_helpers", "unit/test_harness", "image/test_env",
    "field/test_documentation", "field/test_drop_in", "field/test_env_report", "inference/test_blocks",
    "parity/test_pipe", "parity/test_ops", "parity/test_optimizers", "parity/test_cpu_optimizers",
    "inference/test_generate", "fault/test_strangers", "fault/test_blame", "fault/test_exit", "fault/test_stall",
    "parity/test_transformer_inference", "parity/test_quantizer", "parity/test_packed_linear",
    "inference/test_streamed", "inference/test_kv_cache", "inference/test_inference_quantized",
    "inference/test_inference_engine", "inference/test_tensor_parallel", "parity/test_mpu_checkpoints",
    "unit/test_checkpoint_direct", "unit/test_structure", "unit/test_aio", "parity/test_parity",
    "unit/test_zero_keys", "unit/test_engine_lifecycle", "parity/test_zero_adapters", "unit/test_zero_inspect",
    "parity/test_offload", "parity/test_mpu", "unit/test_comm_stub", "parity/test_zero_building",
    "unit/test_zero_scale", "unit/test_zero_fit", "unit/test_config", "parity/test_lamb_sharded",
    "unit/test_zero_use_order",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sessions")
    group.addoption("--sessions", metavar="N", type=int, default=1, help="by how many pytests the files are run")
    group.addoption("--queue", metavar="FOLDER", type=Path, help="(what another session is given by the first)")
    group.addoption("--number", metavar="N", help="(which one it is)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--queue"):
        pr_set_pdeathsig = 1
        if sys.platform == "linux":  # as if interrupted, so that it tidies up
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)
        config.pluginmanager.register(_OtherSession(config))
    elif config.getoption("--sessions") > 1 and not config.option.collectonly:
        config.pluginmanager.register(_FirstSession(config))


class _FirstSession:
    """Collects, hands the files out, and passes on what the others report."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="dsl-sessions-")
        self.queue = _Queue(Path(self.folder.name), "1")
        self.count = config.getoption("--sessions")
        self.others: list[_Other] = []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if all(Path(argument).is_dir() for argument in session.config.args):  # else there may be one file for all
            self._start_others(session, self.count)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        groups = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
        if len(groups) < 2 or session.testsfailed:
            return None
        groups.sort(key=_turn)
        self._start_others(session, min(self.count, len(groups)))
        for other in self.others:
            other.groups = groups
        self.queue.claim(0)  # before the others hear of it: the longest file begins here, at once
        self.queue.write([[item.nodeid for item in items] for items in groups])
        for number in self.queue.take():
            _run(session, groups[number])
            for other in self.others:
                other.follow()
        while sum(other.follow() for other in self.others):
            time.sleep(POLL_S)
        return True

    def _start_others(self, session: pytest.Session, count: int) -> None:
        for number in range(len(self.others) + 2, count + 1):
            self.others.append(_Other(session, self.queue, str(number)))

    def pytest_sessionfinish(self) -> None:
        for other in self.others:
            other.interrupt()
        for other in self.others:
            other.end()
        self.folder.cleanup()


def _turn(items: list[pytest.Item]) -> int:
    name = items[0].path.with_suffix("").as_posix()
    return next((place for place, long in enumerate(LONGEST) if name.endswith(f"/tests/{long}")), len(LONGEST))


def _run(session: pytest.Session, items: Sequence[pytest.Item]) -> None:
    """As pytest runs its list, of one file: after the last test all is torn down, since the next file is not known."""
    for item, following in itertools.zip_longest(items, items[1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


class _Queue:
    """Files of tests, by number; each is taken once, by the session whose name is then in the file of that number."""

    def __init__(self, folder: Path, me: str) -> None:
        self.folder, self.me = folder, me

    def write(self, groups: Sequence[Sequence[str]]) -> None:
        partial = self.folder / "groups.part"
        partial.write_text(json.dumps(groups))
        partial.rename(self.folder / "groups")

    def read(self) -> list[list[str]]:
        """Once they are written."""
        while not (self.folder / "groups").exists():
            time.sleep(POLL_S)
        groups: list[list[str]] = json.loads((self.folder / "groups").read_text())
        return groups

    def take(self) -> Iterator[int]:
        """Numbers that are this session's, until none is left."""
        for number in range(len(self.read())):
            if self.claim(number) or self.owner(number) == self.me:
                yield number

    def claim(self, number: int) -> bool:
        """Whether it had no owner yet."""
        try:
            with (self.folder / str(number)).open("x") as file:
                file.write(self.me)
        except FileExistsError:
            return False
        return True

    def owner(self, number: int) -> str | None:
        file = self.folder / str(number)
        return file.read_text() if file.exists() else None


class _OtherSession:
    """In another session: collects what it takes, and writes every report down."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.queue = config, _Queue(config.getoption("--queue"), config.getoption("--number"))
        self.reports = self.queue.folder / f"reports{self.queue.me}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> bool:
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.config.rootpath == ROOT:  # else these are other tests, which may need neither
            start_origin()
            importlib.import_module("torch")
        groups = self.queue.read()
        for number in self.queue.take():
            _run(session, session.perform_collect(groups[number]))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.reports.open("a") as file:
            file.write(json.dumps(told) + "\n")


class _Other:
    """Another session, as the first sees it."""

    def __init__(self, session: pytest.Session, queue: _Queue, number: str) -> None:
        self.session, self.queue, self.number = session, queue, number
        self.groups: list[list[pytest.Item]] = []  # what there is to take, once it is known
        self.log, reports = queue.folder / f"log{number}", queue.folder / f"reports{number}"
        self.ended: set[str] = set()  # the tests that it has reported to the end
        reports.touch()
        self.reports = reports.open()
        config = session.config
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
        command += [f"--queue={queue.folder}", f"--number={number}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=config.rootpath,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the first session alone, which passes it on
                preexec_fn=hear_signals,
            )
        self.runs = True

    def follow(self) -> bool:
        """Pass on what it has reported since; whether there may be more."""
        if self.runs:
            self.runs = self.process.poll() is None
            self._pass_on()
            if not self.runs:
                self._report_missing()
        return self.runs

    def _report_missing(self) -> None:
        """Where it died: the first test of which nothing is known fails, in the name of all that it had taken."""
        mine = [items for number, items in enumerate(self.groups) if self.queue.owner(number) == self.number]
        awaited = [item for items in mine for item in items if item.nodeid not in self.ended]
        if not awaited:
            return
        text = (
            f"session {self.number} ended with status {self.process.returncode} in this test or before it, and without "
            f"{len(awaited) - 1} others\n{self.log.read_text(errors='replace')[-LAST_WORDS_CHARS:]}"
        )
        nodeid, location = awaited[0].nodeid, awaited[0].location
        report = pytest.TestReport(nodeid, location, {}, "failed", text, "call")
        self.session.config.hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
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
                self.ended.add(report.nodeid)
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
