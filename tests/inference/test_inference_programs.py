"""What users type: the bench command and the examples, on tiny models in folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from tiny_transformers import tiny

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights and a tokenizer of words."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    words = {f"w{number}": number for number in range(99)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(path)
    return path


def run(*command: str | Path, ranks: int = 1, given: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", str(ranks)] if ranks > 1 else []
    python = [] if ranks > 1 else [sys.executable]
    return subprocess.run(
        [*launcher, *python, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        input=given,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_bench_beside_transformers(folder):
    ran = run(
        "-m", "deepspeedlite.inference", "bench", folder, "--new", "4", "--prompt", "8", "--rounds", "1", "--json"
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert [one["name"] for one in told["found"]] == ["transformers", "init_inference fused"]
    for one in told["found"]:
        assert one["decode_tokens_per_s"] > 0 and one["prompt_tokens_per_s"] > 0 and one["bandwidth_share"] > 0
        assert one["weights_bytes"] >= 2 * 70_000 and one["load_s"] > 0


@pytest.mark.slow
def test_bench_in_words(folder, tmp_path):
    """Without weights there are random ones; what is wrong is said in a line."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    command = ("-m", "deepspeedlite.inference", "bench")
    ran = run(*command, tmp_path, "--new", "2", "--prompt", "4", "--rounds", "1", "--unfused", "--alone")
    assert ran.returncode == 0, ran.stderr
    assert "random weights in bf16: 1 x 4 tokens, 2 new ones" in ran.stdout
    assert "init_inference unfused" in ran.stdout and "of read bandwidth" in ran.stdout
    ran = run(*command, tmp_path / "nowhere")
    assert ran.returncode == 2 and "has no config.json" in ran.stderr
    ran = run(*command, folder, "--new", "1")
    assert ran.returncode == 1 and "ConfigError: bench: --new must be 2 at least" in ran.stderr


@pytest.mark.slow
def test_example_streams_text(folder):
    """The tokens of the model itself; two prompts by standard input, too, and on two ranks."""
    import torch

    model = tiny("llama")
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    text = " ".join(f"w{token}" for token in wanted.tolist())
    example = ROOT / "examples" / "inference" / "generate.py"
    arguments = (folder, "--new_tokens", "4", "--dtype", "fp32", "--unfused")
    ran = run(example, *arguments, "--prompt", "w5 w6 w7")
    assert ran.returncode == 0, ran.stderr
    assert text in ran.stdout and "[4 tokens, " in ran.stdout
    ran = run(example, *arguments, given="w5 w6 w7\nw1\n")
    assert ran.returncode == 0 and text in ran.stdout and ran.stdout.count("[4 tokens") == 2
    ran = run(example, *arguments, "--prompt", "w5 w6 w7", ranks=2)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert text in ran.stdout and ran.stdout.count("[4 tokens") == 1


@pytest.mark.slow
def test_gpt_writes_what_it_has_learnt(tmp_path):
    """A training over two ranks, and its checkpoint in the other example."""
    small = ("--steps", "4", "--width", "32", "--layers", "2", "--context", "32", "--text_bytes", "200000")
    examples = ROOT / "examples" / "gpt"
    ran = run(examples / "train.py", *small, "--save", tmp_path / "gpt", ranks=2)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = run(examples / "generate.py", tmp_path / "gpt", "--prompt", "class ", "--new_bytes", "20")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("class ") and "[20 bytes, " in ran.stdout


_KILLED = """
import os, signal, sys, torch, deepspeedlite
sys.path.insert(0, sys.argv[-1])
from tiny_transformers import prompts, tiny
engine = deepspeedlite.init_inference(tiny("llama"), dtype="fp32", mp_size=2)
seen = 0
def count(*_):
    global seen
    seen += 1
    if seen == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
engine.module.register_forward_hook(count)
engine.generate(**prompts(), max_new_tokens=30, do_sample=False)
print("generated")
"""


@pytest.mark.slow
def test_killed_rank_ends_the_others(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    began_s = time.monotonic()
    ran = run(script, ROOT / "tests" / "helpers", ranks=2)
    assert ran.returncode != 0 and "generated" not in ran.stdout
    assert "rank 1 failed first" in ran.stdout + ran.stderr and "SIGKILL" in ran.stdout + ran.stderr
    assert time.monotonic() - began_s < 90
