"""DeepSpeed's `init_inference` and the names around it; `inference.engine` does the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from deepspeedlite.checkpoint.formats import FORMATS
from deepspeedlite.inference.config import DeepSpeedInferenceConfig, DeepSpeedMoEConfig, read_inference_config
from deepspeedlite.inference.engine import InferenceEngine


def init_inference(
    model: torch.nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | DeepSpeedInferenceConfig | None = None,
    **kwargs: Any,
) -> InferenceEngine:
    """Make an inference engine of a model.

    Args:
        model: any module, or a training engine; one of transformers' generates too. It is changed in place (cast,
            split over ranks, blocks replaced), unless an engine trains it: then its weights are shared or copied.
        config: path, dict or base64 of the JSON configuration; docs/config.md has its keys.
        kwargs: keys of the configuration, which go before it.

    Returns:
        the engine: call it, or its `generate`.

    Raises:
        ConfigError: the configuration is wrong (every fault is listed).
        InferenceError: the model cannot be split, or has tensors without values and there is no checkpoint.
        UnsupportedError: the device cannot compute in the dtype.
        CheckpointError: the checkpoint is missing, damaged, or does not fit the model.
        DistributedError: the ranks do not meet.
    """
    return InferenceEngine(model, read_inference_config(config, kwargs), formats=FORMATS)


def default_inference_config() -> dict[str, Any]:
    """Every key of the configuration with its default, as a dict that `init_inference` takes."""
    return DeepSpeedInferenceConfig().model_dump()


class DtypeEnum(Enum):
    """Types of weights, by all of their names; the first is torch's own."""

    fp16 = (torch.float16, "torch.float16", "fp16", "float16", "half")
    fp32 = (torch.float32, "torch.float32", "fp32", "float32", "float")
    bf16 = (torch.bfloat16, "torch.bfloat16", "bf16", "bfloat16", "bfloat")
    int8 = (torch.int8, "torch.int8", "int8")

    @classmethod
    def from_str(cls, value: str) -> DtypeEnum:
        """The type of a name.

        Raises:
            ValueError: it is none's.
        """
        for dtype in cls:
            if value in dtype.value:
                return dtype
        names = ", ".join(dtype.name for dtype in cls)
        raise ValueError(f"{value!r} is no type of weights; use {names}")


class MoETypeEnum(str, Enum):
    """Kinds of mixture-of-experts layers."""

    residual = "residual"
    standard = "standard"


__all__ = ["DeepSpeedMoEConfig", "DtypeEnum", "MoETypeEnum", "default_inference_config", "init_inference"]
