"""The static cache of fused models: whose memory it is, and what users do with caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deepspeedlite.runtime.errors import UnsupportedError

transformers = pytest.importorskip("transformers")

from families import prompts, tiny  # noqa: E402
from test_blocks import both, greedy, logits, one_thread  # noqa: E402, F401

from deepspeedlite.inference.blocks import fuse  # noqa: E402
from deepspeedlite.inference.kv_cache import StaticKVLayer  # noqa: E402


def caches(model: Any) -> dict[str, Any]:
    """What users give a model as a cache, empty, and None."""
    config = model.config
    return {
        "none": None,
        "dynamic": transformers.DynamicCache(),
        "dynamic of a configuration": transformers.DynamicCache(config=config),
        "static": transformers.StaticCache(config=config, max_cache_len=40),
    }


@pytest.mark.slow_unless(name=("llama", "qwen2-some-windows"))
@pytest.mark.parametrize("name", ["llama", "qwen2-some-windows", "bloom", "opt"])
def test_a_conversation(name):
    """A cache goes from call to call, of one token and of several, and holds what it should."""
    plain, fused = both(name)
    ids = prompts(batch=2, tokens=30)["input_ids"]
    wanted = logits(plain, input_ids=ids)
    for kind, cache in caches(fused).items():
        found, at = [], 0
        for tokens in (6, 1, 3, 12, 8):
            with torch.no_grad():
                out = fused(ids[:, at : at + tokens], past_key_values=cache, use_cache=True)
            assert cache is None or out.past_key_values is cache, kind
            cache, at = out.past_key_values, at + tokens
            found.append(out.logits)
            assert cache.get_seq_length() == at
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=2e-5)
        assert cache.layers[1].keys.shape[2] == 30


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_filled_cache_is_taken_over(name, kind):
    """What the plain model has cached goes on in the fused one, though a window's cache has lost what is outside it."""
    plain, fused = both(name)
    ids = prompts(batch=2, tokens=30)["input_ids"]
    cache = caches(plain)["dynamic of a configuration" if kind == "dynamic" else "static"]
    with torch.no_grad():
        plain(ids[:, :25], past_key_values=cache, use_cache=True)
        found = fused(ids[:, 25:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, logits(plain, input_ids=ids)[:, 25:], rtol=0, atol=2e-5)
    assert isinstance(cache.layers[0], StaticKVLayer)


def test_generate_goes_on_from_a_cache():
    """The prompt's cache, copied, for more than one continuation; and what `generate` returned, with more text."""
    plain, fused = both("llama")
    ids = prompts(batch=1, tokens=12)["input_ids"]
    for more in (ids + 1, ids + 2):
        whole = torch.cat([ids, more], 1)
        found = []
        for model in (plain, fused):
            cache = transformers.DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids, past_key_values=cache)
            once = greedy(
                model, {"input_ids": whole}, past_key_values=copy.deepcopy(cache), return_dict_in_generate=True
            )
            text = torch.cat([once.sequences, ids], 1)
            found.append(greedy(model, {"input_ids": text}, past_key_values=once.past_key_values))
            assert cache.get_seq_length() == 12
        assert torch.equal(*found)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations(implementation):
    plain, fused = both("gemma2")
    inputs = prompts(pad="left")
    wanted = greedy(plain, inputs)
    assert torch.equal(greedy(fused, inputs, cache_implementation=implementation), wanted)


def test_a_kept_cache_keeps_its_memory():
    """Two outputs that are both kept do not share memory; one that is let go leaves its to the next."""
    _, fused = both("llama")
    inputs = prompts(batch=2)
    first = greedy(fused, inputs, return_dict_in_generate=True).past_key_values
    keys = first.layers[0].keys.clone()
    second = greedy(fused, {"input_ids": inputs["input_ids"] + 1}, return_dict_in_generate=True).past_key_values
    assert torch.equal(first.layers[0].keys, keys)
    address = second.layers[0].keys.data_ptr()
    assert address != first.layers[0].keys.data_ptr()
    del second
    third = greedy(fused, inputs, return_dict_in_generate=True).past_key_values
    assert third.layers[0].keys.data_ptr() == address


def test_cropping_and_choosing():
    """Forgetting tokens, and keeping, repeating and reordering sequences, as with a dynamic cache."""
    plain, fused = both("gpt2")
    ids = prompts(batch=3, tokens=20)["input_ids"]
    found = []
    for model in (plain, fused):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.crop(-6)
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(3)
            cache.reorder_cache(torch.tensor([5, 0, 1, 1, 2, 4]))
            found.append(model(ids[:1, :4].expand(6, 4), past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)


def test_a_model_is_copied_with_a_cache_of_its_own():
    plain, fused = both("llama")
    other = copy.deepcopy(fused)
    inputs = prompts(batch=2)
    kept = greedy(fused, inputs, return_dict_in_generate=True)
    assert torch.equal(greedy(other, inputs), kept.sequences)
    assert torch.equal(greedy(plain, inputs), kept.sequences)


def test_in_and_out_of_inference_mode():
    plain, fused = both("llama")
    with torch.inference_mode():
        greedy(fused, prompts(batch=2))
    assert torch.equal(greedy(fused, prompts(batch=2)), greedy(plain, prompts(batch=2)))
    with torch.inference_mode():
        assert torch.equal(greedy(fused, prompts(batch=2)), greedy(plain, prompts(batch=2)))


def test_what_a_fused_model_refuses():
    _, fused = both("llama")
    ids = prompts(batch=2)["input_ids"]
    with pytest.raises(UnsupportedError, match="never whole"):
        fused(ids, output_attentions=True)
    with pytest.raises(UnsupportedError, match="cannot use a EncoderDecoderCache"):
        fused(ids, past_key_values=transformers.EncoderDecoderCache(*(transformers.DynamicCache() for _ in range(2))))
    cache = fused(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="holds 2 sequences, and 1 were given"):
        fused(ids[:1], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="attention_mask is of 20 positions"):
        fused(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
    _, other = both("qwen3")
    with pytest.raises(UnsupportedError, match="a model with other heads"):
        other(ids, past_key_values=cache)
    assert torch.isfinite(logits(fused, input_ids=ids)).all()


def test_hidden_states_and_tuples():
    plain, fused = both("gpt-neox")
    inputs = prompts(batch=2)
    with torch.no_grad():
        wanted, found = (model(**inputs, output_hidden_states=True, use_cache=False) for model in (plain, fused))
        as_tuple = fused(**inputs, return_dict=False, use_cache=False)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    for mine, theirs in zip(found.hidden_states, wanted.hidden_states):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.logits)
    assert found.past_key_values is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_types_of_tokens(name):
    """GPT-2 embeds them; to the others they are a word of the tokenizer's that changes nothing."""
    plain, fused = both(name)
    inputs = prompts(batch=2)
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    torch.testing.assert_close(logits(fused, **inputs), logits(plain, **inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_packed_texts(name):
    """Texts in one sequence, told apart by their positions, where nothing is cached."""
    plain, fused = both(name)
    inputs = {"input_ids": prompts(batch=1)["input_ids"], "use_cache": False}
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    wanted, found = (logits(model, **inputs, position_ids=positions) for model in (plain, fused))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(found, logits(fused, **inputs), atol=1e-3)


def test_choices():
    """GPT-2's second head is given several sequences for each row."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=32, num_labels=1)
    plain = transformers.GPT2DoubleHeadsModel(config).eval()
    fused = copy.deepcopy(plain)
    fuse(fused, dtype=torch.float32, max_tokens=32, batch=2)
    ids = torch.randint(0, 50, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = (model(ids, mc_token_ids=torch.full((2, 3), 6)) for model in (plain, fused))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.mc_logits, wanted.mc_logits, rtol=0, atol=1e-5)


def test_what_is_left_as_it_is():
    """One line says so, and the model is what it was."""
    for model, said in (
        (torch.nn.Linear(2, 2), "of no family"),
        (tiny("gpt2", activation_function="quick_gelu"), "QuickGELU"),
        (
            tiny("bloom", apply_residual_connection_post_layernorm=True),
            "apply_residual_connection_post_layernorm is True",
        ),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lines = fuse(model, dtype=torch.float32, max_tokens=8, batch=1)
        assert len(lines) == 1 and said in lines[0], lines
        assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_weights_are_never_there_twice(name):
    """What fused blocks took is gone, and the head shares its memory with the embedding that it is tied to."""
    model = tiny(name, tie_word_embeddings=True)
    numel = sum(param.numel() for param in model.parameters())
    fuse(model, dtype=torch.float32, max_tokens=8, batch=1)
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    assert sum(kept.values()) <= 4 * numel + 4096


def test_a_head_cast_while_it_is_fused_stays_tied():
    """The embedding is what the head's product reads, in the dtype that was asked for."""
    model = tiny("llama", tie_word_embeddings=True)
    fuse(model, dtype=torch.bfloat16, max_tokens=8, batch=1)
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert embedding.dtype == head.dtype == torch.bfloat16
    assert embedding.data_ptr() == head.data_ptr()
