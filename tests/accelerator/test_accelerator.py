"""The library on an accelerator whose streams run late and in any order: results equal those of running at once.

No GPU is needed: `device.cpp` is a device of torch's own, made of the host's memory and queues (its first lines).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from programs import needs

HERE = Path(__file__).parent
ALL = "DSL_STREAMS" in os.environ
pytestmark = [needs("c++"), pytest.mark.slow]


def run(program: str, *arguments: str, folder: Path) -> list[dict[str, Any]]:
    env = os.environ | {"THREADS_DEVICE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / program), *arguments]
    limit_s = 3000 if ALL else 280
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the compiled device, and what it finds of mistakes that are made on purpose."""
    return tmp_path_factory.mktemp("threads")


def test_the_device_shows_mistakes_and_nothing_else(folder):
    """Else equal results would say nothing."""
    for row in run("stream_mistakes.py", folder=folder):
        assert row["wrongly"] == 0, row
        assert row["shown"] >= 4, row


# Some of each kind, under one seed; `make test-streams` runs all.
CHOSEN = (
    "stage 2, in the user's stream",
    "stage 3, fp16, all persistent",
    "stage 3, gathered between steps",
    "stage 1, averaged aside",
    "stage 3, all on the CPU",
    "stage 3, inputs on the host",
    "pipeline, stage 1, bf16",
)
WAITS = 1  # of the host in a step whose states are on the device: for the gradients' norm, or whether they are finite
WAITS_OFFLOADED = 16  # where each unit's gradients have to be in the host's memory


def test_training_is_the_same_in_every_order(folder):
    seeds = os.environ.get("DSL_STREAMS", "1")
    rows = run("train_on_threads.py", "--seeds", seeds, *(["all"] if ALL else CHOSEN), folder=folder)
    assert len(rows) == (26 if ALL else len(CHOSEN))
    for row in rows:
        for rank, found in enumerate(row["ranks"]):
            assert isinstance(found, list), f"{row['case']}, rank {rank}: {found}"
            assert all(loss == loss for loss in found[0]["losses"])
            for late in found[1:]:
                said = f"{row['case']}, rank {rank}, seed {late['seed']}"
                assert late["losses"] == found[0]["losses"], said
                assert late["norm"] == found[0]["norm"], said
                assert max(late["waits"]) <= (WAITS if is_on_device(row["case"]) else WAITS_OFFLOADED), said


def is_on_device(case: str) -> bool:
    """Whether nothing is offloaded."""
    return not any(word in case for word in ("CPU", "disk", "gradients leave"))


ASKED = """
import json, os, threads_device
threads_device.use()
os.environ["DS_ACCELERATOR"] = "threads"
import torch
from deepspeedlite.accelerator import get_accelerator
one = get_accelerator()
one.set_device(3)
one.manual_seed(5)
state = one.get_rng_state()
drawn = torch.rand(4, device=one.current_device_name())
one.set_rng_state(state)
with one.stream(one.Stream()) as _:
    again = torch.rand(4, device=one.device_name())
one.synchronize()
said = {"name": one.current_device_name(), "group": one.communication_backend_name(), "same": torch.equal(drawn, again)}
said |= {"there": one.is_available() and one.on_accelerator(drawn)}
said |= {"bytes": one.total_memory(), "count": one.device_count()}
print(json.dumps(said), flush=True)
os._exit(0)
"""


def test_the_accelerator_that_scripts_ask_for_is_this_one(folder):
    env = os.environ | {"THREADS_DEVICE_DIR": str(folder), "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKED], env=env, capture_output=True, text=True, timeout=200
    )
    said = {"name": "threads:3", "group": "threads", "same": True, "there": True, "bytes": 1 << 30, "count": 8}
    assert json.loads(done.stdout or "null") == said, done.stderr[-2000:]
