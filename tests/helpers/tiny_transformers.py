"""Tiny random models of transformers' families, by name: what inference is tested with. Nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

torch.set_num_threads(1)  # other tests run beside these, and two threads would wait for each other
VOCABULARY = 99  # which 2 and 4 ranks have unequal parts of
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **_NO_TOKENS}
_LLAMA |= {"num_attention_heads": 4}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_NO_TOKENS}

# By name: the class, its configuration's, and what is asked of it.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 2}),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 24}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_LLAMA, "num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "num_key_value_heads": 2}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**_LLAMA, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_LLAMA, "intermediate_size": 256}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 64, "max_position_embeddings": 64, **_NO_TOKENS, "pad_token_id": 1},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_NO_TOKENS},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_LLAMA, "ffn_hidden_size": 96, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-7b": ("FalconForCausalLM", "FalconConfig", {**_LLAMA, "ffn_hidden_size": 96, "multi_query": True}),
    "falcon-rw": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_LLAMA, "ffn_hidden_size": 96, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", {**_LLAMA, "max_position_embeddings": 64}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_LLAMA, "max_position_embeddings": 64, "pad_token_id": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "feed_forward_proj": "gated-gelu"},
    ),
}  # fmt: skip
ENCODERS = ("bert", "roberta")


def tiny(family: str, **changes: Any) -> Any:
    """A model of a family, with the same random values every time; norms and biases too."""
    transformers: Any = importlib.import_module("transformers")  # late: what only lists families needs none
    model_class, config_class, given = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**given, **changes})).eval()
    with torch.no_grad():
        for param in made.parameters():
            param.add_(torch.randn_like(param) * (0.05 if param.dim() > 1 else 0.1))
    return made


def prompts(pad: str = "", rows: int = 2, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Prompts of random tokens with their mask; the second one three tokens shorter where `pad` is left or right."""
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if pad:
        padded = slice(0, 3) if pad == "left" else slice(tokens - 3, tokens)
        ids[1, padded], mask[1, padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: Callable[..., Any], family: str, pad: str = "") -> torch.Tensor:
    """What a model or its engine makes of the prompts; zero where there is padding."""
    given = prompts(pad)
    if family == "t5":
        found: torch.Tensor = model(**given, decoder_input_ids=given["input_ids"][:, :4]).logits
        return found
    logits: torch.Tensor = model(**given).logits
    return logits * given["attention_mask"][..., None]
