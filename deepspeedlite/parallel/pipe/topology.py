"""Which rank is which: ranks as points of a grid with named axes, and the process groups along them.

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=4)    pure arithmetic
    grid = PipelineParallelGrid(topology)                                     the groups; a Megatron-style `mpu`

Ranks are numbered in row-major order: the last axis changes first.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.runtime.errors import ConfigError, DistributedError, PipelineError

PIPE, DATA, MODEL = "pipe", "data", "model"


class ProcessTopology:
    """The numbering of ranks in a grid.

    Args:
        axes: names of the axes, the one that changes last first.
        dims: how long each is.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or min(dims, default=1) < 1:
            raise ConfigError(f"a topology needs one length of at least 1 per axis, got {list(axes)} and {list(dims)}")
        self.axes, self.dims = list(axes), list(dims)
        place_type: Any = namedtuple("ProcessCoord", axes)  # type: ignore[misc]  # DeepSpeed's name for a place
        self.ProcessCoord = place_type
        places = product(*map(range, dims))
        self.mapping: dict[Any, int] = {place_type._make(place): rank for rank, place in enumerate(places)}

    def world_size(self) -> int:
        """How many ranks there are."""
        return math.prod(self.dims)

    def get_axis_names(self) -> list[str]:
        """Names of the axes."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Length of an axis; 0 if there is no such axis."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a place, of which every coordinate is given."""
        if set(coord_kwargs) != set(self.axes):
            raise ConfigError(f"get_rank() takes every coordinate ({', '.join(self.axes)}), got {coord_kwargs}")
        key = self.ProcessCoord(**coord_kwargs)
        if key not in self.mapping:
            raise ConfigError(f"{key} lies outside a grid of {dict(zip(self.axes, self.dims))}")
        return self.mapping[key]

    def get_coord(self, rank: int) -> Any:
        """The place of a rank: a named tuple of its coordinates."""
        for place, number in self.mapping.items():
            if number == rank:
                return place
        raise ConfigError(f"rank {rank} is not in a topology of {self.world_size()} ranks")

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks whose coordinates are those given."""
        return [
            rank
            for place, rank in self.mapping.items()
            if all(getattr(place, axis) == index for axis, index in filter_kwargs.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at one index of an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """All lines of ranks along an axis: those that differ in it alone."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        lines = product(*(range(self.get_dim(name)) for name in others))
        return [self.filter_match(**dict(zip(others, line))) for line in lines]

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = (DATA, PIPE),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """A rank's coordinates as text, such as `model_00`."""
        place = self.get_coord(rank)
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(place, axis):02d}" for axis in shown)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Stages x replicas: the replicas of a stage are neighbours, since they exchange the most."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__([PIPE, DATA], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages x replicas x parts of a layer's tensors."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__([PIPE, DATA, MODEL], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """The process groups of a topology, with the methods of a Megatron-style `mpu`. Made by every rank at once.

    The model-parallel ranks hold a replica together: its stages, and their tensors' parts where there is an axis
    `model` (its ranks alone are the slice-parallel, or tensor-model-parallel, ones).

    Raises:
        ConfigError: the topology does not have as many ranks as there are, or has other axes.
    """

    def __init__(self, topology: ProcessTopology) -> None:
        if not {PIPE, DATA} <= set(topology.axes) <= {PIPE, DATA, MODEL}:
            raise ConfigError(f"a pipeline's topology has the axes pipe, data and perhaps model, not {topology.axes}")
        comm.init_process_group()
        if topology.world_size() != comm.get_world_size():
            raise ConfigError(
                f"a topology of {dict(zip(topology.axes, topology.dims))} has {topology.world_size()} ranks, and "
                f"{comm.get_world_size()} are running"
            )
        self._topo = topology
        self.global_rank = comm.get_rank()
        self.world_size = topology.world_size()
        place = topology.get_coord(self.global_rank)._asdict()
        self.data_parallel_size, self.pipe_parallel_size = topology.get_dim(DATA), topology.get_dim(PIPE)
        self.slice_parallel_size = max(topology.get_dim(MODEL), 1)
        self.model_parallel_size = self.pipe_parallel_size * self.slice_parallel_size
        self.stage_id, self.data_parallel_id = place[PIPE], place[DATA]
        self.slice_parallel_id = place.get(MODEL, 0)
        self._data = self._own(topology.get_axis_comm_lists(DATA))
        self._slice = self._own(topology.get_axis_comm_lists(MODEL))
        self._model = self._own([topology.get_axis_list(DATA, index) for index in range(self.data_parallel_size)])
        lines = topology.get_axis_comm_lists(PIPE)
        self._pipe = self._own(lines)
        # [Note: a channel for each direction] On NCCL what two ranks of a group send goes one after the other, both
        # ways: one rank that sends forward and one that sends backward would wait for each other for good.
        self.activations = self._own(lines)
        self.gradients = self._own(lines)
        self.headers = self._own(lines, backend="gloo")
        self.everyone = Group(self._own([list(range(self.world_size))], backend="gloo"))

    def _own(self, lists: Sequence[Sequence[int]], backend: str | None = None) -> Any:
        """The group, of those that all ranks make, that this rank is in; None, for it alone, where there are none."""
        own = None
        for ranks in lists:
            group = dist.new_group(list(ranks), timeout=comm.default_timeout(), backend=backend)
            own = group if self.global_rank in ranks else own
        return own

    def groups_of_stages(self, stages: Sequence[int]) -> Any:
        """A group of the ranks at the same place of these stages, for each place; None on ranks of other stages."""
        own = None
        for line in self._topo.get_axis_comm_lists(PIPE):
            ranks = [line[stage] for stage in stages]
            group = dist.new_group(ranks, timeout=comm.default_timeout())
            own = group if self.global_rank in ranks else own
        return own

    def agree(self, failure: Exception | None) -> None:
        """Called by every rank with what it failed with: raises it there, and on the others a `PipelineError` of it."""
        told = self.everyone.all_gather_objects(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text:
                raise PipelineError(f"rank {rank} (pipeline stage {self._topo.get_coord(rank).pipe}) failed: {text}")

    def topology(self) -> ProcessTopology:
        """The numbering of the ranks."""
        return self._topo

    def get_global_rank(self) -> int:
        """This rank's number in the world."""
        return self.global_rank

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank that is another stage of this replica; `kwargs` are coordinates that differ from this rank's."""
        place = {**self._topo.get_coord(self.global_rank)._asdict(), PIPE: stage_id, **kwargs}
        return self._topo.get_rank(**place)

    # --- as an mpu --------------------------------------------------------------------------------------------------

    def get_stage_id(self) -> int:
        """This rank's stage."""
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        """Which replica this rank is part of."""
        return self.data_parallel_id

    def get_pipe_parallel_rank(self) -> int:
        """This rank's stage."""
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        """How many stages there are."""
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        """The stages of this replica."""
        return self._pipe

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size
    get_pipeline_model_parallel_group = get_pipe_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Which replica this rank is part of."""
        return self.data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        """How many replicas there are."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold the same layers."""
        return self._data

    def get_model_parallel_rank(self) -> int:
        """This rank's place in its replica."""
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        """How many ranks hold a replica."""
        return self.model_parallel_size

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold a replica."""
        return self._model

    def get_slice_parallel_rank(self) -> int:
        """Which part of its layers' tensors this rank holds."""
        return self.slice_parallel_id

    def get_slice_parallel_world_size(self) -> int:
        """In how many parts tensors are."""
        return self.slice_parallel_size

    def get_slice_parallel_group(self) -> Any:
        """The ranks that hold the same layers' tensors together."""
        return self._slice

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group


def make_topology(num_stages: int | None, topology: ProcessTopology | None) -> ProcessTopology:
    """The topology given, or `num_stages` stages of as many replicas as there are ranks for."""
    if topology is not None:
        if num_stages is not None and num_stages != topology.get_dim(PIPE):
            raise ConfigError(f"num_stages={num_stages}, and the topology has {topology.get_dim(PIPE)} stages")
        return topology
    if num_stages is None:
        raise ConfigError("PipelineModule needs num_stages= or topology=")
    comm.init_process_group()
    replicas, left = divmod(comm.get_world_size(), num_stages) if num_stages >= 1 else (0, 1)
    if left or not replicas:
        raise DistributedError(f"{comm.get_world_size()} ranks cannot be divided into {num_stages} pipeline stages")
    return PipeDataParallelTopology(num_stages, replicas)
