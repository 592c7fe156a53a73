"""The formula: bytes of the model states for every stage, dtype and offload; docs/zero-memory.md explains it.

Bytes per parameter are those of ZeRO (arXiv:1910.02054, section 3); what may leave the GPU follows ZeRO-Infinity
(arXiv:2104.07857).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from deepspeedlite.runtime.errors import ConfigError

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a parameter, and of its gradient
MASTER_BYTES, MOMENTS_BYTES = 4, 8
PINNED_FACTOR = 1.5  # torch takes page-locked memory in powers of two
# Where the optimizer's states are, where the parameters are, and the lowest stage that can do it. Listed from the
# least traffic per step to the most: over no bus, over the host's, over the drive's.
OFFLOADS = {
    "none": ("gpu", "gpu", 0),
    "cpu_optimizer": ("host", "gpu", 1),
    "cpu_all": ("host", "host", 3),
    "nvme_optimizer": ("nvme", "gpu", 1),
    "nvme_all": ("nvme", "nvme", 3),
}


class Setup(NamedTuple):
    """What is trained on what; the fields are arguments of `model_states_bytes`."""

    params: float
    largest_layer: float
    gpus: int
    nodes: int
    dtype: str
    buffer_factor: float


class ModelStates(NamedTuple):
    """Bytes of one way to train: the first three per GPU (states, buffers, sum), the others per host."""

    stage: int
    offload: str
    gpu_bytes: int
    layer_bytes: int
    gpu_total_bytes: int
    host_bytes: int
    nvme_bytes: int
    build_bytes: int  # in host memory while each rank there still holds the whole model in fp32: without zero.Init


def model_states_bytes(
    params: float,
    largest_layer: float = 0,
    gpus: int = 1,
    nodes: int = 1,
    dtype: str = "bf16",
    stage: int = 0,
    offload: str = "none",
    buffer_factor: float = 1.0,
) -> ModelStates:
    """Bytes that the model states take on each GPU and each host.

    Args:
        params: trained parameters of the whole model.
        largest_layer: those of the module that owns most; at stage 3 its whole weights and gradient are live at once.
        gpus: GPUs per node.
        nodes: hosts.
        dtype: fp32, bf16 or fp16; the 16-bit ones train with fp32 masters.
        stage: 0 to 3.
        offload: a name in OFFLOADS. Sharded gradients (stages 2, 3) wait in host memory for any offloaded optimizer.
        buffer_factor: `host_bytes` and `build_bytes` are multiplied by it, for staging buffers and copies.

    Raises:
        ConfigError: a value that makes no sense, or an offload that the stage does not have.
    """
    _check(Setup(params, largest_layer, gpus, nodes, dtype, buffer_factor), stage, offload)
    weight_bytes, (optimizer_on, params_on, _) = WEIGHT_BYTES[dtype], OFFLOADS[offload]
    grads_on = "gpu" if optimizer_on == "gpu" or stage < 2 else "host"
    # fp32 trains its parameters in place, unless the step runs elsewhere than where they are.
    master_bytes = 0 if dtype == "fp32" and params_on == optimizer_on else MASTER_BYTES
    per_rank = {"gpu": 0, "host": 0, "nvme": 0}
    for bytes_each, sharded_from, tier in (
        (master_bytes + MOMENTS_BYTES, 1, optimizer_on),
        (weight_bytes, 2, grads_on),
        (weight_bytes, 3, params_on),
    ):
        ranks = gpus * nodes if stage >= sharded_from else 1
        per_rank[tier] += -(-bytes_each * math.ceil(params) // ranks)
    gpu, layer = per_rank["gpu"], 2 * weight_bytes * math.ceil(largest_layer) * (stage == 3)
    host, build = (math.ceil(each * gpus * buffer_factor) for each in (per_rank["host"], 4 * math.ceil(params)))
    return ModelStates(stage, offload, gpu, layer, gpu + layer, host, per_rank["nvme"] * gpus, build)


def _check(setup: Setup, stage: int, offload: str) -> None:
    """Raise ConfigError for nonsense. Comparisons are written so that nan fails them."""
    params, layer, gpus, nodes, dtype, factor = setup
    lowest = OFFLOADS[offload][2] if offload in OFFLOADS else 0
    for is_right, message in (
        (0 < params < math.inf, f"params={params:g}: give the model's number of parameters, such as 7e9"),
        (0 <= layer <= params, f"largest_layer={layer:g} must be a part of params={params:g}"),
        (layer > 0 or stage != 3, "largest_layer=0: stage 3 needs the number of parameters of the largest layer"),
        (gpus >= 1 and nodes >= 1, f"gpus={gpus} and nodes={nodes} must each be at least 1"),
        (dtype in WEIGHT_BYTES, f"dtype={dtype!r}: choose one of {', '.join(WEIGHT_BYTES)}"),
        (stage in (0, 1, 2, 3), f"stage={stage}: choose 0, 1, 2 or 3"),
        (offload in OFFLOADS, f"offload={offload!r}: choose one of {', '.join(OFFLOADS)}"),
        (stage >= lowest, f"offload={offload!r} needs stage {lowest} or higher, not {stage}"),
        (1 <= factor < math.inf, f"buffer_factor={factor:g} must be at least 1"),
    ):
        if not is_right:
            raise ConfigError(message)


def ways_of(stages: Iterable[int] = (0, 1, 2, 3)) -> list[tuple[int, str]]:
    """Every (stage, offload) that there is, from the least traffic per step to the most."""
    stages = list(stages)
    return [(stage, name) for name, (*_, lowest) in OFFLOADS.items() for stage in stages if stage >= lowest]


def all_ways(setup: Setup, stages: Iterable[int] = (0, 1, 2, 3)) -> list[ModelStates]:
    """What every offload that each of these stages has takes."""
    return [model_states_bytes(**setup._asdict(), stage=stage, offload=name) for stage, name in ways_of(stages)]
