"""A Llama's rates through `init_inference` and by itself: of a prompt, and of each further token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tools.gpu_check.setting import NotHereError, Rows, Setting

FULL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
FULL |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64}
# By name: the words of the inference configuration, or None for the module itself.
WAYS: dict[str, dict[str, Any] | None] = {
    "the module itself": None,
    "ours": {"replace_with_kernel_inject": True},
    "ours, int8": {"replace_with_kernel_inject": True, "quant": {"enabled": True, "weight": {"num_bits": 8}}},
    "ours, int4": {"replace_with_kernel_inject": True, "quant": {"enabled": True, "weight": {"num_bits": 4}}},
}
CLOSE = 0.05  # of the largest logit, in bf16


def rows(setting: Setting) -> Rows:
    """One for each way and batch; ours must say what the module says."""
    expected: dict[str, torch.Tensor] = {}
    for name, config in WAYS.items():
        yield setting.tried(f"{name}: logits", partial(logits, config, setting, expected))
        for batch in (1,) if setting.tiny else (1, 8):
            work = partial(rates, config, batch, setting)
            yield setting.tried(f"{name}, batch {batch}", work, judges=False)


def made(config: dict[str, Any] | None, setting: Setting) -> Any:
    """The model, or our engine of it: the same random weights."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise NotHereError(f"transformers is not installed: {error}") from None
    torch.manual_seed(0)
    sizes = LlamaConfig(**(TINY if setting.tiny else FULL), tie_word_embeddings=False)
    sizes.eos_token_id = sizes.pad_token_id = None
    model = LlamaForCausalLM(sizes).eval().to(setting.device.torch_device, torch.bfloat16)
    if config is None:
        return model
    import deepspeedlite

    return deepspeedlite.init_inference(model, config={"dtype": "bf16", **config})


def prompt(batch: int, setting: Setting) -> torch.Tensor:
    """Random tokens."""
    length = 8 if setting.tiny else 128
    drawn = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(1))
    return drawn.to(setting.device.torch_device)


def logits(config: dict[str, Any] | None, setting: Setting, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Those of the prompt's last token beside the module's. Raises AssertionError where bf16 does not explain it."""
    with torch.inference_mode():
        found = made(config, setting)(prompt(2, setting)).logits[:, -1].float().cpu()
    exact = expected.setdefault("module", found)
    off = float((found - exact).abs().max() / exact.abs().max())
    quantized = config is not None and "quant" in config
    assert found.isfinite().all(), "logits are not finite"
    assert off <= CLOSE or quantized, f"logits are off by {off:.3g} of the largest"
    return {"logits_off": off}


def rates(config: dict[str, Any] | None, batch: int, setting: Setting) -> dict[str, Any]:
    """Tokens per second, of a prompt and then one by one."""
    generates: Callable[..., Any] = made(config, setting).generate
    given, new = prompt(batch, setting), 4 if setting.tiny else 64
    seconds = {1: math.inf, new: math.inf}
    for count in (1, new) * 3:  # the first of each warms up
        setting.device.synchronize()
        begun_s = time.perf_counter()
        with torch.inference_mode():
            generates(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        setting.device.synchronize()
        seconds[count] = min(seconds[count], time.perf_counter() - begun_s)
    decode_s = (seconds[new] - seconds[1]) / (new - 1)
    return {
        "prompt_ms": seconds[1] * 1e3,
        "prompt_tokens_per_s": given.numel() / seconds[1],
        "decode_ms": decode_s * 1e3,
        "decode_tokens_per_s": batch / decode_s,
    }
