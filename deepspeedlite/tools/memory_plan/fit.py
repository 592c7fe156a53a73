"""The largest model that a machine can train, by stage and offload, and how long its steps take: `estimate --fit`.

What must fit are the model states (`states.model_states_bytes`) and the activations of a GPT whose blocks are
recomputed in the backward pass. A step's time is its slowest part in the passes plus its slowest in the optimizer's
step: parts of one phase overlap. docs/zero-memory.md has the formulas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from deepspeedlite.host.text import GIB, print_table, size_text
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.tools.memory_plan.states import (
    MASTER_BYTES,
    MOMENTS_BYTES,
    OFFLOADS,
    WEIGHT_BYTES,
    ModelStates,
    model_states_bytes,
    ways_of,
)

if TYPE_CHECKING:
    from deepspeedlite.tools.memory_plan.machine import Machine

_MOST_PARAMS = 10**15
# Of a token, in units of the block's width: what a block keeps for its backward pass (arXiv:2205.05198, section 4.1:
# 34 bytes in 16 bits, attention's own matrix not being kept).
_BLOCK_ACTIVATIONS = 17


class Training(NamedTuple):
    """What is trained, whatever its size, and on how many ranks."""

    gpus: int  # of each node
    nodes: int
    dtype: str
    buffer_factor: float
    layers: int  # equal blocks
    tokens: int  # of a rank in a step
    exchange_rate: float  # bytes per second, between a rank and the others

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.gpus * self.nodes

    def check(self) -> None:
        """Raise ConfigError for a number that makes no sense."""
        for name, value in self._asdict().items():
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value:g} must be above 0")


class Fit(NamedTuple):
    """The largest model of one stage and offload, and a step of it."""

    states: ModelStates
    params: int  # 0: not even one
    activation_bytes: int  # of a rank
    full: str  # "gpu", "host" or "disk": which of them has no room for more
    passes_s: dict[str, float]  # forward and backward, by part
    step_s: dict[str, float]  # the optimizer's step, by part

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.passes_s.values()) + max(self.step_s.values())

    @property
    def held_up_by(self) -> str:
        """The slowest parts."""
        return " + ".join(max(parts, key=lambda name: parts[name]) for parts in (self.passes_s, self.step_s))


def fit_all(training: Training, machine: Machine) -> list[Fit]:
    """Every stage and offload, from the least traffic to the most, but those that need a disk that is not there, and
    those that only move to the host's memory what ranks without GPUs have there anyway.

    Raises:
        ConfigError: a number in `training` makes no sense.
    """
    training.check()
    absent = {tier for tier, is_there in (("host", machine.gpus), ("nvme", machine.read_rate)) if not is_there}
    ways = [(stage, name) for stage, name in ways_of() if absent.isdisjoint(OFFLOADS[name][:2])]
    return [_fit(stage, name, training, machine) for stage, name in ways]


def _fit(stage: int, offload: str, training: Training, machine: Machine) -> Fit:
    def full(params: int) -> str:
        states = _states(params, stage, offload, training, machine)
        needs = _needs(states, activation_bytes(params, training), training, machine)
        return next((tier for tier, (need, room) in needs.items() if need > room), "")

    fits, too_many = 0, 1
    while too_many < _MOST_PARAMS and not full(too_many):
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (fits, middle) if full(middle) else (middle, too_many)
    states = _states(max(fits, 1), stage, offload, training, machine)
    passes_s, step_s = step_parts(fits, stage, offload, training, machine)
    return Fit(states, fits, activation_bytes(fits, training), full(too_many), passes_s, step_s)


def _states(params: int, stage: int, offload: str, training: Training, machine: Machine) -> ModelStates:
    layer = math.ceil(params / training.layers)
    gpus, nodes, dtype, factor = training[:4]
    states = model_states_bytes(params, layer, gpus, nodes, dtype, stage, offload, factor)
    spared = (MASTER_BYTES - _master_bytes(offload, training, machine)) * params // nodes
    return states._replace(nvme_bytes=states.nvme_bytes - spared) if offload == "nvme_optimizer" else states


def _master_bytes(offload: str, training: Training, machine: Machine) -> int:
    """Of a parameter. fp32 needs a master where it is stepped elsewhere than it is: the CPU steps what is offloaded."""
    optimizer_on, params_on, _ = OFFLOADS[offload]
    return 0 if training.dtype == "fp32" and (params_on == optimizer_on or not machine.gpus) else MASTER_BYTES


def activation_bytes(params: int, training: Training) -> int:
    """Of a rank: the input of every block, and all that one block keeps. A block has 12 x width^2 parameters."""
    width = math.sqrt(params / (12 * training.layers))
    return math.ceil(training.tokens * width * WEIGHT_BYTES[training.dtype] * (training.layers + _BLOCK_ACTIVATIONS))


def _needs(states: ModelStates, activations: int, training: Training, machine: Machine) -> dict[str, tuple[int, int]]:
    """By tier, the bytes that it takes of one GPU or of a host, and those that there are."""
    of_rank = states.gpu_total_bytes + activations
    on_host = states.host_bytes + (0 if machine.gpus else training.gpus * of_rank)
    return {
        "gpu": (of_rank if machine.gpus else 0, machine.gpu_bytes),
        "host": (on_host, machine.host_bytes),
        "disk": (states.nvme_bytes, machine.disk_bytes),
    }


def step_parts(
    params: int, stage: int, offload: str, training: Training, machine: Machine
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part, of the passes and of the optimizer's step: those of one host, on which all others wait."""
    optimizer_on, params_on, _ = OFFLOADS[offload]
    gpus, ranks = training.gpus, training.ranks
    sharing = 1 if machine.gpus else gpus  # ranks that share one device's rates: those of a host without GPUs
    weight = params * WEIGHT_BYTES[training.dtype]  # bytes: of all parameters, and of all gradients
    shard = weight / ranks  # bytes of a rank
    optimizer = (_master_bytes(offload, training, machine) + MOMENTS_BYTES) * params / (ranks if stage else 1)
    stepped = 2 * optimizer + 2 * weight / (ranks if stage else 1)  # read and written; the gradient and the parameter
    fetches = 2 * shard if params_on != "gpu" else 0  # for the forward and for the backward pass
    leaves = shard if optimizer_on != "gpu" else 0  # the gradient
    exchanged = (3 if stage == 3 else 2) * weight * (ranks - 1) / ranks
    passes_s = {
        "compute": 8 * params * training.tokens * sharing / machine.flops,  # 2 forward, again, and 4 backward
        "ranks": exchanged / training.exchange_rate,
        "bus": (fetches + leaves) * sharing / machine.bus_rate,
        "disk": _ratio(gpus * fetches * (params_on == "nvme"), machine.read_rate),
    }
    on_disk = gpus * optimizer * (optimizer_on == "nvme")
    step_s = {
        "memory": stepped * sharing / machine.device_rate
        if optimizer_on == "gpu"
        else gpus * stepped / machine.host_rate,
        "bus": (leaves if params_on == "gpu" else 0) * sharing / machine.bus_rate,
        "disk": _ratio(on_disk, machine.read_rate)
        + _ratio(on_disk + gpus * shard * (params_on == "nvme"), machine.write_rate),
    }
    return passes_s, step_s


def _ratio(nbytes: float, rate: float) -> float:
    return nbytes / rate if nbytes else 0.0


# --- what is printed --------------------------------------------------------------------------------------------------


def to_json(training: Training, machine: Machine, fits: list[Fit]) -> str:
    """Bytes, seconds and bytes per second."""
    ways = [
        {**fit.states._asdict(), **fit._asdict(), "seconds": fit.seconds, "tokens_per_s": _tokens_per_s(fit, training)}
        for fit in fits
    ]
    for way in ways:
        del way["states"]
    return json.dumps({"machine": machine._asdict(), "training": training._asdict(), "ways": ways})


def _tokens_per_s(fit: Fit, training: Training) -> float:
    return training.ranks * training.tokens / fit.seconds if fit.params else 0.0


def print_fits(training: Training, machine: Machine, fits: list[Fit]) -> None:
    """The machine, a row for each stage and offload, and what they leave out."""
    for line in _machine_lines(machine):
        print(line)
    print(
        f"\n{training.dtype} with Adam on {training.nodes} x {training.gpus} ranks (nodes x ranks per node), "
        f"{training.layers} equal blocks, {training.tokens} tokens per rank and step\n",
    )
    best = max(fits, key=lambda fit: fit.params)
    right = ("largest", "GiB/rank", "GiB/host", "GiB/NVMe", "step")
    head = ("stage", "offload", *right, "full", "slowest")
    print_table(head, [_cells(fit) for fit in fits], right=right, bold=[fits.index(best)])
    print(
        f"\nPer rank: with activations, {size_text(best.activation_bytes, 2)} for the largest. Per host: states times "
        f"{training.buffer_factor:g}.\nSlowest: part of the passes + of the optimizer's step. Not counted: logits, "
        "fragmentation, and kernels\nthat are slower than a large matrix product or copy.",
    )


def _machine_lines(machine: Machine) -> Iterator[str]:
    rate = lambda value: f"{value / 1e9:.1f} GB/s"  # noqa: E731
    product = f"matrix product {machine.flops / 1e12:.2f} TFLOP/s"
    if machine.gpus:
        yield f"{machine.gpus} x {machine.device}: {size_text(machine.gpu_bytes, 2)}, {product}, copies "
        yield f"{rate(machine.device_rate)}, to and from the host {rate(machine.bus_rate)}"
    memory = f"{size_text(machine.host_bytes, 2)}, copies {rate(machine.host_rate)}"
    yield f"Host: {memory}" + ("" if machine.gpus else f", {product}; no GPU, so the ranks share its memory")
    if machine.read_rate:
        rates = f"reads {rate(machine.read_rate)}, writes {rate(machine.write_rate)}"
        yield f"Disk: {size_text(machine.disk_bytes, 2)}, {rates}" + (f"; {machine.note}" if machine.note else "")
    else:
        yield f"No disk, and no offload to it: {machine.note}"


def _cells(fit: Fit) -> list[str]:
    states = fit.states
    ways = [str(states.stage), states.offload]
    if not fit.params:
        return [*ways, "none", *[""] * 4, fit.full, ""]
    sizes = states.gpu_total_bytes + fit.activation_bytes, states.host_bytes, states.nvme_bytes
    gib = [f"{nbytes / GIB:.2f}" if nbytes else "0" for nbytes in sizes]
    return [*ways, f"{fit.params / 1e9:.2f} B", *gib, f"{fit.seconds:.2f} s", fit.full, fit.held_up_by]
