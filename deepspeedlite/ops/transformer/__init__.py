"""Transformer layers that train: kernels for what stands between their products, and layers made of them.

`functions` are differentiable and can be used alone; `DeepSpeedTransformerLayer` is a layer under DeepSpeed's name.
"""

from deepspeedlite.ops.transformer.config import DeepSpeedTransformerConfig, TransformerConfig
from deepspeedlite.ops.transformer.dropout import NO_DROPOUT, Dropout, draw_stream
from deepspeedlite.ops.transformer.functions import Norm, bias_gelu_linear, drop_add, drop_add_norm, dropout_attention
from deepspeedlite.ops.transformer.layer import DeepSpeedTransformerLayer

__all__ = [
    "NO_DROPOUT",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "Dropout",
    "Norm",
    "TransformerConfig",
    "bias_gelu_linear",
    "draw_stream",
    "drop_add",
    "drop_add_norm",
    "dropout_attention",
]
