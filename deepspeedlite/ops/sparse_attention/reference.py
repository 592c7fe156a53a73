"""Block-sparse attention in torch, with all scores at once: what takes the kernels' place where they cannot be had."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeedlite.ops.sparse_attention.block_lists import BlockLists


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    causal: bool,
    biases: list[Tensor],
    dropout_p: float,
) -> Tensor:
    """As `function.sparse_attention`; autograd goes through it. `biases` are added where floats, seen where bool.

    Arithmetic is in float32, or float64 where q is.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT) * scale
    hidden = ~lists.seen
    if causal:
        hidden = hidden | torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    for bias in biases:
        if bias.dtype == torch.bool:
            hidden = hidden | ~bias
        else:
            scores = scores + bias
    scores = scores.masked_fill(hidden, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return (F.dropout(weights, dropout_p) @ v.to(wide)).to(q.dtype)
