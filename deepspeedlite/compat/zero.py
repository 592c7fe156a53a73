"""Names around ZeRO: enumerations, predicates, and what transformers replaces around `zero.Init`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any

import torch

from deepspeedlite.runtime.errors import EngineStateError

ZeRORuntimeException = EngineStateError

_orig_torch_arange = torch.arange


class ZeroStageEnum(IntEnum):
    """The stages by name."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class OffloadDeviceEnum(str, Enum):
    """Where something is offloaded to."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class ZeroParamType(Enum):
    """Whether a parameter is sharded."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


def is_zero_param(parameter: Any) -> bool:
    """Whether a tensor is a parameter that is sharded, whole for the moment or not."""
    return torch.is_tensor(parameter) and hasattr(parameter, "ds_id")


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], target_fp_dtype: Any) -> Callable[..., Any]:
    """`fn` as it is: `zero.Init` casts parameters when it shards them, and leaves torch's constructors alone."""
    return fn
