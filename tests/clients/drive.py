"""Runs a client script: two processes, one job, one of three engines.

    run(CLIENT, engine, job) -> what rank 0 reported

`lite`: deepspeedlite under the name deepspeed, by the stand-in folder on PYTHONPATH. `peer`: the real DeepSpeed, out of
DSL_PEER_PYTHON's environment. `none`: the client's own data parallelism, without any DeepSpeed.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAND_IN = ROOT / "deepspeedlite" / "drop_in" / "stand_in"
TIMEOUT_S = 400


def peer_packages() -> str:
    """Where the real DeepSpeed's environment keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run(
        [os.environ["DSL_PEER_PYTHON"], "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@functools.cache
def ops_of_this_session() -> tempfile.TemporaryDirectory[str]:
    """Where the real DeepSpeed compiles to; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="dsl-clients-ops-")


def environment(engine: str, python: str = sys.executable) -> dict[str, str]:
    """The variables that choose the engine, for the environment of a Python."""
    values = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "LOCAL_"))}
    path = [str(ROOT)] + ([str(STAND_IN)] if engine == "lite" else [])
    values |= {
        "PYTHONPATH": os.pathsep.join(path),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "clients",  # Lightning looks for it before it trusts RANK
        "CUDA_VISIBLE_DEVICES": "",
    }
    if engine == "peer":
        values["DSL_CLIENTS_PEER"] = peer_packages()
        # It compiles an op at its start; a rank that is killed meanwhile leaves a lock that all later ones wait for.
        # Another environment's torch has another path, by which it would be compiled anew.
        ops = values.get("TORCH_EXTENSIONS_DIR") or ops_of_this_session().name
        values["TORCH_EXTENSIONS_DIR"] = str(Path(ops, Path(python).absolute().parent.parent.name))
        values["PATH"] = f"{Path(os.environ['DSL_PEER_PYTHON']).parent}:{values['PATH']}"
    return values


def pss_bytes(process: subprocess.Popen[bytes]) -> int:
    """Memory of a process, in which what it shares with others counts for its part of it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def wait(ranks: list[subprocess.Popen[bytes]], samples: bool = False) -> tuple[list[int | None], int]:
    """The exit statuses, as soon as all have ended, one has failed (others then wait for it), or time is up; and the
    most memory that all together had when it was looked at, ten times a second, if it was.
    """
    end, peak = time.monotonic() + TIMEOUT_S, 0
    while time.monotonic() < end:
        codes = [rank.poll() for rank in ranks]
        if None not in codes or any(codes):
            return codes, peak
        peak = max(peak, sum(map(pss_bytes, ranks))) if samples else 0
        time.sleep(0.1)
    return [rank.poll() for rank in ranks], peak


def run(
    client: str, engine: str, world: int = 2, python: str = sys.executable, samples: bool = False, **job: Any
) -> dict[str, Any]:
    """Run `run_CLIENT.py` on `world` ranks; rank 0's report, with every rank's losses and the larger one's peak.

    With `samples` it also has the peak of all ranks together, what they share counted once: `peak_pss_bytes`.
    """
    with tempfile.TemporaryDirectory() as out, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        base = environment(engine, python) | {
            "DSL_CLIENTS_JOB": json.dumps({"engine": engine, "out": out, "dir": out, **job}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        logs = [Path(out, f"log{rank}") for rank in range(world)]
        ranks = [
            subprocess.Popen(
                [python, str(HERE / f"run_{client}.py")],
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                cwd=out,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes, peak_pss_bytes = wait(ranks, samples)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # DeepSpeed's
                left.unlink(missing_ok=True)
        said = "\n".join(f"--- rank {r}\n{log.read_text()[-9000:]}" for r, log in enumerate(logs))
        assert codes == [0] * world, f"{client} on {engine} with {job}: exit statuses {codes}\n{said}"
        reports = [json.loads(Path(out, f"rank{rank}.json").read_text()) for rank in range(world)]
        module = {"lite": "deepspeedlite.compat.engine", "peer": "deepspeed.runtime.engine", "none": "none"}[engine]
        expected = module if engine == "none" else f"{module} stage {job['stage']}"
        assert reports[0]["engine"] == expected, f"the client called {reports[0]['engine']}, not {expected}"
        peak_bytes = max(each["peak_rss_bytes"] for each in reports)
        peaks = {"peak_rss_bytes": peak_bytes, "peak_pss_bytes": peak_pss_bytes}
        return {**reports[0], "by_rank": [each["losses"] for each in reports], **peaks}


if __name__ == "__main__":
    client, engine, *pairs = sys.argv[1:]
    print(json.dumps(run(client, engine, **{k: json.loads(v) for k, v in (pair.split("=", 1) for pair in pairs)})))
