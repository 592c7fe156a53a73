"""One script written for DeepSpeed's pipelines, run on the real DeepSpeed and, unchanged, here: the same losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from paths import BOOT, ROOT

STAND_IN = ROOT / "deepspeedlite" / "drop_in" / "stand_in"
RANKS = 2

SCRIPT = """
import argparse, json, os, sys
{boot}
import torch
import torch.nn.functional as F
import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from deepspeed.runtime.pipe.engine import PipelineEngine
from models import VOCABULARY, WIDTH, tokens


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 64), torch.nn.Linear(64, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Embed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(VOCABULARY, WIDTH)

    @property
    def weight(self):
        return self.word_embeddings.weight

    def forward(self, ids):
        return self.word_embeddings(ids)


def loss_fn(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batches(replica):
    step = 0
    while True:
        yield tokens(step, 0, replica)
        step += 1


torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo")


def train(job):
    torch.manual_seed(1)
    first, last = (TiedLayerSpec("embed", Embed, tied_weight_attr="weight", **more)
                   for more in ({{}}, {{"forward_fn": lambda embed, x: F.linear(x, embed.weight)}}))
    specs = [first, *[LayerSpec(Block, WIDTH) for _ in range(3)], last]
    net = PipelineModule(
        layers=specs,
        topology=PipeDataParallelTopology(num_pp=job["stages"], num_dp=2 // job["stages"]),
        loss_fn=loss_fn,
        seed_layers=True,
        seed_fn=lambda seed: torch.manual_seed(int(seed)),  # DeepSpeed's own takes no number of the kind it is given
        partition_method="type:block|embed",
        activation_checkpoint_interval=job["interval"],
        checkpointable_layers=["Block"],
    )
    config = {{
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": job["clip"],
        "zero_optimization": {{"stage": job["stage"]}},
        "zero_allow_untested_optimizer": True,
        **job.get("more", {{}}),
    }}
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, eps=1e-4)
    engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    assert isinstance(engine, PipelineEngine)
    replica = engine.grid.get_data_parallel_rank()
    data = batches(replica)
    losses = [float(engine.train_batch(data_iter=data)) for _ in range(4)]
    if engine.is_first_stage() or engine.is_last_stage():
        engine.set_dataiterator(data)
    losses.append(float(engine.train_batch()))
    losses.append(float(engine.eval_batch(batches(replica))))
    losses.append(float(engine.train_batch()))
    return losses


print("LOSSES" + json.dumps([train(job) for job in json.loads(os.environ["JOBS"])]))
"""


JOBS = [
    {"stages": 2, "stage": 0, "clip": 0.0, "interval": 0},
    {"stages": 2, "stage": 1, "clip": 0.5, "interval": 1},
    {"stages": 1, "stage": 1, "clip": 0.5, "interval": 0},
    {"stages": 2, "stage": 1, "clip": 1.0, "interval": 0, "more": {"bf16": {"enabled": True}}},
]


def losses(python: str, script: Path, stand_in: bool) -> list[tuple[list[float], ...]]:
    """Of every job, of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "LOCAL_RANK")}
    environ = kept | {"JOBS": json.dumps(JOBS), "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(RANKS)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(python).parent}:{environ['PATH']}"  # another ninja would compile DeepSpeed's ops anew
    environ |= {"PYTHONPATH": f"{STAND_IN}{os.pathsep}{ROOT}"} if stand_in else {}
    ranks = [
        subprocess.Popen(
            [python, str(script)],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=script.parent,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(text[-4000:] for text in said)
    told = [json.loads(text.partition("LOSSES")[2].splitlines()[0]) for text in said]
    return [*zip(*told, strict=True)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and DeepSpeed's losses."""
    if "DSL_PEER_PYTHON" not in os.environ:
        pytest.skip("needs the real DeepSpeed: set DSL_PEER_PYTHON to the Python of an environment that has it")
    script = tmp_path_factory.mktemp("pipe") / "train.py"
    script.write_text(SCRIPT.format(boot=BOOT))
    return (
        losses(sys.executable, script, stand_in=True),
        losses(os.environ["DSL_PEER_PYTHON"], script, stand_in=False),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(JOBS)), ids=[f"{job['stages']} stages, ZeRO {job['stage']}, {[*job][4:]}" for job in JOBS]
)
def test_the_losses_are_deepspeed_s(both, number):
    ours, theirs = both[0][number], both[1][number]
    assert ours[0] == ours[1]
    assert ours[0] == pytest.approx(theirs[0], rel=5e-3 if "more" in JOBS[number] else 2e-5)
