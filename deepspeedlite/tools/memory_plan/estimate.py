"""How much memory the model states need: `python -m deepspeedlite.zero.estimate`, and DeepSpeed's estimators.

With `--fit` the other way round: the largest model that this machine can train, as fit.py works it out.

`model_states_bytes` covers every stage, dtype and offload; docs/zero-memory.md explains it. Its bytes per parameter
are those of ZeRO (arXiv:1910.02054, section 3); what may leave the GPU follows ZeRO-Infinity (arXiv:2104.07857).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.text import GIB, columns, size_text

if TYPE_CHECKING:
    import torch

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a parameter, and of its gradient
MASTER_BYTES, MOMENTS_BYTES = 4, 8
PINNED_FACTOR = 1.5  # torch takes page-locked memory in powers of two
Number = TypeVar("Number", int, float)
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


def render(setup: Setup, ways: Sequence[ModelStates]) -> str:
    """The table, with what it is about above and what it leaves out below."""
    layer = f", largest layer {math.ceil(setup.largest_layer):,}" if setup.largest_layer else ""
    head = ("stage", "offload", "states/GPU", "+ layer", "= per GPU", "per host", "NVMe/host")
    rows = [head, *((str(way.stage), way.offload, *(size_text(size, 2) for size in way[2:7])) for way in ways)]
    built = size_text(ways[0].build_bytes, 2)
    lines = [
        f"Model states of {math.ceil(setup.params):,} parameters{layer}",
        f"{setup.dtype} with Adam on {setup.nodes} x {setup.gpus} GPUs (nodes x GPUs per node)\n",
        *columns(rows, right=range(2, 7)),
        f"\nPer host: times {setup.buffer_factor:g} for buffers. Not counted: activations, fragmentation.",
        f"A model built on the host without zero.Init takes {built} there, until it is moved.",
    ]
    return "\n".join(lines)


def _counts(model: torch.nn.Module) -> tuple[int, int]:
    """(parameters, those of the module that owns most); tied ones count once, a zero.Init shard as its whole."""
    numel = {param: getattr(param, "ds_numel", param.numel()) for param in model.parameters()}
    layers = (sum(numel[param] for param in module.parameters(recurse=False)) for module in model.modules())
    return sum(numel.values()), max(layers)


def estimate_zero2_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what `model`, on any device, needs at stage 2. Otherwise as `..._all_cold`."""
    total, _ = _counts(model)
    estimate_zero2_model_states_mem_needs_all_cold(total, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what `total_params` need at stage 2 in 16 bits. Raises ConfigError for nonsense."""
    setup = Setup(total_params, 0, num_gpus_per_node, num_nodes, "bf16", additional_buffer_factor)
    print(render(setup, all_ways(setup, [2])))


def estimate_zero3_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what `model`, on any device, needs at stage 3. Otherwise as `..._all_cold`."""
    total, layer = _counts(model)
    estimate_zero3_model_states_mem_needs_all_cold(total, layer, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print what `total_params` need at stage 3 in 16 bits. Raises ConfigError for nonsense."""
    setup = Setup(total_params, largest_layer_params, num_gpus_per_node, num_nodes, "bf16", additional_buffer_factor)
    print(render(setup, all_ways(setup, [3])))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or the same as JSON; `fit` there is the least traffic within the limits, null if none is."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not all(limit > 0 for limit in (args.gpu_memory, args.host_memory, args.disk)):
        parser.error("gpu_memory, host_memory and disk are in GiB and must be above 0")
    try:
        if args.fit:
            _fit(parser, args)
        else:
            _estimate(parser, args)
    except ConfigError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeedlite.zero.estimate",
        description="Memory of the model states per GPU and per host, for every ZeRO stage and offload; or (--fit) the "
        "largest model that this machine can train with each of them, and the time of a step.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  %(prog)s --params 7e9 --largest_layer 2e8 --gpus 8 --nodes 2 --gpu_memory 80\n"
        "  %(prog)s --fit --path /mnt/nvme",
    )
    add = parser.add_argument
    add("--params", type=float, help="parameters of the model, such as 7e9")
    add("--largest_layer", type=float, help="parameters of its largest layer, often the embedding")
    add("--gpus", type=int, help="GPUs, or ranks, per node (default 1; with --fit those that there are)")
    add("--nodes", type=int, default=1, help="nodes (default 1)")
    add("--dtype", choices=WEIGHT_BYTES, default="bf16", help="what the model computes in (default bf16)")
    add(
        "--buffer_factor",
        type=float,
        help="multiplies host memory, for buffers (default 1.5; 1 for --fit without GPUs)",
    )
    add("--gpu_memory", type=float, metavar="GIB", default=math.inf, help="name the way with least traffic that fits")
    add("--host_memory", type=float, metavar="GIB", default=math.inf, help="the same for a host's memory")
    add("--json", action="store_true", help="print bytes as JSON")
    fit = parser.add_argument_group(
        "the largest model that fits (--gpu_memory and --host_memory replace what is found)"
    )
    add = fit.add_argument
    add("--fit", action="store_true", help="measure this machine, one of --nodes like it, for some seconds")
    add("--path", metavar="DIR", default=".", help="a folder on the disk to offload to (default: the current one)")
    add("--disk", type=float, metavar="GIB", default=math.inf, help="use so much of the disk, not nearly all of it")
    add("--layers", type=int, default=32, help="blocks that the model consists of (default 32)")
    add("--tokens", type=int, default=2048, help="tokens of a rank in a step (default 2048)")
    add("--exchange_rate", type=float, metavar="GB/S", help="between ranks (default: that of its bus to the host)")
    return parser


def _estimate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.params is None or args.largest_layer is None:
        parser.error("the following arguments are required: --params and --largest_layer, or else --fit")
    gpus, factor = _or(args.gpus, 1), _or(args.buffer_factor, PINNED_FACTOR)
    setup = Setup(args.params, args.largest_layer, gpus, args.nodes, args.dtype, factor)
    ways = all_ways(setup)
    gpu_limit, host_limit = args.gpu_memory * GIB, args.host_memory * GIB
    fit = next((way for way in ways if way.gpu_total_bytes <= gpu_limit and way.host_bytes <= host_limit), None)
    if args.json:
        print(json.dumps({**setup._asdict(), "ways": [w._asdict() for w in ways], "fit": fit and fit._asdict()}))
        return
    print(render(setup, ways))
    if not fit:
        print("Nothing fits: use more GPUs or nodes, or a smaller model.")
    elif min(gpu_limit, host_limit) < math.inf:
        needs = f"{size_text(fit.gpu_total_bytes, 2)} per GPU, {size_text(fit.host_bytes, 2)} per host"
        print(f"Least traffic that fits: stage {fit.stage}, offload {fit.offload} ({needs}).")


def _fit(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from deepspeedlite.tools.memory_plan import fit, machine

    if args.params is not None or args.largest_layer is not None:
        parser.error("--fit looks for the number of parameters: leave out --params and --largest_layer")
    shape = _or(args.gpus, 1), args.nodes, args.dtype, _or(args.buffer_factor, 1), args.layers, args.tokens
    training = fit.Training(*shape, exchange_rate=1e9 * (1 if args.exchange_rate is None else args.exchange_rate))
    training.check()  # before measuring, which takes seconds
    found = machine.measure(args.dtype, args.path)
    found = found._replace(
        gpu_bytes=_gib(args.gpu_memory, found.gpu_bytes),
        host_bytes=_gib(args.host_memory, found.host_bytes),
        disk_bytes=_gib(args.disk, found.disk_bytes),
    )
    training = training._replace(gpus=_or(args.gpus, found.gpus or 1))
    if found.gpus:
        training = training._replace(buffer_factor=_or(args.buffer_factor, PINNED_FACTOR))
    if args.exchange_rate is None:
        training = training._replace(exchange_rate=found.bus_rate / (1 if found.gpus else training.gpus))
    fits = fit.fit_all(training, found)
    print(fit.to_json(training, found, fits)) if args.json else fit.print_fits(training, found, fits)


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _gib(wanted: float, found: int) -> int:
    return found if wanted == math.inf else int(wanted * GIB)


if __name__ == "__main__":
    main()
