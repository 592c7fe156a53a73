"""The same tensor-parallel training with DeepSpeed's engine and with ours: losses and gradient norms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ds_peer import configuration
from paths import HELPERS, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("DSL_PEER_PYTHON"),
        reason="needs DSL_PEER_PYTHON: the Python of an environment with DeepSpeed",
    ),
]
CASES = [(dtype, stage) for dtype in ("fp32", "bf16") for stage in range(4)]
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-3}


def train(library: str, python: str, folder: Path) -> list[list[tuple[float, float]]]:
    configs = [configuration(stage, dtype, gradient_clipping=0.3) for dtype, stage in CASES]
    (folder / "configs").write_text(json.dumps(configs))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{Path(python).parent}:{os.environ['PATH']}", "WORLD_SIZE": "4"}
    command = [python, HELPERS / "ds_peer_mpu.py", library, *(folder / name for name in ("configs", "store", "out"))]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-9000:]
    return json.loads((folder / "out").read_text())


@pytest.mark.timeout(700)
def test_losses_and_norms_are_deepspeeds(tmp_path):
    (tmp_path / "ours").mkdir(), (tmp_path / "theirs").mkdir()
    ours = train("deepspeedlite", sys.executable, tmp_path / "ours")
    theirs = train("deepspeed", os.environ["DSL_PEER_PYTHON"], tmp_path / "theirs")
    for (dtype, stage), mine, other in zip(CASES, ours, theirs, strict=True):
        # DeepSpeed 0.19.8 tells no norm at stage 0 in fp32, and in bf16 that of the first rank's pieces: it leaves out
        # what the other has split off. That ours is the whole model's, test_mpu.py shows.
        what = slice(1 if stage == 0 else 2)
        for step, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert a[what] == pytest.approx(b[what], rel=TOLERANCE[dtype]), f"{dtype}, stage {stage}, step {step}"
