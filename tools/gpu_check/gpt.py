"""The GPT that is trained in figures: examples/gpt's, as large as this device's memory lets every contender be."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tools.gpu_check.setting import ROOT, Setting

sys.path.insert(0, str(ROOT / "benchmarks"))
from training import GPT, GPTConfig

Batch = tuple[torch.Tensor, torch.Tensor]
# By the free memory that they need in GiB: width, layers, context, sequences of a rank. Adam in 16 bits takes 16 bytes
# of a parameter, unsharded; what a peer keeps beside it, and activations, about as much again.
SIZES = (
    (30, {"width": 1280, "layers": 24, "context": 1024}, 4),
    (10, {"width": 1024, "layers": 12, "context": 1024}, 4),
    (0, {"width": 512, "layers": 8, "context": 512}, 4),
)
TINY = {"width": 64, "layers": 2, "context": 16}


def sizes(setting: Setting) -> tuple[GPTConfig, int]:
    """The model's sizes, and how many sequences a rank has in a step; the same on every rank of like devices."""
    if setting.tiny:
        return GPTConfig(vocabulary=128, heads=4, tied_head=False, **TINY), 2
    free_gib = setting.device.free_bytes() / 2**30
    shape, sequences = next((shape, count) for least, shape, count in SIZES if free_gib >= least)
    return GPTConfig(vocabulary=32768, heads=shape["width"] // 64, tied_head=False, **shape), sequences


def fresh(config: GPTConfig) -> GPT:
    """The same weights for every contender."""
    torch.manual_seed(0)
    return GPT(config)


def batch(config: GPTConfig, sequences: int, setting: Setting) -> Batch:
    """This rank's tokens and targets, on its device."""
    generator = torch.Generator().manual_seed(setting.rank)
    tokens = torch.randint(0, config.vocabulary, (sequences, config.context + 1), generator=generator)
    on_device = tokens.to(setting.device.torch_device)
    return on_device[:, :-1].contiguous(), on_device[:, 1:].contiguous()


def engine_config(zero: dict[str, Any], sequences: int) -> dict[str, Any]:
    """What our engine and DeepSpeed's both read."""
    return {
        "train_micro_batch_size_per_gpu": sequences,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
