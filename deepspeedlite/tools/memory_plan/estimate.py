"""How much memory the model states need: `python -m deepspeedlite.zero.estimate`, and DeepSpeed's estimators.

With `--fit` the other way round: the largest model that this machine can train, as fit.py works it out.

The formula is in states.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from deepspeedlite.host.text import GIB, columns, size_text
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.tools.memory_plan.states import PINNED_FACTOR, WEIGHT_BYTES, ModelStates, Setup, all_ways
from deepspeedlite.tools.memory_plan.states import model_states_bytes as model_states_bytes

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, float)


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
