"""The families of transformers whose blocks are fused: one row of data for each, and no class for any.

A row says what a block is made of and where its parts are in transformers' own modules, as attribute paths from the
block (or from the model that holds the blocks). What the modules themselves tell (a norm's kind and epsilon, the
scale of attention, whether there are biases, how many heads a rank has, which activation) is read from them and is
not in the table.

A family that is not here stays as transformers made it. To add one that is made of the same parts: a row, and its tiny
configuration in tests/inference/families.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Residual = Literal["pre", "post", "sandwich", "parallel"]
Positions = Literal["rotary", "learned", "alibi", "embedded"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's blocks are made of, and where its parts are. Paths are attributes joined by dots."""

    # Classes, by name: a block's, and that of the model which holds the blocks.
    layer: str
    holder: str
    # An encoder keeps transformers' forward of the model, and only its blocks are replaced.
    is_encoder: bool = False

    # In the holder.
    layers: str = "layers"
    embedding: str = "embed_tokens"
    embedding_norm: str | None = None
    # Types of tokens are rows of the embedding too (GPT-2); elsewhere they change nothing.
    embeds_types: bool = False
    # Between an embedding and a block of other widths (OPT).
    project_in: str | None = None
    project_out: str | None = None
    final_norm: str = "norm"
    positions: Positions = "rotary"
    rotary: str = "rotary_emb"
    # Learned positions: the table, what is added to a position, and whether padding is left out of the count where no
    # positions are given (elsewhere they are counted from the cache's length).
    position_table: str | None = None
    position_offset: int = 0
    positions_skip_padding: bool = False

    # In a block. `residual` is where norms stand: before each half of the block, after it, on both sides, or before
    # both halves that run beside each other.
    residual: Residual = "pre"
    # (key of the configuration, what the arrangement is where that key is false)
    residual_unless: tuple[str, Residual] | None = None
    # In the order in which they are used; where parallel halves share one norm there is one.
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    # Gemma's: a weight is stored as its difference from one.
    unit_offset: bool = False

    attention: str = "self_attn"
    # q, k and v, or one that holds all three: stacked, or (`qkv_by_head`) each head's q, k and v beside each other.
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_by_head: bool = False
    # Norms over each head's queries and keys; a family may have them by configuration, so that they may be absent.
    qk_norms: tuple[str, str] | None = None
    out: str = "self_attn.o_proj"
    # In the attention's module.
    head_dim: str = "head_dim"
    scale: str = "scaling"
    softcap: str | None = None
    # Where the sliding window is: in the attention's module, or `config.KEY`.
    window: str | None = None

    # Gate and up, or one that holds both (`gated` says which it is where there is one).
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"

    # (key of the configuration, the value that it must have): with another, the block is made of something else.
    only_if: tuple[tuple[str, Any], ...] = ()


_LLAMA = Family(layer="LlamaDecoderLayer", holder="LlamaModel")


def _like_llama(name: str, **changes: Any) -> Family:
    """Llama's row for a family whose classes are called `name`, with what differs."""
    fields = {field: getattr(_LLAMA, field) for field in _LLAMA.__dataclass_fields__}
    return Family(**{**fields, "layer": f"{name}DecoderLayer", "holder": f"{name}Model", **changes})


_BERT_LAYER: dict[str, Any] = {
    "is_encoder": True,
    "layers": "encoder.layer",
    "positions": "embedded",
    "residual": "post",
    "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
    "attention": "attention.self",
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": "attention.output.dense",
    "head_dim": "attention_head_size",
    "up": ("intermediate.dense",),
    "gated": False,
    "down": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
    "only_if": (("is_decoder", False), ("add_cross_attention", False)),
}

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    _like_llama("Mistral", window="config.sliding_window"),
    _like_llama("Qwen2", window="sliding_window"),
    _like_llama("Qwen3", window="sliding_window", qk_norms=("self_attn.q_norm", "self_attn.k_norm")),
    _like_llama("Gemma", unit_offset=True, only_if=(("use_bidirectional_attention", None),)),
    _like_llama(
        "Gemma2",
        unit_offset=True,
        residual="sandwich",
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        softcap="attn_logit_softcapping",
        window="sliding_window",
        only_if=(("use_bidirectional_attention", None),),
    ),
    _like_llama(
        "Phi",
        final_norm="final_layernorm",
        residual="parallel",
        norms=("input_layernorm",),
        qk_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        out="self_attn.dense",
        up=("mlp.fc1",),
        gated=False,
        down="mlp.fc2",
        activation="mlp.activation_fn",
    ),
    _like_llama(
        "Phi3",
        qkv=("self_attn.qkv_proj",),
        up=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
        window="config.sliding_window",
    ),
    Family(
        layer="GPT2Block",
        holder="GPT2Model",
        layers="h",
        embedding="wte",
        embeds_types=True,
        final_norm="ln_f",
        positions="learned",
        position_table="wpe",
        norms=("ln_1", "ln_2"),
        attention="attn",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        up=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
        activation="mlp.act",
        only_if=(("add_cross_attention", False),),
    ),
    Family(
        layer="GPTNeoXLayer",
        holder="GPTNeoXModel",
        embedding="embed_in",
        final_norm="final_layer_norm",
        residual="parallel",
        residual_unless=("use_parallel_residual", "pre"),
        attention="attention",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        out="attention.dense",
        head_dim="head_size",
        up=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
    ),
    Family(
        layer="OPTDecoderLayer",
        holder="OPTDecoder",
        project_in="project_in",
        project_out="project_out",
        final_norm="final_layer_norm",
        positions="learned",
        position_table="embed_positions",
        position_offset=2,
        positions_skip_padding=True,
        residual_unless=("do_layer_norm_before", "post"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        out="self_attn.out_proj",
        up=("fc1",),
        gated=False,
        down="fc2",
        activation="activation_fn",
    ),
    Family(
        layer="BloomBlock",
        holder="BloomModel",
        layers="h",
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        positions="alibi",
        attention="self_attention",
        qkv=("self_attention.query_key_value",),
        qkv_by_head=True,
        out="self_attention.dense",
        scale="inv_norm_factor",
        up=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
        activation="mlp.gelu_impl",
        only_if=(("apply_residual_connection_post_layernorm", False), ("slow_but_exact", False)),
    ),
    Family(layer="BertLayer", holder="BertModel", **_BERT_LAYER),
    Family(layer="RobertaLayer", holder="RobertaModel", **_BERT_LAYER),
)

BY_HOLDER: dict[str, Family] = {family.holder: family for family in FAMILIES}

# What the kernels call an activation, by the class of its module in torch or transformers.
ACTIVATIONS: dict[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "ReLU": "relu",
}
