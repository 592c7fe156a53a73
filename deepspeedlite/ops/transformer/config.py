"""What a transformer layer is made of, under DeepSpeed's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeedlite.runtime.errors import ConfigError

_GELUS = ("tanh", "erf")


class TransformerConfig:
    """The sizes of a layer, which every kind of it has."""

    def __init__(
        self,
        batch_size: int,
        hidden_size: int,
        intermediate_size: int,
        heads: int,
        attn_dropout_ratio: float,
        hidden_dropout_ratio: float,
        num_hidden_layers: int,
        initializer_range: float,
    ) -> None:
        self.layer_id = -1  # of the layer that was made of this last
        self.batch_size = batch_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.heads = heads
        self.attn_dropout_ratio = attn_dropout_ratio
        self.hidden_dropout_ratio = hidden_dropout_ratio
        self.num_hidden_layers = num_hidden_layers
        self.initializer_range = initializer_range


class DeepSpeedTransformerConfig(TransformerConfig):
    """What `DeepSpeedTransformerLayer` is made of. What is wrong is told when a layer is made.

    Args:
        batch_size: nothing is allocated by it, so any number will do.
        hidden_size: of a token; `heads` must divide it.
        intermediate_size: between the two products of the MLP; 4 * hidden_size where it is not above 0.
        heads: of attention.
        attn_dropout_ratio: of attention's probabilities; -1 is 0.
        hidden_dropout_ratio: of what attention and the MLP add to a token; -1 is 0.
        num_hidden_layers: of the model, for `adjust_init_range`.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: is added to variances.
        local_rank: where not below 0 and there are GPUs, this one becomes the current.
        seed: of dropout masks, together with torch's generator, from which each pass draws.
        fp16: nothing depends on it: layers compute in the dtype of their weights.
        pre_layer_norm: norms before attention and the MLP; else after them, as in BERT.
        normalize_invertible: norms keep their results, not their inputs, which are made again from them.
        gelu_checkpoint: the MLP's activation is computed once more in the backward pass, not kept.
        adjust_init_range: weights of attention's and the MLP's results are smaller by sqrt(2 * num_hidden_layers); on
            every rank.
        attn_dropout_checkpoint: attention's probabilities are computed once more in the backward pass, not kept.
        stochastic_mode: the op `stochastic_transformer`, which adds in any order.
        return_tuple: results are tuples of one.
        training: whether the layer begins in training mode.
        gelu: "tanh", which DeepSpeed's kernels have, or "erf", which BERT was trained with. (This one is ours.)
    """

    def __init__(
        self,
        batch_size: int = -1,
        hidden_size: int = -1,
        intermediate_size: int = -1,
        heads: int = -1,
        attn_dropout_ratio: float = -1,
        hidden_dropout_ratio: float = -1,
        num_hidden_layers: int = -1,
        initializer_range: float = -1,
        layer_norm_eps: float = 1e-12,
        local_rank: int = -1,
        seed: int = -1,
        fp16: bool = False,
        pre_layer_norm: bool = True,
        normalize_invertible: bool = False,
        gelu_checkpoint: bool = False,
        adjust_init_range: bool = True,
        attn_dropout_checkpoint: bool = False,
        stochastic_mode: bool = False,
        return_tuple: bool = False,
        training: bool = True,
        gelu: str = "tanh",
    ) -> None:
        super().__init__(
            batch_size,
            hidden_size,
            intermediate_size if intermediate_size > 0 else 4 * hidden_size,
            heads,
            attn_dropout_ratio,
            hidden_dropout_ratio,
            num_hidden_layers,
            initializer_range,
        )
        self.layer_norm_eps = layer_norm_eps
        self.local_rank = local_rank
        self.seed = seed
        self.fp16 = fp16
        self.pre_layer_norm = pre_layer_norm
        self.normalize_invertible = normalize_invertible
        self.gelu_checkpoint = gelu_checkpoint
        self.adjust_init_range = adjust_init_range
        self.attn_dropout_checkpoint = attn_dropout_checkpoint
        self.stochastic_mode = stochastic_mode
        self.return_tuple = return_tuple
        self.training = training
        self.gelu = gelu

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedTransformerConfig:
        """The defaults, and every entry as an attribute: also those that only the model around it knows."""
        config = cls()
        for name, value in json_object.items():
            setattr(config, name, value)
        if config.intermediate_size <= 0:
            config.intermediate_size = 4 * config.hidden_size
        return config

    @classmethod
    def from_json_file(cls, json_file: str) -> DeepSpeedTransformerConfig:
        """`from_dict` of a file in UTF-8, UTF-16 or UTF-32.

        Raises:
            ConfigError: it holds no JSON object.
        """
        try:
            found = json.loads(Path(json_file).read_bytes())
        except ValueError as error:
            raise ConfigError(f"{json_file} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{json_file} holds no JSON object but {type(found).__name__}")
        return cls.from_dict(found)

    def faults(self) -> list[str]:
        """What is wrong with it, each with the name that it is wrong of."""
        found = [
            f"{name}={getattr(self, name)} must be above 0"
            for name in ("hidden_size", "heads", "intermediate_size")
            if not getattr(self, name) > 0
        ]
        if not found and self.hidden_size % self.heads:
            found.append(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            ratio = getattr(self, name)
            if ratio != -1 and not 0 <= ratio <= 1:
                found.append(f"{name}={ratio} must be from 0 to 1, or -1 for none")
        if not self.layer_norm_eps >= 0:
            found.append(f"layer_norm_eps={self.layer_norm_eps} must not be below 0")
        if self.gelu not in _GELUS:
            found.append(f"gelu={self.gelu!r} is none of {', '.join(_GELUS)}")
        return found

    def initialization_faults(self) -> list[str]:
        """What is wrong with how new weights are to be made."""
        found = []
        if not self.initializer_range >= 0:
            found.append(f"initializer_range={self.initializer_range} must not be below 0")
        if self.adjust_init_range and self.num_hidden_layers < 1:
            found.append(f"num_hidden_layers={self.num_hidden_layers} must be 1 or more, or adjust_init_range=False")
        return found
