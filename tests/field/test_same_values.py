"""What public functions return, and the shapes that they take and give, beside DeepSpeed 0.19.8: both are called.

`helpers/same_calls.py` has the calls. Each library makes them under the name deepspeed, alone and on two ranks; results
are compared one by one, and what differs must be in `KNOWN`, with the reason; what no longer differs must not be there.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from deepspeedlite.compat.drop_in.modules import MODULES
from deepspeedlite.launcher.stand_in import folder as stand_in

TABLE = MODULES.items()
CALLS = ROOT / "tests" / "helpers" / "same_calls.py"
# Of the result's path, and why it is another one here.
KNOWN = {
    "engine_*.get_batch_info": "the numbers; DeepSpeed gives its methods",
    "engine_*.get_global_grad_norm": "a number, at stage 0 too; DeepSpeed gives a tensor, or None at stage 0",
    "engine_stage_0.*.safe_get_full_*": "the values at stage 0 too; DeepSpeed gives None",
    "checkpoints.none": "(None, {}), which can be asked; DeepSpeed gives (None, None)",
    "accelerator.current_device": "a number on CPUs too, where DeepSpeed gives LOCAL_RANK's text",
    "accelerator.is_fp16_supported": "CPUs compute in fp16; DeepSpeed's answers None",
    "accelerator.supported_dtypes": "with fp16",
    "accelerator.op_builder_dir": "where ours are",
    "accelerator.*memory*": "the bytes of this process",
    "flops": "a product is counted once; DeepSpeed counts it once or twice, by what the process has run before",
    "signatures.comm:*_fn": "prof and debug are given by name",
    "signatures.comm:new_group": "the ranks may be left out, and are all",
    "collectives.all_gather_coalesced": "on gloo too, where DeepSpeed's raises",
    "collectives.groups.global of none": "the number, where DeepSpeed asks torch of no group",
    "collectives.groups.all of none": "all ranks; DeepSpeed gives an empty list",
    "groups.*": "answered without an mpu too, where DeepSpeed asserts that there is one",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def called(python: str, world: int, folder: Path, **environ: str) -> list[dict[str, Any]]:
    """Each rank's results."""
    folder.mkdir()
    same = {path: [name for name, entry in names.items() if entry.home and not entry.note] for path, names in TABLE}
    (folder / "names.json").write_text(json.dumps(same))
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        **environ,
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    logs = [folder / f"log{rank}" for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [python, str(CALLS), str(folder)],
            env={**inherited, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def differences(path: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Paths at which two results are not alike; an error is alike if ours may be caught as theirs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            yield from differences(f"{path}.{key}", theirs.get(key, "nothing"), ours.get(key, "nothing"))
    elif path.startswith("signatures."):
        if "nothing" not in (theirs, ours) and ours[: len(theirs)] != theirs:  # a wrapper or a class does not tell,
            yield path  # and more of our own may follow
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        found = [one for pair in zip(theirs, ours) for one in differences(path, *pair)]
        yield from found[:1]
    elif isinstance(theirs, float) and isinstance(ours, (int, float)):
        if not math.isclose(theirs, ours, rel_tol=1e-4, abs_tol=5e-5):
            yield path
    elif isinstance(theirs, str) and isinstance(ours, str) and theirs.startswith("raises"):
        if theirs.split()[1] not in ours.split():
            yield path
    elif theirs != ours:
        yield path


def test_differences_are_found():
    def at(theirs: Any, ours: Any) -> list[str]:
        return list(differences("x", theirs, ours))

    assert at({"a": 1.0, "b": [1, "y"]}, {"a": 1.00001, "b": [1, "y"]}) == []
    assert at({"a": 1.0}, {"a": 1.1}) == ["x.a"] and at({"a": 1}, {}) == ["x.a"] and at([1, 2], [1]) == ["x"]
    assert at("raises ValueError", "raises ConfigError DeepSpeedLiteError ValueError") == []
    assert at("raises ValueError", "raises TypeError") == ["x"] and at(True, None) == ["x"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_values_are_those_of_the_real_deepspeed(world, tmp_path):
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    theirs = called(os.environ["DSL_PEER_PYTHON"], world, tmp_path / "theirs")
    ours = called(sys.executable, world, tmp_path / "ours", PYTHONPATH=f"{stand_in()}:{ROOT}")
    wrong, met = [], set()
    for rank, (one, other) in enumerate(zip(theirs, ours)):
        broken = [name for name, found in one.items() if isinstance(found, str) and found.startswith("raises")]
        assert broken == [], "calls that DeepSpeed cannot be asked"
        for path in (path for case in one for path in differences(case, one[case], other.get(case))):
            matching = [pattern for pattern in KNOWN if fnmatch.fnmatch(path, pattern)]
            met.update(matching)
            if not matching:
                wrong.append(f"rank {rank}: {path}")
    assert not wrong, "\n".join(wrong)
    assert met == set(KNOWN), f"no longer differ: {sorted(set(KNOWN) - met)}"
