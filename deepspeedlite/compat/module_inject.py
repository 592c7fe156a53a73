"""`replace_transformer_layer`: BERT's layers in a model become `DeepSpeedTransformerLayer`, and back again.

[Note: a layer of two classes]
Transformers' models look for their own layer class: to collect hidden states, and to recompute activations where
`gradient_checkpointing_enable` asks for it. So the layer that is put in derives from the class that it takes the place
of as well, of which it uses neither constructor nor forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from deepspeedlite.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.runtime.log import log_once

Model = TypeVar("Model", bound=nn.Module)

# Where a layer has its parts: those of queries, keys and values, then as the parameters of our layer are named.
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_POST_NORM = {
    "attn_o": "attention.output.dense",
    "attn_n": "attention.output.LayerNorm",
    "inter_": "intermediate.dense",
    "output_": "output.dense",
    "norm_": "output.LayerNorm",
}
_PRE_NORM = {
    **_POST_NORM,
    "attn_n": "PostAttentionLayerNorm",
    "inter_": "intermediate.dense_act",
    "norm_": "PreAttentionLayerNorm",
}
_ENDS = {"w": "weight", "b": "bias"}
_GELU = {"gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_NOT_TAKEN = ("encoder_hidden_states", "cache", "past_key_value", "past_key_values", "head_mask")


def replace_transformer_layer(
    orig_layer_impl: type[nn.Module],
    model: Model,
    micro_batch_size: Any = -1,
    config: Any = None,
    seed: Any = -1,
    max_seq_length: int = -1,
    preln: bool | None = None,
    fp16: bool | None = None,
    training: bool = True,
    local_rank: int = -1,
    return_tuple: bool | None = None,
    bert_config: Any = None,
    **others: Any,
) -> Model:
    """Put a `DeepSpeedTransformerLayer` into the place of every `orig_layer_impl` of a BERT-like model.

    Parameters are carried, on their device and of their dtype, so call it before `initialize`;
    `revert_transformer_layer` carries them back.

    Args:
        orig_layer_impl: the class to look for, such as transformers' BertLayer or RobertaLayer.
        model: it is changed, and returned.
        micro_batch_size: taken for DeepSpeed's sake; a batch may have any size.
        config: the model's configuration; its own if left out.
        seed: of the layers' dropout; below 0: torch's.
        max_seq_length: taken for DeepSpeed's sake.
        preln: whether norms come before attention and MLP; None: the layer's names tell.
        fp16: taken for DeepSpeed's sake; the weights' dtype counts.
        training: taken for DeepSpeed's sake; `model.train()` and `model.eval()` count.
        local_rank: the GPU's number.
        return_tuple: whether a layer gives `(hidden_states,)`; None: what the class says of its own forward.
        bert_config: the older name of `config`.
        **others: arguments of DeepSpeed's other releases, such as `policy` and `encoder_decoder`, taken in vain.

    Raises:
        UnsupportedError: there is no such layer, or one that computes something else, such as a decoder's, or the call
            is for inference, which `init_inference` does.
    """
    if "model_config" in others or "checkpoint_dict" in others or not isinstance(seed, int):
        raise UnsupportedError(
            "replace_transformer_layer(..., checkpoint_dict, config, model_config) puts layers in for inference; "
            "init_inference does that. For training, give orig_layer_impl, model and config="
        )
    config = config or bert_config or getattr(model, "config", None)
    if return_tuple is None:
        return_tuple = "tuple" in str(inspect.signature(orig_layer_impl.forward).return_annotation).lower()
    found = [place for place in _places(model, orig_layer_impl) if not isinstance(place[2], DeepSpeedTransformerLayer)]
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no {orig_layer_impl.__name__} to replace")
    for parent, name, layer in found:
        before = hasattr(layer, "PreAttentionLayerNorm") if preln is None else preln
        ours = DeepSpeedTransformerConfig(
            **_sizes(config, layer, before),
            local_rank=local_rank,
            seed=seed,
            pre_layer_norm=before,
            return_tuple=return_tuple,
            training=layer.training,
        )
        setattr(parent, name, _fused(layer, ours))
    if hasattr(model, "save_pretrained"):
        log_once("replaced layers have names of their own: before save_pretrained, call revert_transformer_layer")
    return model


def revert_transformer_layer(
    orig_layer_impl: type[nn.Module], model: Model, config: Any = None, preln: bool | None = None
) -> Model:
    """Put an `orig_layer_impl(config)` into every `DeepSpeedTransformerLayer`'s place, with its parameters' values.

    Args:
        orig_layer_impl: the class that was replaced.
        model: it is changed, and returned; `engine.module` after training.
        config: the model's configuration; its own if left out.
        preln: whether norms come before attention and MLP; None: the layer knows.

    Raises:
        UnsupportedError: there is no such layer, or its parameters are sharded.
    """
    config = config or getattr(model, "config", None)
    found = list(_places(model, DeepSpeedTransformerLayer))
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no DeepSpeedTransformerLayer to revert")
    for _, name, layer in found:  # all of them before the first is put back
        _check_whole((f"{name}.{one}", parameter) for one, parameter in layer.named_parameters())
    for number, (parent, name, layer) in enumerate(found):
        numbered = {"layer_idx": number} if "layer_idx" in inspect.signature(orig_layer_impl).parameters else {}
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
            restored = orig_layer_impl(config, **numbered)
        before = layer.config.pre_layer_norm if preln is None else preln
        for end, attribute in _ENDS.items():
            fused = cast(nn.Parameter, getattr(layer, f"attn_qkv{end}"))
            for where, values in zip(_QKV, fused.detach().chunk(3), strict=True):
                _put(restored, where, attribute, values, fused.requires_grad)
            for ours, where in _names(restored, before).items():
                parameter = getattr(layer, ours + end)
                _put(restored, where, attribute, parameter.detach(), parameter.requires_grad)
        setattr(parent, name, restored.train(layer.training))
    return model


def module_inject(
    layer_obj: type[nn.Module],
    model: Model,
    config: Any,
    micro_batch_size: int,
    max_seq_length: int,
    seed: int,
    preln: bool,
    fp16: bool = True,
) -> Model:
    """`replace_transformer_layer` under the name, and with the order of arguments, that it had first."""
    return replace_transformer_layer(layer_obj, model, micro_batch_size, config, seed, max_seq_length, preln, fp16)


def _places(model: nn.Module, wanted: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, wanted):
                yield parent, name, child


def _names(layer: nn.Module, before: bool) -> dict[str, str]:
    names = _PRE_NORM if before else _POST_NORM
    if hasattr(cast(Any, layer).intermediate, "dense_act"):
        names = {**names, "inter_": _PRE_NORM["inter_"]}
    return names


def _sizes(config: Any, layer: nn.Module, before: bool) -> dict[str, Any]:
    activation = getattr(config, "hidden_act", "gelu")
    if activation not in _GELU:
        raise UnsupportedError(f"hidden_act={activation!r}: the layer's MLP has one of {', '.join(_GELU)}")
    if getattr(config, "is_decoder", False):
        raise UnsupportedError("is_decoder=True: the layer is an encoder's, without a cache and cross-attention")
    inter = attrgetter(_names(layer, before)["inter_"])(layer)
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": inter.weight.shape[0],
        "heads": config.num_attention_heads,
        "attn_dropout_ratio": config.attention_probs_dropout_prob,
        "hidden_dropout_ratio": config.hidden_dropout_prob,
        "num_hidden_layers": config.num_hidden_layers,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": getattr(config, "layer_norm_eps", 1e-12),
        "fp16": inter.weight.dtype == torch.float16,
        "gelu": _GELU[activation],
    }


def _check_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    for name, parameter in named:
        if parameter.numel() == 0:
            raise UnsupportedError(f"{name} is sharded; replace before initialize, revert in GatheredParameters")


def _put(layer: nn.Module, where: str, attribute: str, values: Tensor, requires_grad: bool) -> None:
    setattr(attrgetter(where)(layer), attribute, nn.Parameter(values.clone(), requires_grad=requires_grad))


def _fused(layer: nn.Module, ours: DeepSpeedTransformerConfig) -> nn.Module:
    """Our layer with a layer's parameters; those of queries, keys and values become one."""
    places = (*_QKV, *_names(layer, ours.pre_layer_norm).values())
    tensors: dict[str, list[Tensor]] = {}
    for end, attribute in _ENDS.items():
        tensors[end] = [getattr(attrgetter(where)(layer), attribute) for where in places]
        _check_whole((f"{where}.{attribute}", one) for where, one in zip(places, tensors[end], strict=True))
        if len({tensor.requires_grad for tensor in tensors[end][:3]}) > 1:
            raise UnsupportedError("queries, keys and values become one parameter: freeze all of them or none")
    original: Any = type(layer)
    made: nn.Module = _class_beside(original)(ours, tensors["w"], tensors["b"])
    for end in _ENDS:
        getattr(made, f"attn_qkv{end}").requires_grad_(tensors[end][0].requires_grad)
    return made.train(layer.training)


class _Replacement(DeepSpeedTransformerLayer):
    """Called as the models of transformers call their layers."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **named: Any
    ) -> Tensor | tuple[Tensor]:
        """The layer's result; what asks for nothing else is passed over."""
        if any(one is not None for one in (*others[:1], *map(named.get, _NOT_TAKEN))):
            raise UnsupportedError("the layer is an encoder's: it takes no cache, head_mask or other hidden states")
        return super().forward(hidden_states, attention_mask)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self).__mro__[type(self).__mro__.index(_Bare) + 1],), self.__dict__


class _Bare(nn.Module):
    """Between our layer and the class that it takes the place of, whose constructor it leaves out."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


@cache
def _class_beside(original: Any) -> Any:
    """Our layer's class where `original` is looked for. See the note above."""
    return type(f"Fused{original.__name__}", (_Replacement, _Bare, original), {"__module__": __name__})


def _unpickled(original: Any) -> nn.Module:
    made: type[nn.Module] = _class_beside(original)
    return made.__new__(made)
