"""What users write that is no strict JSON, or asks for what changes nothing: taken, and checked as ever."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
from paths import ROOT

from deepspeedlite.config import load_config
from deepspeedlite.runtime.errors import ConfigError

RELAXED = """
# tuned on the small cluster
{
  // the batch
  train_micro_batch_size_per_gpu: 2,
  "optimizer": {type: "AdamW", params: {lr: 1e-3, betas: [0.9, 0.95,]}},  /* as in the paper */
  zero_optimization: {
    stage: 2   # no comma after this
    overlap_comm: true
  },
}
"""
STRICT = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
}


def refusal(source) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


def test_comments_and_unquoted_keys(tmp_path):
    pytest.importorskip("hjson")
    path = tmp_path / "ds_config.json"
    path.write_text(RELAXED)
    assert load_config(path) == load_config(STRICT) and load_config(path).raw == STRICT
    braced = RELAXED[RELAXED.index("{") :]
    assert load_config(base64.urlsafe_b64encode(braced.encode()).decode()).raw == STRICT


def test_mistakes_in_a_relaxed_file_are_found(tmp_path):
    """Unknown and repeated keys and wrong types as in JSON; what is neither JSON nor Hjson, by both."""
    pytest.importorskip("hjson")
    path = tmp_path / "ds_config.json"
    path.write_text("{// c\n train_batch_size: 8, fp16: {enabled: True\n hysteresys: 2, hysteresys: 2}}")
    said = refusal(path)
    assert 'fp16.enabled = "True": must be true or false' in said
    assert "fp16.hysteresys: unknown key" in said or "fp16.hysteresys: the key is given more than once" in said
    path.write_text('{\n  // c\n  "a": }')
    said = refusal(path)
    assert f"{path}:2:3: not valid JSON" in said and "nor is it Hjson" in said and "line 3 column 8" in said


def test_plain_json_needs_no_hjson(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(STRICT))
    code = f"""
import sys
from deepspeedlite.config import load_config
load_config({str(path)!r}, world_size=1)
sys.exit("hjson" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_hjson_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hjson", None)
    for text in (RELAXED, "{train_batch_size: 8}", "{'train_batch_size': 8}", '{"train_batch_size": 8,}'):
        path = tmp_path / "ds_config.json"
        path.write_text(text)
        assert "pip install hjson" in refusal(path)


def test_0_and_1_are_false_and_true():
    config = load_config(
        {
            "bf16": {"enabled": 1},
            "wall_clock_breakdown": 0,
            "zero_optimization": {"stage": 1, "overlap_comm": 1, "cpu_offload": 1, "contiguous_gradients": 0},
        }
    )
    assert config.bf16.enabled is True and config.wall_clock_breakdown is False
    assert config.zero_optimization.overlap_comm is True and config.zero_optimization.stage == 1
    assert config.zero_optimization.offload_optimizer.device == "cpu"
    assert "2" in refusal({"bf16": {"enabled": 2}})


@pytest.mark.parametrize(
    "source, said",
    [
        ({"prescale_gradients": True, "gradient_predivide_factor": 2}, "gradient_predivide_factor: changes nothing"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "zero_optimization.offload_param.device: changes nothing below stage 3",
        ),
        # TRL gives a reference model the trained one's section, at stage 0.
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device: changes nothing at stage 0",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device: changes nothing below stage 3",
        ),
    ],
)
def test_combinations_of_which_one_half_changes_nothing(source, said):
    (hint,) = load_config(source).hints
    assert hint.startswith(said)


@pytest.mark.parametrize(
    "source",
    [
        {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bf16"}},
        {"gradient_allreduce_op": "SUM"},
        {"managed_gradient_accumulation": False},
        {"comet": {"enabled": True, "project": "digits", "online": False, "mode": "create"}},
        {"bf16": {"enabled": True, "auto_cast": True}},
    ],
)
def test_taken_and_acted_on(source):
    assert load_config(source).hints == ()
