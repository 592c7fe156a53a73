"""Linear layers and embeddings of which every rank of a group has a part, with a forward and a backward pass.

Weights are in torch's layout, `[out, in]`, so that a part is read like a smaller `nn.Linear`. What they are parts of is
`pieces.Piece`'s to say. Parameters that are parts carry Megatron's mark, `tensor_model_parallel`, by which norms of the
whole model count them on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deepspeedlite.comm import Group
from deepspeedlite.parallel.tensor.collectives import copy_in, gather_out, slice_in, sum_out


def _part(param: torch.nn.Parameter) -> torch.nn.Parameter:
    param.__dict__["tensor_model_parallel"] = True
    return param


class _SplitLinear(torch.nn.Module):
    """What both ways to split a linear layer have."""

    def __init__(
        self,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        group: Group,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.weight = _part(weight)
        self.bias = bias
        self.group = group
        self.parts = parts

    @property
    def in_features(self) -> int:
        """Columns of the input, of this rank's where it is split."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Columns of the output, of this rank's where it is split."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.in_features}, {self.out_features}; one of {self.group.size} ranks, bias={self.bias is not None}"


class ColumnParallelLinear(_SplitLinear):
    """This rank's output columns of a linear layer; the input is whole on every rank.

    Args:
        weight: `[out of this rank, in]`.
        bias: `[out of this rank]`, or None.
        group: the ranks that have the other columns.
        parts: output columns of every rank, where the output is to be gathered and whole; None: it stays split.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        group: Group,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(weight, None if bias is None else _part(bias), group, parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out of this rank]`, or `[..., out]` where the output is gathered."""
        out = F.linear(copy_in(x, self.group), self.weight, self.bias)
        return out if self.parts is None else gather_out(out, self.group, self.parts)


class RowParallelLinear(_SplitLinear):
    """This rank's input columns of a linear layer, whose outputs are summed over the ranks.

    Args:
        weight: `[out, in of this rank]`.
        bias: `[out]`, whole on every rank, added once, after the sum; or None.
        group: the ranks that have the other columns.
        parts: input columns of every rank, where the input comes whole and is to be sliced; None: it comes split.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in of this rank]` to `[..., out]`; `[..., in]` where the input comes whole."""
        if self.parts is not None:
            x = slice_in(x, self.group, self.parts)
        out = sum_out(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(torch.nn.Module):
    """This rank's rows of an embedding; what tokens of other ranks' rows are comes by a sum.

    Args:
        weight: `[rows of this rank, width]`.
        group: the ranks that have the other rows.
        first: the first token that is this rank's.
        padding_idx: as in `nn.Embedding`; only kept.
        scale: what outputs are multiplied by, if anything (Gemma).
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,
        group: Group,
        first: int,
        padding_idx: int | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = _part(weight)
        self.group = group
        self.first = first
        self.padding_idx = padding_idx
        self.register_buffer("embed_scale", scale, persistent=False)
        self.embed_scale: torch.Tensor | None

    @property
    def embedding_dim(self) -> int:
        """Width."""
        return self.weight.shape[1]

    @property
    def num_embeddings(self) -> int:
        """Rows of this rank."""
        return self.weight.shape[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[...]` tokens to `[..., width]`."""
        own = tokens - self.first
        others = (own < 0) | (own >= self.num_embeddings)
        out = F.embedding(own.masked_fill(others, 0), self.weight)
        out = sum_out(out.masked_fill(others.unsqueeze(-1), 0), self.group)
        return out if self.embed_scale is None else out * self.embed_scale.to(out.dtype)

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.num_embeddings} rows of {self.group.size} ranks, {self.embedding_dim}"
