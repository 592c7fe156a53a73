"""Tiny random models of the families that have fused blocks, for tests: hidden 64, two layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # other tests run beside these, and two threads would wait for each other
VOCABULARY = 101
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {"intermediate_size": 96, "max_position_embeddings": 128}
_GQA = {"num_key_value_heads": 2}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# name -> (configuration's class, what it is given beside the sizes above)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_WIDE, **_GQA}),
    "llama-biases": ("LlamaConfig", {**_WIDE, **_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {**_WIDE, **_GQA, "tie_word_embeddings": True}),
    "mistral-window": ("MistralConfig", {**_WIDE, **_GQA, "sliding_window": 14}),
    "qwen2-some-windows": (
        "Qwen2Config",
        {**_WIDE, **_GQA, "use_sliding_window": True, "sliding_window": 14, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_WIDE, **_GQA, "head_dim": 32}),
    "gemma": ("GemmaConfig", {**_WIDE, "num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_WIDE, **_GQA, "head_dim": 32, "sliding_window": 14, "query_pre_attn_scalar": 32}),
    "phi": ("PhiConfig", {**_WIDE, "partial_rotary_factor": 0.5}),
    "phi-norms": ("PhiConfig", {**_WIDE, **_GQA, "qk_layernorm": True}),
    "phi3": ("Phi3Config", {**_WIDE, **_GQA}),
    "gpt2": ("GPT2Config", {"n_positions": 128}),
    "gpt-neox": ("GPTNeoXConfig", {**_WIDE}),
    "gpt-neox-in-turn": ("GPTNeoXConfig", {**_WIDE, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64}),
    "opt-norms-after": (
        "OPTConfig",
        {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "bloom": ("BloomConfig", {}),
    "bloom-6-heads": ("BloomConfig", {"hidden_size": 96, "num_attention_heads": 6}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_WIDE}),
    "roberta": ("RobertaConfig", {**_WIDE}),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with weights that make logits of about 5, so that differences show."""
    kind, more = {**DECODERS, **ENCODERS}[name]
    config = getattr(transformers, kind)(**{**_SIZES, **_TOKENS, **more, **changes})
    auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModelForMaskedLM
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator) * (0.15 if param.dim() > 1 else 0.1)
            param.copy_(noise if param.dim() > 1 else param + noise)
    return model.to(dtype)


def prompts(batch: int = 3, tokens: int = 20, pad: str = "") -> dict[str, torch.Tensor]:
    """Tokens, and a mask: the first prompt is whole, the others are padded on the side that is named."""
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(1, batch) if pad else ():
        count = 2 + 3 * row
        mask[row, slice(0, count) if pad == "left" else slice(tokens - count, tokens)] = 0
    ids = torch.where(mask == 1, ids, 0)
    return {"input_ids": ids, "attention_mask": mask}
