"""Block-sparse attention: patterns, the function that computes only the blocks of one, and modules made of it."""

from deepspeedlite.ops.sparse_attention.block_lists import BlockLists
from deepspeedlite.ops.sparse_attention.function import sparse_attention
from deepspeedlite.ops.sparse_attention.sparsity_config import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
    sparsity_of,
)

__all__ = [
    "BSLongformerSparsityConfig",
    "BigBirdSparsityConfig",
    "BlockLists",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparsityConfig",
    "VariableSparsityConfig",
    "sparse_attention",
    "sparsity_of",
]
