"""transformers' ways to a model at stage 3: a new head, other numbers of tokens, constructors; as unsharded."""

from __future__ import annotations

import pytest
from drive import run
from test_clients import need

CASES = ["head", "80", "40", "81"]  # tokens, of 64
pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(900)]


def check(found: dict, exact: tuple[str, ...] = ()) -> None:
    for case, what in found["cases"].items():
        assert what["losses"] == pytest.approx(what["expected"], rel=2e-5), case
        assert what["losses"][0] != what["losses"][-1] and what["sharded"] > 10, case
        if case.isdigit():
            assert [int(case), 32] in what["shapes"].values()
        if case in exact:  # as built or loaded without sharding, with the same seed
            assert [name for name, same in what["same"].items() if not same] == [], case


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_new_head_and_resized_embeddings(world, tied, tmp_path):
    need("trainer")
    check(run("pretrained", "lite", world, stage=3, tied=tied, cases=CASES, dir=str(tmp_path)), ("head", "40"))


@pytest.mark.parametrize("world", [1, 2])
def test_models_initialised_by_their_constructors(world, tmp_path):
    need("trainer")
    cases = ["constructor", "config"]  # the latter draws in another order under stage 3
    found = run("pretrained", "lite", world, stage=3, tied=False, cases=cases, dir=str(tmp_path))
    check(found, ("constructor",))
