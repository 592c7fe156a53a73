"""Block-sparse attention: patterns, the function that computes only the blocks of one, and modules made of it."""

from deepspeedlite.ops.sparse_attention.bert_sparse_self_attention import BertSparseSelfAttention
from deepspeedlite.ops.sparse_attention.block_lists import BlockLists
from deepspeedlite.ops.sparse_attention.function import sparse_attention
from deepspeedlite.ops.sparse_attention.sparse_attention_utils import SparseAttentionUtils
from deepspeedlite.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
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
    "BertSparseSelfAttention",
    "BigBirdSparsityConfig",
    "BlockLists",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparseAttentionUtils",
    "SparseSelfAttention",
    "SparsityConfig",
    "VariableSparsityConfig",
    "sparse_attention",
    "sparsity_of",
]
