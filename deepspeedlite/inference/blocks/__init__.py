"""Fused blocks for transformers' models: what `replace_with_kernel_inject` does.

`fuse` takes a model whose blocks are in the table (`families`), and gives it blocks that are made for generating:
packed products, norms fused with sums, positions fused with the write to a static cache, attention of decode steps in
one kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepspeedlite.inference.blocks.families import BY_HOLDER

__all__ = ["fuse"]


def fuse(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    max_tokens: int,
    batch: int,
    bits: int | None = None,
    group_size: int = 64,
    fill: Callable[[nn.Module], None] | None = None,
) -> list[str]:
    """Replace the blocks of `model` in place by fused ones, where they are of a family that is known.

    Args:
        model: with its weights, on its device. What fused blocks take is gone from the modules that had it, layer by
            layer; the model then has other names in its state dict for everything in its blocks (see `FusedBlock`),
            and for its head, where that became a packed product (`weight`, as before, but where it is quantized).
            Embeddings and the last norm keep theirs.
        dtype: of activations and of weights that are not quantized.
        max_tokens: positions that the cache has room for at first. It grows.
        batch: sequences, likewise.
        bits: None, 8 or 4: how weights are kept.
        group_size: numbers that have one scale.
        fill: where weights are still on the meta device: gives a module its own. Called with each block before it is
            packed, then with what holds the blocks, for what is beside them, then with the head.

    Returns:
        A line for each kind of module that was replaced, or stays as it is, and why.
    """
    if "transformers" not in sys.modules:
        return ["no block was fused: the model is none of transformers'"]
    from deepspeedlite.inference.blocks.build import Fusion, freeze
    from deepspeedlite.inference.blocks.parts import Packing

    packing = Packing(dtype=dtype, bits=bits, group_size=group_size)
    fusion = Fusion(packing=packing, max_tokens=max_tokens, batch=batch, fill=fill)
    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if type(module).__name__ in BY_HOLDER
    ]
    if not found:
        return [f"no block was fused: {type(model).__name__} is of no family that has fused blocks"]
    lines = [fusion.fuse_blocks(name, holder) for name, holder in found]
    if any(line.endswith(" fused") for line in lines):
        if not any(BY_HOLDER[type(holder).__name__].is_encoder for _, holder in found):
            lines += fusion.fuse_head(model, getattr(model, "get_output_embeddings", lambda: None)())
        freeze(model, dtype)
    return lines
