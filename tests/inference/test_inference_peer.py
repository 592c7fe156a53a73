"""The real DeepSpeed's `init_inference` beside ours, both over two ranks: the same logits."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import distributed
from paths import HELPERS
from programs import needs
from tiny_transformers import logits_of, tiny

import deepspeedlite

pytest.importorskip("transformers")
SPLIT_BY_BOTH = ["llama", "mistral", "gpt-neox", "opt", "bloom", "t5"]


def _no_peer() -> str | None:
    python = os.environ.get("DSL_PEER_PYTHON")
    if not python:
        return "needs DSL_PEER_PYTHON: the Python of an environment with DeepSpeed"
    asked = subprocess.run([python, "-c", "import transformers"], capture_output=True)
    return "needs transformers in the environment of DSL_PEER_PYTHON" if asked.returncode else None


pytestmark = [pytest.mark.slow, needs(unless=_no_peer)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DeepSpeed makes of the families, and of one that it does not split."""
    out = tmp_path_factory.mktemp("peer") / "logits.pt"
    python = os.environ["DSL_PEER_PYTHON"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    world |= {
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HELPERS),
    }
    command = [python, str(HELPERS / "ds_peer_inference.py"), str(out), *SPLIT_BY_BOTH, "gpt2"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), told[0][-3000:]
    return out


@distributed(world_size=2, timeout_s=120)
def test_same_logits(theirs):
    found: dict[str, Any] = torch.load(theirs)
    for family in SPLIT_BY_BOTH:
        engine = deepspeedlite.init_inference(tiny(family), dtype=torch.float32, tensor_parallel={"tp_size": 2})
        torch.testing.assert_close(logits_of(engine, family), found[family], rtol=1e-5, atol=1e-5, msg=family)
    assert "AutoTP not supported" in found["gpt2"]  # which ours splits: see test_tensor_parallel
