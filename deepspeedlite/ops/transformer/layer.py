"""A transformer layer that trains, pre- or post-layer-norm (BERT's: Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeedlite.ops.transformer.config import DeepSpeedTransformerConfig
from deepspeedlite.ops.transformer.dropout import NO_DROPOUT, Dropout, draw_stream
from deepspeedlite.ops.transformer.functions import (
    Norm,
    bias_gelu_linear,
    checked_mask,
    drop_add,
    drop_add_norm,
    dropout_attention,
)
from deepspeedlite.runtime.errors import ConfigError, OpError

Dropouts = tuple[Dropout, Dropout, Dropout]
_WEIGHTS = 8  # in initial_weights and initial_biases: q, k, v, attn_o, attn_n, inter, output, norm


class DeepSpeedTransformerLayer(nn.Module):
    """Self-attention and an MLP with GELU, with dropout, residuals and norms.

    Products and attention without dropout are torch's; all else is the kernels of `functions`. No dropout mask is kept.

    Args:
        config: sizes and options; it is kept, and its `layer_id` becomes this layer's.
        initial_weights: eight tensors: of queries, keys, values `[hidden, hidden]`, attention's result, the norm beside
            attention, the MLP's two products, the other norm. The last five become the parameters, if they are such.
        initial_biases: eight as well, in the same order.

    Attributes:
        layer_id: how many layers were made before this one.
        attn_qkvw: `[3 * hidden, hidden]`, `attn_qkvb` its bias: queries, keys, values.
        attn_ow: `[hidden, hidden]`, with `attn_ob`.
        attn_nw: `[hidden]`, with `attn_nb`: the norm after attention; with pre_layer_norm it is what the MLP gets.
        inter_w: `[intermediate, hidden]`, with `inter_b`; `output_w`, `[hidden, intermediate]`, with `output_b`.
        norm_w: `[hidden]`, with `norm_b`: the norm after the MLP; with pre_layer_norm that before attention.

    Raises:
        ConfigError: the configuration is wrong, or tensors are not of its sizes.
    """

    layer_id: ClassVar[int] = 0

    attn_qkvw: nn.Parameter
    attn_qkvb: nn.Parameter
    attn_ow: nn.Parameter
    attn_ob: nn.Parameter
    attn_nw: nn.Parameter
    attn_nb: nn.Parameter
    inter_w: nn.Parameter
    inter_b: nn.Parameter
    output_w: nn.Parameter
    output_b: nn.Parameter
    norm_w: nn.Parameter
    norm_b: nn.Parameter

    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        given = initial_weights is not None or initial_biases is not None
        if faults := config.faults() + ([] if given else config.initialization_faults()):
            raise ConfigError("DeepSpeedTransformerConfig: " + "\n".join(faults))
        self.config = config
        config.layer_id = DeepSpeedTransformerLayer.layer_id
        DeepSpeedTransformerLayer.layer_id += 1
        if config.local_rank >= 0 and torch.cuda.is_available():
            torch.cuda.set_device(config.local_rank)
        if given:
            self._take(initial_weights, initial_biases)
        else:
            for name, shape in _shapes(config).items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            self.init_transformer_weights(config.adjust_init_range)
        self.train(config.training)

    def _take(self, weights: Sequence[Tensor] | None, biases: Sequence[Tensor] | None) -> None:
        if weights is None or biases is None or len(weights) < _WEIGHTS or len(biases) < _WEIGHTS:
            raise ConfigError(
                f"initial_weights and initial_biases go together, {_WEIGHTS} tensors each: of q, k, v, attention's "
                "result, its norm, the MLP's two products, the other norm"
            )
        for end, tensors in (("w", weights), ("b", biases)):
            self.register_parameter(f"attn_qkv{end}", nn.Parameter(torch.cat([one.detach() for one in tensors[:3]])))
            for name, tensor in zip(("attn_o", "attn_n", "inter_", "output_", "norm_"), tensors[3:]):
                parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
                self.register_parameter(name + end, parameter)
        shapes = _shapes(self.config)
        if wrong := [
            f"{name} is {list(parameter.shape)}, and by the configuration {list(shapes[name])}"
            for name, parameter in self.named_parameters()
            if parameter.shape != torch.Size(shapes[name])
        ]:
            raise ConfigError("initial_weights and initial_biases: " + "\n".join(wrong))

    @torch.no_grad()
    def init_transformer_weights(self, adjust_init_range: bool = False) -> None:
        """Draw weights anew: normal, of standard deviation `initializer_range`; biases 0, norms 1.

        Args:
            adjust_init_range: weights of attention's and the MLP's results are smaller by
                sqrt(2 * num_hidden_layers), since as many of them add up along the residual.
        """
        config = self.config
        smaller = math.sqrt(2.0 * config.num_hidden_layers) if adjust_init_range else 1.0
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("attn_nw", "norm_w"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                divisor = smaller if name in ("attn_ow", "output_w") else 1.0
                parameter.normal_(0.0, config.initializer_range / divisor)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        layer_head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        grads: Any = None,
    ) -> Tensor | tuple[Tensor]:
        """The layer's result, of the input's shape.

        Args:
            hidden_states: `[batch, tokens, hidden]`, of the weights' dtype (or any under autocast).
            attention_mask: floating point, which is added to scores (0 where a key is seen, -10000 where not), or bool
                (True where it is seen); it lies over `[batch, heads, queries, keys]`. Two are batch and keys.
            head_mask: None, as are those after it but the last: DeepSpeed's interface has them.
            layer_head_mask: None.
            encoder_hidden_states: None.
            encoder_attention_mask: None.
            past_key_value: None.
            output_attentions: False.
            grads: None.

        Raises:
            OpError: the input or the mask has another shape or dtype, or an argument is there that must not be.
        """
        others = {
            "head_mask": head_mask,
            "layer_head_mask": layer_head_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_value": past_key_value,
            "output_attentions": output_attentions or None,
            "grads": grads,
        }
        if there := [name for name, value in others.items() if value is not None]:
            raise OpError(f"{type(self).__name__} is self-attention without a cache: it takes no {', '.join(there)}")
        hidden_states, weights = self._in_one_dtype(hidden_states)
        batch, tokens, _ = hidden_states.shape
        mask = checked_mask(type(self).__name__, attention_mask, batch, self.config.heads, tokens)
        run = self._pre_norm if self.config.pre_layer_norm else self._post_norm
        result = run(hidden_states, mask, weights, self._dropouts())
        return (result,) if self.config.return_tuple else result

    def _in_one_dtype(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The input, and products' weights by name, as they multiply."""
        weights: dict[str, Tensor] = {"qkv": self.attn_qkvw, "o": self.attn_ow, "inter": self.inter_w}
        weights["output"] = self.output_w
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), {name: weight.to(dtype) for name, weight in weights.items()}
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or x.dtype != weights["qkv"].dtype:
            raise OpError(
                f"{type(self).__name__}: hidden_states is {list(x.shape)} of {x.dtype}; it must be [batch, tokens, "
                f"{self.config.hidden_size}] of {weights['qkv'].dtype}, as the weights are"
            )
        return x, weights

    def _dropouts(self) -> Dropouts:
        """Of attention's probabilities, of attention's result, of the MLP's."""
        config = self.config
        attention, hidden = max(config.attn_dropout_ratio, 0), max(config.hidden_dropout_ratio, 0)
        if not self.training or attention == hidden == 0:
            return NO_DROPOUT, NO_DROPOUT, NO_DROPOUT
        first = Dropout(attention, config.seed, draw_stream())
        return first, first.other(hidden, 1), first.other(hidden, 2)

    def _attention(self, x: Tensor, mask: Tensor | None, weights: dict[str, Tensor], dropout: Dropout) -> Tensor:
        """Up to the product with `attn_ow`, whose bias is left to what follows."""
        config = self.config
        qkv = F.linear(x, weights["qkv"], self.attn_qkvb.to(x.dtype))
        if dropout.ratio == 0 and x.dtype != torch.float64:
            mixed = _fused_attention(qkv, config.heads, mask)
        else:
            mixed = dropout_attention(
                qkv,
                config.heads,
                mask=mask,
                dropout=dropout,
                recompute=config.attn_dropout_checkpoint,
                stochastic=config.stochastic_mode,
            )
        return F.linear(mixed, weights["o"])

    def _mlp(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Without the last bias."""
        config = self.config
        return bias_gelu_linear(
            F.linear(x, weights["inter"]),
            self.inter_b,
            weights["output"],
            tanh_form=config.gelu == "tanh",
            recompute=config.gelu_checkpoint,
            stochastic=config.stochastic_mode,
        )

    def _norm(
        self,
        x: Tensor,
        weight: Tensor,
        shift: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        dropout: Dropout = NO_DROPOUT,
        keep_sum: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        config = self.config
        return drop_add_norm(
            x,
            Norm(weight, shift, config.layer_norm_eps),
            bias=bias,
            residual=residual,
            dropout=dropout,
            keep_sum=keep_sum,
            invertible=config.normalize_invertible,
            stochastic=config.stochastic_mode,
        )

    def _pre_norm(self, x: Tensor, mask: Tensor | None, weights: dict[str, Tensor], dropouts: Dropouts) -> Tensor:
        _, normed = self._norm(x, self.norm_w, self.norm_b)
        attended = self._attention(normed, mask, weights, dropouts[0])
        added, normed = self._norm(
            *(attended, self.attn_nw, self.attn_nb),
            bias=self.attn_ob,
            residual=x,
            dropout=dropouts[1],
            keep_sum=True,
        )
        stochastic = self.config.stochastic_mode
        return drop_add(self._mlp(normed, weights), self.output_b, added, dropouts[2], stochastic=stochastic)

    def _post_norm(self, x: Tensor, mask: Tensor | None, weights: dict[str, Tensor], dropouts: Dropouts) -> Tensor:
        attended = self._attention(x, mask, weights, dropouts[0])
        _, normed = self._norm(attended, self.attn_nw, self.attn_nb, bias=self.attn_ob, residual=x, dropout=dropouts[1])
        product = self._mlp(normed, weights)
        return self._norm(product, self.norm_w, self.norm_b, bias=self.output_b, residual=normed, dropout=dropouts[2])[
            1
        ]

    def extra_repr(self) -> str:
        """What is printed of it."""
        config = self.config
        return (
            f"hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, heads={config.heads}, "
            f"pre_layer_norm={config.pre_layer_norm}"
        )


def _shapes(config: DeepSpeedTransformerConfig) -> dict[str, tuple[int, ...]]:
    hidden, inter = config.hidden_size, config.intermediate_size
    return {
        "attn_qkvw": (3 * hidden, hidden),
        "attn_qkvb": (3 * hidden,),
        "attn_ow": (hidden, hidden),
        "attn_ob": (hidden,),
        "attn_nw": (hidden,),
        "attn_nb": (hidden,),
        "inter_w": (inter, hidden),
        "inter_b": (inter,),
        "output_w": (hidden, inter),
        "output_b": (hidden,),
        "norm_w": (hidden,),
        "norm_b": (hidden,),
    }


def _fused_attention(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Torch's, `[batch, tokens, hidden]`."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(qkv.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, tokens, width // 3)
