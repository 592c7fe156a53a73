"""Fused blocks beside the models that they replace: logits and tokens, family by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deepspeedlite.runtime.errors import UnsupportedError

transformers = pytest.importorskip("transformers")

from families import DECODERS, ENCODERS, prompts, tiny  # noqa: E402

from deepspeedlite.inference.blocks import fuse  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def both(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A model, and a fused copy of it."""
    plain = tiny(name, dtype, **changes)
    fused = copy.deepcopy(plain)
    lines = fuse(fused, dtype=dtype, max_tokens=64, batch=2)
    assert any(line.endswith(" fused") for line in lines), lines
    return plain, fused


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def greedy(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, **more)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    """Logits in fp32 at every token that is no padding, and greedy tokens, with either padding and without."""
    plain, fused = both(name)
    for pad in ("", "left", "right"):
        inputs = prompts(pad=pad)
        wanted, found = logits(plain, **inputs), logits(fused, **inputs)
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-5)
        assert torch.equal(greedy(fused, inputs), greedy(plain, inputs)), pad or "whole"


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_bf16(name):
    """As near to the fp32 model as the plain bf16 model is, or 2e-2 of the largest logit beside that one."""
    exact = logits(tiny(name), **prompts())
    plain, fused = both(name, torch.bfloat16)
    wanted, found = logits(plain, **prompts()), logits(fused, **prompts())
    beside = (found - wanted).abs().max() / exact.abs().max()
    assert beside <= 2e-2 or (found - exact).abs().mean() <= 1.1 * (wanted - exact).abs().mean()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    plain, fused = both(name)
    for pad in ("", "left", "right"):
        inputs = prompts(pad=pad)
        seen = inputs["attention_mask"].bool()
        with torch.no_grad():
            wanted, found = (model(**inputs, output_hidden_states=True) for model in (plain, fused))
        torch.testing.assert_close(found.logits[seen], wanted.logits[seen], rtol=0, atol=1e-5)
        for mine, theirs in zip(found.hidden_states, wanted.hidden_states):
            torch.testing.assert_close(mine[seen], theirs[seen], rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedError, match="never whole"):
        fused(**prompts(), output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_every_way_to_generate(name):
    """Beams, sampling with a seed, no cache, and several calls in sequence, each with other lengths."""
    plain, fused = both(name)
    inputs = prompts(pad="left")
    for more in (
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 7},
    ):
        assert torch.equal(greedy(fused, inputs, **more), greedy(plain, inputs, **more)), more
    drawn = []
    for model in (plain, fused):
        torch.manual_seed(3)
        drawn.append(model.generate(**inputs, max_new_tokens=10, do_sample=True, top_k=5, temperature=0.8))
    assert torch.equal(*drawn)
    longer = prompts(batch=5, tokens=70)  # more than the cache was made for
    assert torch.equal(greedy(fused, longer), greedy(plain, longer))
    assert torch.equal(greedy(fused, inputs), greedy(plain, inputs))


def test_streamer_and_stopping():
    plain, fused = both("llama")

    class Tokens(transformers.generation.BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    def after_five(input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 25)

    inputs, streamers = prompts(batch=1), [Tokens(), Tokens()]
    found = [
        greedy(model, inputs, streamer=streamer, stopping_criteria=transformers.StoppingCriteriaList([after_five]))
        for model, streamer in zip((plain, fused), streamers)
    ]
    assert torch.equal(*found) and found[0].shape == (1, 25)
    assert streamers[0].seen == streamers[1].seen
