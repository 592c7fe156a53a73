"""Fused blocks beside the models that they replace: logits and tokens, family by family."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from harness import distributed

import deepspeedlite
from deepspeedlite.runtime.errors import UnsupportedError

transformers = pytest.importorskip("transformers")

from families import DECODERS, ENCODERS, prompts, tiny  # noqa: E402

from deepspeedlite.inference.blocks import fuse  # noqa: E402
from deepspeedlite.inference.blocks.block import FusedBlock  # noqa: E402
from deepspeedlite.ops.transformer_inference import PackedLinear  # noqa: E402


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
    alone = prompts(batch=1)
    assert torch.equal(greedy(fused, alone), greedy(plain, alone))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_bf16(name):
    """Within 2e-2 of the fp32 model (of its largest logit), where the plain bf16 model is that itself; else as near."""
    exact = logits(tiny(name), **prompts())
    plain, fused = both(name, torch.bfloat16)
    wanted, found = logits(plain, **prompts()), logits(fused, **prompts())
    bound = 2e-2 * exact.abs().max()
    if (wanted - exact).abs().max() <= bound:
        assert (found - exact).abs().max() <= bound
    else:
        beside = (found - wanted).abs().max()
        assert beside <= bound or (found - exact).abs().mean() <= 1.1 * (wanted - exact).abs().mean()
    if name in ENCODERS:
        return
    kept = {"return_dict_in_generate": True, "output_logits": True}
    theirs, mine = greedy(plain, prompts(), **kept), greedy(fused, prompts(), **kept)
    for row in range(3):  # the same tokens, up to one where two are as good within the bound
        for step, scores in enumerate(theirs.logits):
            best = scores[row].float().topk(2)
            if best.values[0] - best.values[1] <= 2 * bound:
                break
            assert mine.logits[step][row].argmax() == best.indices[0], (row, step)


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
    alone = prompts(batch=1)
    assert torch.equal(greedy(fused, alone, prompt_lookup_num_tokens=3), greedy(plain, alone))
    longer = prompts(batch=5, tokens=70)  # more than the cache was made for
    assert torch.equal(greedy(fused, longer), greedy(plain, longer))
    assert torch.equal(greedy(fused, inputs), greedy(plain, inputs))


def test_generations_in_threads():
    """Beside each other, on one model: each has memory of its own."""
    plain, fused = both("llama")
    found: dict[int, list[torch.Tensor]] = {}

    def generate(tokens: int) -> None:
        found[tokens] = [greedy(fused, prompts(batch=2, tokens=tokens)) for _ in range(3)]

    threads = [threading.Thread(target=generate, args=(tokens,)) for tokens in (10, 13, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens, texts in found.items():
        wanted = greedy(plain, prompts(batch=2, tokens=tokens))
        assert all(torch.equal(text, wanted) for text in texts)
    assert len(found) == 3


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


@distributed(world_size=2, timeout_s=120)
def test_split_over_two_ranks():
    """Fused after splitting: heads, ALiBi's slopes and gathered heads are the rank's own, sums are of both."""
    torch.set_num_threads(1)
    for name in ("llama", "gpt2", "bloom"):
        plain = tiny(name)
        config = {"dtype": torch.float32, "tensor_parallel": {"tp_size": 2}, "replace_with_kernel_inject": True}
        engine = deepspeedlite.init_inference(copy.deepcopy(plain), config=config)
        assert any(isinstance(part, FusedBlock) for part in engine.module.modules()), name
        inputs = prompts(pad="left")
        seen = inputs["attention_mask"].bool()
        wanted, found = logits(plain, **inputs), logits(engine.module, **inputs)
        torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-5)
        assert torch.equal(greedy(engine, inputs), greedy(plain, inputs)), name
        engine.destroy()


def rounded(model: Any, bits: int) -> Any:
    """The model with the weights that are left of it in so many bits; its head keeps 8."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            turned = isinstance(module, transformers.pytorch_utils.Conv1D)
            weight = module.weight.detach().t() if turned else module.weight.detach()
            packed = PackedLinear.pack(weight, bits=8 if module is head else bits, group_size=32)
            kept = packed.dequantized()
            module.weight = torch.nn.Parameter(kept.t().contiguous() if turned else kept.clone())
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bits(name, bits):
    """Quantized: the model that has the rounded weights, and not the one that has the whole ones."""
    plain = tiny(name, tie_word_embeddings=False)
    fused = copy.deepcopy(plain)
    fuse(fused, dtype=torch.float32, max_tokens=64, batch=2, bits=bits, group_size=32)
    whole, found = logits(plain, **prompts()), logits(fused, **prompts())
    wanted = logits(rounded(plain, bits), **prompts())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)
    assert (found - whole).abs().mean() > 5 * (found - wanted).abs().mean()
    assert torch.equal(greedy(fused, prompts(batch=1)), greedy(plain, prompts(batch=1)))


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_rotary_scalings(scaling):
    """Frequencies are those of the model's own module, those that change with the length too."""
    more = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
        },
        "longrope": {
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0, "original_max_position_embeddings": 16
        },
    }[scaling]  # fmt: skip
    parameters = {"rope_type": scaling, "rope_theta": 10000.0, **more}
    plain, fused = both("llama", rope_parameters=parameters, max_position_embeddings=24)
    inputs = prompts(batch=2)
    torch.testing.assert_close(logits(fused, **inputs), logits(plain, **inputs), rtol=0, atol=1e-5)
    assert torch.equal(greedy(fused, inputs), greedy(plain, inputs))


def test_weights_that_are_filled_block_by_block():
    """A model on the meta device, given its weights as it is fused."""
    plain = tiny("llama")
    with torch.device("meta"):
        empty = type(plain)(plain.config).eval()
    assert "not loaded" in fuse(empty, dtype=torch.float32, max_tokens=8, batch=1)[0]
    names = {module: name for name, module in empty.named_modules()}
    filled = []

    def fill(module):
        filled.append(names[module])
        for name, param in [*module.named_parameters(), *module.named_buffers()]:
            if param.is_meta:
                path, _, last = name.rpartition(".")
                owner = module.get_submodule(path)
                value = plain.get_submodule(names[owner]).__getattr__(last).detach().clone()
                setattr(owner, last, torch.nn.Parameter(value) if last in owner._parameters else value)

    fuse(empty, dtype=torch.float32, max_tokens=8, batch=1, fill=fill)
    assert filled == ["model.layers.0", "model.layers.1", "model", "lm_head"]
    assert torch.equal(greedy(empty, prompts()), greedy(plain, prompts()))
