"""LLaMA-Factory on deepspeedlite, by the configurations that it ships: the losses of its own data parallelism.

It pins older versions of transformers and TRL than the other clients are tested with, so it has its own environment,
whose Python DSL_LLAMAFACTORY_PYTHON names (`make test-llamafactory` makes one). With DSL_PEER_PYTHON the same trainings
run on the real DeepSpeed too.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
from drive import run

STEPS = 4
KINDS = [("sft", "full"), ("sft", "lora"), ("dpo", "full"), ("dpo", "lora")]
pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(900)]


@functools.cache
def losses(engine: str, task: str, tuning: str, stage: int, variant: str = "", bf16: bool = False) -> list[float]:
    """Of the first steps, as LLaMA-Factory logs them."""
    python = os.environ.get("DSL_LLAMAFACTORY_PYTHON")
    if not python:
        pytest.skip("needs LLaMA-Factory, whose environment DSL_LLAMAFACTORY_PYTHON names: make test-llamafactory")
    job: dict[str, Any] = {"task": task, "tuning": tuning, "stage": stage, "variant": variant, "bf16": bf16}
    return run("llamafactory", engine, python=python, steps=STEPS, **job)["losses"]


@pytest.mark.parametrize("stage, variant", [(2, ""), (3, ""), (2, "_offload"), (3, "_offload")])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_are_those_without_deepspeed(task, tuning, stage, variant):
    expected = losses("none", task, tuning, 0)
    assert len(expected) == STEPS and len(set(expected)) > 1
    assert losses("lite", task, tuning, stage, variant) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_in_bf16(task, tuning, stage):
    expected = losses("none", task, tuning, 0, bf16=True)
    assert losses("lite", task, tuning, stage, bf16=True) == pytest.approx(expected, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task, tuning", KINDS)
def test_losses_are_the_real_deepspeed_s(task, tuning, stage):
    if not os.environ.get("DSL_PEER_PYTHON"):
        pytest.skip("needs the real DeepSpeed, whose Python DSL_PEER_PYTHON names")
    assert losses("lite", task, tuning, stage) == pytest.approx(losses("peer", task, tuning, stage), rel=2e-5)
