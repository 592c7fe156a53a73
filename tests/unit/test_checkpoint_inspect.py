"""What `inspect` shows of a checkpoint, and what `diff` finds between two."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model
from programs import needs
from test_checkpoint_elastic import config, engine_of, train

from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.manifest import Manifest, Parameter, Piece
from deepspeedlite.checkpoint.tensors import read_header
from deepspeedlite.checkpoint.writer import TagWriter


def told(*words: object) -> tuple[int, str]:
    with redirect_stdout(StringIO()) as said:
        status = command([str(word) for word in words])
    return status, said.getvalue()


def write(folder: Path, tensors: dict[str, torch.Tensor], state: dict | None = None, **about) -> Path:
    """A checkpoint of one parameter per tensor named `NAME.KIND`, written without an engine."""
    writer = TagWriter(folder, "t", fsync=False)
    writer.prepare()
    record = writer.write("rank_00000.safetensors", {name: tensor.reshape(-1) for name, tensor in tensors.items()})
    parameters: dict[str, Parameter] = {}
    for name, tensor in tensors.items():
        owner, kind = name.rsplit(".", 1)
        dtype = str(tensor.dtype).removeprefix("torch.") if kind == "weight" else "bfloat16"
        entry = parameters.setdefault(owner, Parameter(owner, tuple(tensor.shape), dtype))
        entry.pieces[kind] = [Piece("rank_00000.safetensors", name, 0, 0, tensor.numel())]
    writer.commit(Manifest([*parameters.values()], {"rank_00000.safetensors": record}, "t", state=state or {}, **about))
    return folder


@needs("c++")
@distributed(world_size=2)
def test_inspect_says_what_is_there_and_where(tmp_path):
    engine = engine_of(tied_model(), config(2, "bf16"))
    train(engine, range(2))
    engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
    if dist.get_rank() != 0:
        return
    status, text = told("inspect", tmp_path)
    assert status == 0 and "step 2, ZeRO stage 2, world size 2" in text
    line = next(line for line in text.splitlines() if line.startswith("embedding.weight"))
    assert "61 x 32" in line and "1,952" in line and "master float32, exp_avg float32" in line
    assert "also head.weight" in line and "step 2.0" in line
    status, text = told("inspect", tmp_path / "global_step2", "--json")
    found = json.loads(text)
    assert status == 0 and found["world_size"] == 2 and found["optimizer"].endswith("Adam")
    assert found["numel"] == sum(p.numel() for p in tied_model().parameters())
    assert found["files"] == {path.name: path.stat().st_size for path in (tmp_path / "global_step2").glob("rank_*")}
    for parameter in found["parameters"]:
        for kind, stored in parameter["stored"].items():
            for piece in stored["pieces"]:
                place = read_header(tmp_path / "global_step2" / piece["file"])[piece["tensor"]]
                assert str(place.dtype) == f"torch.{stored['dtype']}", kind
                assert piece["offset"] + piece["numel"] <= place.shape[0]
            assert sum(piece["numel"] for piece in stored["pieces"]) == parameter["numel"]


@distributed(world_size=2)
def test_what_was_saved_from_another_layout_is_the_same_and_a_step_on_is_not(tmp_path):
    engine = engine_of(tied_model(), config(3, "bf16"))
    train(engine, range(2))
    engine.save_checkpoint(tmp_path / "a")
    other = engine_of(tied_model(seed=1), config(1, "bf16"))
    other.load_checkpoint(tmp_path / "a")
    other.save_checkpoint(tmp_path / "b")
    train(other, range(2, 3))
    other.optimizer.param_groups[0]["lr"] = 0.5
    other.save_checkpoint(tmp_path / "c", client_state={"epoch": torch.arange(3)})
    if dist.get_rank() != 0:
        return
    status, text = told("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0 and "the same" in text and "ZeRO stage 3" in text and "ZeRO stage 1" in text
    status, text = told("diff", tmp_path / "a", tmp_path / "c", "--json")
    differences = json.loads(text)["differences"]
    assert status == 1
    found = {(d["section"], d["where"], d["what"]): d for d in differences}
    assert found["optimizer", "param_groups[0]['lr']", "differs"]["b"] == 0.5
    assert found["run", "engine['global_steps']", "differs"]["a"] == 2
    assert found["run", "client_state['epoch']", "only in B"]
    assert ("optimizer", "norm.bias['step']", "differs") in found
    master = found["parameter", "embedding.weight", f"{61 * 32} of {61 * 32} elements of its master"]
    assert 0 < master["max_abs"] < 0.1
    assert any(key[:2] == ("optimizer", "norm.bias") and "exp_avg_sq" in key[2] for key in found)
    status, text = told("diff", tmp_path / "a", tmp_path / "c")
    assert status == 1 and "more (--json lists all)" in text and f"{len(differences)} differences" in text


def test_every_kind_of_difference_has_its_line(tmp_path):
    nan = float("nan")
    a = {
        "same.weight": torch.tensor([1.0, nan]),
        "nan.weight": torch.tensor([1.0, 2.0, 3.0]),
        "far.weight": torch.tensor([1, 2, 1 << 62]),
        "flag.weight": torch.tensor([True, False]),
        "shape.weight": torch.ones(2, 3),
        "dtype.weight": torch.ones(2),
        "gone.weight": torch.ones(1),
        "state.master": torch.ones(2),
        "state.exp_avg": torch.ones(2),
        "empty.weight": torch.ones(0, 4),
        "cast.master": torch.tensor([1.0, 2.0]),
    }
    b = {
        **a,
        "nan.weight": torch.tensor([1.0, nan, 3.5]),
        "far.weight": torch.tensor([1, 4, 1 << 62]),
        "flag.weight": torch.tensor([True, True]),
        "shape.weight": torch.ones(3, 2),
        "dtype.weight": torch.ones(2, dtype=torch.float16),
        "new.weight": torch.ones(1),
        "cast.weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }
    for name in ("gone.weight", "state.exp_avg", "cast.master"):
        del b[name]
    numbers = {"long": list(range(40)), "short": [1, {"$float": "nan"}], "deep": {"$tuple": [1, "x"]}}
    others = {"long": [0, *range(39)], "short": [1, {"$float": "nan"}], "deep": {"$tuple": [2, "x"]}, "more": None}
    write(tmp_path / "a", a, {"client_state": numbers}, optimizer="SGD")
    write(tmp_path / "b", b, {"client_state": others}, optimizer="Lion", stage=2)
    status, text = told("diff", tmp_path / "a", tmp_path / "b", "--json")
    found = [tuple(d.values()) for d in json.loads(text)["differences"]]
    assert status == 1
    assert sorted(found, key=str) == sorted(
        [
            ("parameter", "nan", "2 of 3 elements of its weight", None, None, "inf"),
            ("parameter", "far", "1 of 3 elements of its weight", None, None, 2.0),
            ("parameter", "flag", "1 of 2 elements of its weight", None, None, 1.0),
            ("parameter", "shape", "shape", [2, 3], [3, 2], None),
            ("parameter", "dtype", "dtype", "float32", "float16", None),
            ("parameter", "gone", "only in A", None, None, None),
            ("parameter", "new", "only in B", None, None, None),
            ("optimizer", "state", "exp_avg only in A", None, None, None),
            ("optimizer", "class", "differs", "SGD", "Lion", None),
            ("run", "client_state['long']", "39 of 40 values", None, None, None),
            ("run", "client_state['deep'][0]", "differs", 1, 2, None),
            ("run", "client_state['more']", "only in B", None, None, None),
        ],
        key=str,
    )
    assert told("diff", tmp_path / "b", tmp_path / "b")[0] == 0


def test_names_are_no_markup_and_what_cannot_be_read_is_told(tmp_path, capsys):
    write(tmp_path / "a", {"a[red]b.weight": torch.ones(1)})
    assert "a[red]b" in told("inspect", tmp_path / "a")[1]
    assert told("inspect", tmp_path / "none")[0] == 1
    assert told("diff", tmp_path / "a", tmp_path / "none")[0] == 2
    assert capsys.readouterr().err.count("is no checkpoint") == 2
    with pytest.raises(SystemExit) as ended:
        command(["diff", str(tmp_path)])
    assert ended.value.code == 2


@pytest.mark.slow
def test_a_diff_needs_little_memory(tmp_path):
    big = torch.arange(24 << 20, dtype=torch.float32)  # 96 MiB
    write(tmp_path / "a", {"big.master": big})
    big[-1] += 1 << 30
    write(tmp_path / "b", {"big.master": big})
    code = (
        "import resource, sys\nfrom deepspeedlite.checkpoint.__main__ import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main(sys.argv[1:]) == 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 of 25165824 elements" in done.stdout
    assert int(done.stdout.split()[-1]) < 60_000, "KiB"
