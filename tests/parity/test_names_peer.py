"""What functions and classes that scripts import from DeepSpeed give, beside DeepSpeed's own: one script, run by both.

Here it runs under the name deepspeed, in DSL_PEER_PYTHON with the real one; both print what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import HELPERS, ROOT, TESTS

from deepspeedlite.checkpoint.formats import open_checkpoint
from deepspeedlite.checkpoint.formats.deepspeed.writer import export_to_deepspeed
from deepspeedlite.launcher.stand_in import with_stand_in

SCRIPT = HELPERS / "ds_names.py"


@pytest.mark.slow
def test_names_give_what_deepspeeds_give(tmp_path: Path) -> None:
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    for stage in (2, 3):
        with open_checkpoint(str(TESTS / "unit" / "checkpoint_of_two_ranks"), f"stage{stage}") as reader:
            export_to_deepspeed(reader, tmp_path / f"theirs{stage}", stage, 2).rename(tmp_path / f"stage{stage}")
    ours = with_stand_in({**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    theirs = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answers = []
    for python, environ in ((sys.executable, ours), (os.environ["DSL_PEER_PYTHON"], theirs)):
        environ = {**environ, "DS_ACCELERATOR": "cpu"}
        argv = [python, str(SCRIPT), str(tmp_path)]
        done = subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(json.loads(done.stdout.rpartition("ANSWER")[2]))
    assert answers[0].keys() == answers[1].keys()
    different = {key: (answers[0][key], answers[1][key]) for key in answers[0] if answers[0][key] != answers[1][key]}
    assert not different
