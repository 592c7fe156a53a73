"""A model that is a list of layers, of which this rank builds and holds one stage.

Parameters are named by the layer's place in the whole list (`3.weight`), tied ones by their key
(`tied_modules.embed.weight`): the same names at any number of stages, so a checkpoint fits any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from deepspeedlite import comm
from deepspeedlite.activation_checkpointing import checkpoint
from deepspeedlite.comm import Group
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.parallel.pipe import Pipeline
from deepspeedlite.parallel.pipe.partition import check_no_empty_stage, partition_balanced, partition_uniform
from deepspeedlite.parallel.pipe.schedule import SCHEDULES
from deepspeedlite.parallel.pipe.specs import Layer, LayerSpec, TiedLayerSpec, layer_numel, name_of_layer
from deepspeedlite.parallel.pipe.topology import PipelineParallelGrid, ProcessTopology, make_topology
from deepspeedlite.parallel.replica import Tie
from deepspeedlite.runtime.device import pick_device
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_dist

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]


class PipelineModule(Pipeline):
    """A sequence of layers, divided into stages.

    The output of a layer is the input of the next: one tensor or a tuple of tensors, given as one argument.

    Args:
        layers: modules, functions and `LayerSpec`s, in order; an `nn.Sequential` too.
        num_stages: into how many stages; the other ranks are replicas.
        topology: says which rank is which instead.
        loss_fn: `loss_fn(output, label)`, run by the last stage; the last layer's output is the loss if None.
        seed_layers: seed the generator before each layer is built, and before it runs: initial values and dropout are
            then the same at any number of stages.
        seed_fn: seeds instead of `torch.manual_seed`.
        base_seed: what the layers' seeds are counted from.
        partition_method: `parameters` balances trained parameters, `uniform` the number of layers, `type:REGEX` the
            number of layers whose class's name matches.
        activation_checkpoint_interval: keep only every so many layers' input and compute the rest again; 0: keep all.
        activation_checkpoint_func: does so.
        checkpointable_layers: names of classes; only layers of these are computed again. All with parameters if None.
        dynamic_shape: whether what passes between stages changes its shape between the micro-batches of a batch.
        schedule: `1f1b`, or `gpipe`, which holds the activations of all micro-batches at once.

    Raises:
        ConfigError: there are fewer layers than stages, a stage without parameters, or an argument that is not known.
        DistributedError: the ranks cannot be divided so.
    """

    def __init__(
        self,
        layers: Iterable[Layer | LayerSpec],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpoint,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        schedule: str = "1f1b",
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule={schedule!r} is not known; use {' or '.join(SCHEDULES)}")
        self._specs: list[Any] = list(layers)
        self._topo = make_topology(num_stages, topology)
        self._grid = PipelineParallelGrid(self._topo)
        self.num_stages, self.stage_id = self._grid.pipe_parallel_size, self._grid.stage_id
        self.global_rank, self.loss_fn = self._grid.global_rank, loss_fn
        self.seed_layers, self.base_seed = seed_layers, base_seed
        self.seed_fn = seed_fn or torch.manual_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func, self.checkpointable_layers = activation_checkpoint_func, checkpointable_layers
        self.dynamic_shape, self.schedule = dynamic_shape, SCHEDULES[schedule]
        self.micro_offset = 0  # forward passes so far: by them layers' seeds differ
        self.parts = self._partition(partition_method)
        self._local_start, self._local_stop = self.parts[self.stage_id], self.parts[self.stage_id + 1]
        self.forward_funcs: list[Layer] = []
        self.tied_modules = torch.nn.ModuleDict()
        self._check_unshared()
        self.ties: list[Tie] = []
        for make in (self._build, self._tie):
            failure = None
            try:
                make()
            except Exception as error:  # of a layer's constructor, say: the other stages would wait for this one
                failure = error
            self._grid.agree(failure)

    # --- construction ---------------------------------------------------------------------------------------------

    def _partition(self, method: str) -> list[int]:
        kind, _, pattern = method.strip().partition(":")
        kind = kind.lower()
        if kind == "uniform":
            edges = partition_uniform(len(self._specs), self.num_stages)
        elif kind in ("parameters", "best"):
            edges = partition_balanced([layer_numel(layer) for layer in self._specs], self.num_stages)
        elif kind == "type":
            matches = [bool(re.search(pattern, name_of_layer(layer), re.IGNORECASE)) for layer in self._specs]
            if not any(matches):
                raise ConfigError(f"partition_method={method!r}: no layer's class has a name that matches")
            edges = partition_balanced(matches, self.num_stages)
        else:
            raise ConfigError(f"partition_method={method!r} is not known; use parameters, uniform or type:REGEX")
        check_no_empty_stage(edges)
        shown = "; ".join(
            f"stage {stage}: layers {start}-{stop - 1} ({', '.join(map(name_of_layer, self._specs[start:stop][:3]))}"
            f"{', ...' if stop - start > 3 else ''})"
            for stage, (start, stop) in enumerate(pairwise(edges))
        )
        log_dist(f"pipeline of {self.num_stages} stages by {method}: {shown}")
        return edges

    def _check_unshared(self) -> None:
        stage_of: dict[int, int] = {}
        for index, layer in enumerate(self._specs):
            for name, param in layer.named_parameters() if isinstance(layer, torch.nn.Module) else ():
                stage = self.stage_owner(index)
                if stage_of.setdefault(id(param), stage) != stage:
                    raise ConfigError(
                        f"layer {index} ({name_of_layer(layer)}) shares its {name} with a layer of another stage, "
                        "where it would be trained apart; describe both with TiedLayerSpec"
                    )

    def _build(self) -> None:
        for index in range(self._local_start, self._local_stop):
            spec = self._specs[index]
            if self.seed_layers:
                self.seed_fn(self.base_seed + index)
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()  # type: ignore[assignment]
                module = self.tied_modules[spec.key]
                self.forward_funcs.append(module if spec.forward_fn is None else partial(spec.forward_fn, module))
                continue
            layer = spec.build() if isinstance(spec, LayerSpec) else spec
            if isinstance(layer, torch.nn.Module):
                self.add_module(str(index), layer)
            self.forward_funcs.append(layer)
        self._check_trainable()
        self.to(pick_device(comm.get_local_rank()).torch_device)
        # Layers of other stages, where they were given built, are not kept alive.
        self._specs = [spec if isinstance(spec, LayerSpec) else name_of_layer(spec) for spec in self._specs]

    def _tie(self) -> None:
        """Find the copies of tied modules on other stages, and make them equal."""
        for key, stages in self._stages_of_keys().items():
            group = self._grid.groups_of_stages(stages) if len(stages) > 1 else None
            if group is None:
                continue
            module = self.tied_modules[key]
            assert isinstance(module, torch.nn.Module)
            tie = Tie(key, module, Group(group, comms_logger), stages[0] == self.stage_id)
            self._check_alike(tie)
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    tie.group.broadcast(tensor.data)
            for param in module.parameters():
                param.ds_pipe_replicated = not tie.is_first  # type: ignore[attr-defined]
            self.ties.append(tie)

    def _stages_of_keys(self) -> dict[str, list[int]]:
        """By key, the stages that have a layer of it; in the same order on every rank."""
        found: dict[str, list[int]] = {}
        for index, spec in enumerate(self._specs):
            if isinstance(spec, TiedLayerSpec):
                stages = found.setdefault(spec.key, [])
                if self.stage_owner(index) not in stages:
                    stages.append(self.stage_owner(index))
        return found

    @staticmethod
    def _check_alike(tie: Tie) -> None:
        mine = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tie.module.state_dict().items()]
        if any(other != mine for other in tie.group.all_gather_objects(mine)):
            raise ConfigError(
                f"the layers tied as {tie.key!r} are not alike: their modules need the same parameters, with the same "
                "shapes and dtypes"
            )

    def _check_trainable(self) -> None:
        if next(self.parameters(), None) is None:
            layers = ", ".join(map(name_of_layer, self._specs[self._local_start : self._local_stop]))
            raise ConfigError(
                f"pipeline stage {self.stage_id} ({layers}) has no parameters to train; use fewer stages, or "
                "partition_method='parameters'"
            )

    # --- what is asked of it ----------------------------------------------------------------------------------------

    def topology(self) -> ProcessTopology:
        """Which rank is which."""
        return self._topo

    def mpu(self) -> PipelineParallelGrid:
        """The process groups."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        """How many stages there are."""
        return self.num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that has a layer."""
        if not 0 <= layer_idx < self.parts[-1]:
            raise ConfigError(f"there is no layer {layer_idx}: the pipeline has {self.parts[-1]}")
        return next(stage for stage in range(self.num_stages) if layer_idx < self.parts[stage + 1])

    def configure(self, checkpoint_interval: int, shard_params: bool) -> None:
        """Take what the configuration says.

        Raises:
            UnsupportedError: `shard_params`, which is stage 3.
        """
        if shard_params:
            raise UnsupportedError(
                "zero_optimization.stage 3 with a PipelineModule: its parameters would be gathered anew for every "
                "micro-batch; use stage 0, 1 or 2, and more pipeline stages"
            )
        if checkpoint_interval:
            self.activation_checkpoint_interval = checkpoint_interval

    def rewind(self, micro_offset: int) -> None:
        """Forget the forward passes since there were so many."""
        self.micro_offset = micro_offset

    def set_checkpoint_interval(self, interval: int) -> None:
        """Keep the input of only every so many layers from now on; 0: keep all."""
        self.activation_checkpoint_interval = interval

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(self, forward_input: Any) -> Any:
        """This stage's layers, one after the other."""
        self.micro_offset += 1
        interval = self.activation_checkpoint_interval
        if interval <= 0:
            return self._range(0, len(self.forward_funcs), self.micro_offset)(forward_input)
        value = forward_input
        for start in range(0, len(self.forward_funcs), interval):
            layers = self._range(start, start + interval, self.micro_offset)
            inputs = value if isinstance(value, tuple) else (value,)
            if self._is_recomputed(self.forward_funcs[start : start + interval]):
                value = self.activation_checkpoint_func(layers, *inputs)
            else:
                value = layers(*inputs)
        return value

    def _range(self, start: int, stop: int, micro_offset: int) -> Callable[..., Any]:
        """The layers [start, stop) of this stage as one function of tensors."""
        funcs = self.forward_funcs[start:stop]

        def run(*inputs: Any) -> Any:
            value: Any = inputs[0] if len(inputs) == 1 else inputs
            for index, layer in enumerate(funcs, self._local_start + start):
                if self.seed_layers:
                    self.seed_fn(self.base_seed * micro_offset + index)
                value = layer(value)
            return value

        return run

    def _is_recomputed(self, funcs: Sequence[Layer]) -> bool:
        modules = [func.args[0] if isinstance(func, partial) else func for func in funcs]
        if self.checkpointable_layers is not None:
            return all(name_of_layer(module) in self.checkpointable_layers for module in modules)
        return any(isinstance(module, torch.nn.Module) and any(True for _ in module.parameters()) for module in modules)
