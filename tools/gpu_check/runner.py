"""Runs phases, each in processes of its own with a limit, and takes their rows as they come."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check.phases import Phase
from tools.gpu_check.report import FAILED, NOT_RUN, Report, Row
from tools.gpu_check.worker import MARK

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 5  # of budget, for a phase to be begun


@dataclass(frozen=True)
class Runner:
    """All phases of one check.

    Attributes:
        device: `auto`, or a name as of DS_ACCELERATOR, or `threads`.
        ends_s: on time.monotonic's clock, when the budget is used up.
        most_ranks: so many GPUs at most.
    """

    report: Report
    device: str
    tiny: bool
    ends_s: float
    most_ranks: int

    def run(self, phase: Phase) -> None:
        """Do it, and add its rows; that of a phase which broke off says with what words."""
        if why := self._not_now(phase):
            self.report.add(Row(phase.name, phase.says, NOT_RUN, note=why))
            return
        left_s = self.ends_s - time.monotonic()
        limit_s = min(phase.limit_s, left_s)
        begun_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            told = self._conduct(phase, limit_s, Path(folder))
        if told:
            late = " (the budget)" if limit_s < phase.limit_s and "after" in told[:6] else ""
            state = NOT_RUN if late else FAILED
            self.report.add(Row(phase.name, "the phase", state, {}, told + late, time.monotonic() - begun_s))

    def _not_now(self, phase: Phase) -> str:
        if self.ends_s - time.monotonic() < LEAST_S:
            return "the budget is used up"
        here = self.report.figures_of("here")
        if phase.compiles and not here.get("kernels_run_here"):
            return here.get("why_no_kernels", "no device here that nvcc or hipcc compile for")
        return ""

    def _ranks(self, phase: Phase) -> int:
        return max(1, min(self.report.figures_of("here").get("ranks", 1), self.most_ranks)) if phase.every_rank else 1

    def _conduct(self, phase: Phase, limit_s: float, folder: Path) -> str:
        """Start its ranks and read until they end; what went wrong, or nothing."""
        ranks = self._ranks(phase)
        told = {
            "phase": phase.name,
            "device": self.device,
            "tiny": self.tiny,
            "limit_s": limit_s,
            "folder": str(folder),
        }
        command = [sys.executable, "-W", "ignore", "-m", "tools.gpu_check.worker", json.dumps(told)]
        logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        port = free_port()
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as errors:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=self._environment(rank, ranks, port),
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        start_new_session=True,
                    )
                )
        try:
            in_time = self._read(processes, time.monotonic() + limit_s)
        finally:
            for process in processes:
                end(process)
        if not in_time:
            return f"after {limit_s:.0f} s it was ended; its last words: {last_words(logs)}"
        codes = [process.returncode for process in processes]
        return f"it ended with status {codes}: {last_words(logs)}" if any(codes) else ""

    def _read(self, processes: list[subprocess.Popen[bytes]], until_s: float) -> bool:
        """Take rows until all have ended, or one has failed; False: time was up first."""
        with selectors.DefaultSelector() as selector:
            for process in processes:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, bytearray())
            while selector.get_map() and (left_s := until_s - time.monotonic()) > 0:
                for key, _ in selector.select(min(left_s, 1.0)):
                    piece = os.read(key.fd, 65536)
                    if not piece:
                        selector.unregister(key.fileobj)
                    key.data.extend(piece)
                    self._take(key.data)
                if any(process.poll() for process in processes):
                    break  # the others would wait for it until their time is up
            return time.monotonic() < until_s

    def _take(self, said: bytearray) -> None:
        while b"\n" in said:
            line, _, rest = bytes(said).partition(b"\n")
            said[:] = rest
            if line.startswith(MARK.encode()):
                self.report.add(Row(**json.loads(line[len(MARK) :])))

    def _environment(self, rank: int, ranks: int, port: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        ours: dict[str, Any] = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DSL_LOG_LEVEL": "warning",
            "HF_HUB_OFFLINE": 1,
        }
        # Where there is no network, nothing else is up; where there is, it may be slow or filtered.
        usual: dict[str, Any] = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}
        usual |= {"OMP_NUM_THREADS": max(1, cores // ranks), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if archs := self.report.figures_of("here").get("archs"):  # the same for all phases: libraries are kept by them
            usual |= {"TORCH_CUDA_ARCH_LIST": archs, "PYTORCH_ROCM_ARCH": archs}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
        texts = {name: str(value) for name, value in ours.items()}
        return {**{name: str(value) for name, value in usual.items()}, **kept, **texts}


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: a compiler, a sanitizer. Who hangs in a driver is not waited for."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def last_words(logs: list[Path]) -> str:
    """What the ranks said last, of each a few lines."""
    told = []
    for rank, log in enumerate(logs):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            told.append(f"rank {rank}: " + " / ".join(lines[-4:]))
    return "; ".join(told)[-1500:] or "none"


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
