"""Tensor parallelism: layers whose weights are split over a group of ranks, and what of a model is split how."""

from deepspeedlite.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from deepspeedlite.parallel.tensor.pieces import Piece
from deepspeedlite.parallel.tensor.split import split_model

__all__ = ["ColumnParallelLinear", "Piece", "RowParallelLinear", "VocabParallelEmbedding", "split_model"]
