"""Engines of transformers' models beside the models themselves: the calls that public code makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import deepspeedlite
from deepspeedlite.runtime.errors import InferenceError

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def prompts(pad: str = "") -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if pad:
        padded = slice(0, 3) if pad == "left" else slice(4, 7)
        ids[1, padded], mask[1, padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.slow_unless(pad="left")
@pytest.mark.parametrize("pad", ["", "left", "right"])
def test_generate_is_the_models(arguments, pad):
    model = llama()
    expected = copy.deepcopy(model)
    engine = deepspeedlite.init_inference(model, dtype=torch.float32)
    torch.manual_seed(3)
    wanted = expected.generate(**prompts(pad), max_new_tokens=6, **arguments)
    torch.manual_seed(3)
    assert torch.equal(engine.generate(**prompts(pad), max_new_tokens=6, **arguments), wanted)


def test_streamer_and_stopping_criteria():
    class Seen:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    engine = deepspeedlite.init_inference(llama(), dtype=torch.float32)
    seen = Seen()
    one = {name: tensor[:1] for name, tensor in prompts().items()}

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 10)

    out = engine.generate(**one, max_new_tokens=9, do_sample=False, streamer=seen, stopping_criteria=[stop])
    assert seen.tokens == [*out[0].tolist(), -1] and out.shape == (1, 10)


def test_encoder_decoder():
    model = t5()
    wanted = model.generate(**prompts("right"), max_new_tokens=5, do_sample=False)
    engine = deepspeedlite.init_inference(model, dtype=torch.float32, injection_policy=None, return_tuple=False)
    assert torch.equal(engine.generate(**prompts("right"), max_new_tokens=5, do_sample=False), wanted)


def test_what_stays_fp32_stays():
    """T5 says that its `wo` overflow in fp16."""
    engine = deepspeedlite.init_inference(t5(), dtype=torch.half)
    kept = {name for name, param in engine.module.named_parameters() if param.dtype == torch.float32}
    assert kept and all(".wo." in name for name in kept)
    assert engine.generate(**prompts(), max_new_tokens=2).shape == (2, 3)


def test_as_tutorials_call_it():
    """DeepSpeed's tutorial: the keywords of every age, and the module that comes back."""
    wanted = llama()(**prompts()).logits
    for keywords in (
        {"mp_size": 1, "dtype": torch.float, "replace_method": "auto", "replace_with_kernel_inject": False},
        {"tensor_parallel": {"tp_size": 1}, "dtype": torch.float32, "checkpoint": None},
        {"config": {"tensor_parallel": {"enabled": True, "tp_size": 1}, "dtype": "torch.float32"}},
    ):
        ds_engine = deepspeedlite.init_inference(llama(), **keywords)
        model = ds_engine.module
        torch.testing.assert_close(model(**prompts()).logits, wanted)
        torch.testing.assert_close(ds_engine(**prompts()).logits, wanted)


def test_model_of_a_pipeline():
    """`pipe.model = init_inference(pipe.model, ...)`, whatever the pipeline then asks its model for."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]")
    pipe = transformers.pipeline("text-generation", model=llama(), tokenizer=fast, device="cpu")
    wanted = pipe("a b c", max_new_tokens=4, do_sample=False)
    pipe.model = deepspeedlite.init_inference(pipe.model, dtype=torch.float32)
    assert pipe("a b c", max_new_tokens=4, do_sample=False) == wanted
    given = transformers.pipeline("text-generation", model=pipe.model, tokenizer=fast, device="cpu")
    assert given("a b c", max_new_tokens=4, do_sample=False) == wanted


def test_prompts_that_are_too_long():
    engine = deepspeedlite.init_inference(llama(), dtype=torch.float32, max_tokens=8, min_tokens=2)
    with pytest.raises(InferenceError, match=r"a prompt of 7 tokens and 2 to follow .*max_out_tokens = 8"):
        engine.generate(**prompts(), max_new_tokens=1)
    with pytest.raises(InferenceError, match="a prompt of 14 tokens"):
        engine.generate(torch.cat([prompts()["input_ids"]] * 2, 1), max_new_tokens=1)
    short = {name: tensor[:, :6] for name, tensor in prompts().items()}
    assert engine.generate(**short, max_new_tokens=1).shape == (2, 7)


def test_logits_that_are_no_numbers():
    """They are an error, greedy too, and the engine goes on when they are numbers again."""
    engine = deepspeedlite.init_inference(llama(), dtype=torch.float32)
    weight = engine.module.lm_head.weight
    before = weight[5].detach().clone()
    with torch.no_grad():
        weight[5] = float("nan")
    with pytest.raises(InferenceError, match=r"logits hold NaN or infinity \(pass 1 of this call\)"):
        engine.generate(**prompts(), max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        weight[5] = before
    assert engine.generate(**prompts(), max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_times_of_passes_in_generate():
    engine = deepspeedlite.init_inference(llama(), dtype=torch.float32)
    engine.profile_model_time()
    engine.generate(**prompts(), max_new_tokens=4, do_sample=False)
    assert len(engine.model_times()) == 4


@pytest.mark.slow
def test_transformers_is_not_imported_by_us():
    import subprocess
    import sys

    code = "import sys, torch, deepspeedlite; deepspeedlite.init_inference(torch.nn.Linear(2, 2), dtype='fp32')"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'transformers' not in sys.modules"], capture_output=True
    )
    assert ran.returncode == 0, ran.stderr.decode()
