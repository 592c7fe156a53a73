"""A process that compiles nothing never imports torch's compiler; in one that does, torch's methods are its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT
from programs import needs

SCRIPT = """
import sys, torch, deepspeedlite

config = {"train_batch_size": 1, "zero_optimization": {"stage": 2}}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.1}}
engine, optimizer, *_ = deepspeedlite.initialize(model=torch.nn.Linear(4, 4), config=config)
methods = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")

def step():
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.optimizer.zero_grad()

def torchs_own():
    made = [getattr(getattr(torch.optim.Optimizer, name).__wrapped__, "__dynamo_disable", None) for name in methods]
    return [method is not None and method.__module__.startswith("torch.") for method in made]

step()
assert "torch._dynamo" not in sys.modules and not any(torchs_own())
before = [param.clone() for param in engine.module.parameters()]
compiled = torch.compile(torch.sin, backend="eager", fullgraph=True)
assert torch.equal(compiled(torch.ones(2)), torch.sin(torch.ones(2)))
step()
torch.optim.SGD(list(torch.nn.Linear(2, 2).parameters())).state_dict()
optimizer.optimizer.load_state_dict(optimizer.optimizer.state_dict())
assert all(torchs_own()), torchs_own()
assert not torch.equal(before[0], next(engine.module.parameters()))
"""


@pytest.mark.slow
@needs("c++")  # torch's own optimizers import it with their first step
def test_the_compiler_is_imported_by_who_compiles():
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
