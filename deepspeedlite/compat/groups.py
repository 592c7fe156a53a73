"""Process groups by what they are for, under DeepSpeed's names: data, model and sequence parallel.

They come from the `mpu` object that `initialize(mpu=...)`, or `initialize` here, was given; without one every rank is
data parallel and nothing else. Groups of experts do not exist in this release.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.runtime.errors import DistributedError, UnsupportedError


class _Source:
    """Where the groups come from."""

    mpu: Any = None

    def ask(self, what: str, otherwise: Any) -> Any:
        """What the mpu's `get_<what>` says; where it has none, `otherwise`."""
        method = getattr(self.mpu, f"get_{what}", None)
        return method() if method is not None else otherwise() if callable(otherwise) else otherwise


_source = _Source()


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Take the groups from `mpu`.

    Raises:
        UnsupportedError: `ep_size` is not 1.
    """
    if ep_size != 1:
        raise UnsupportedError(f"groups.initialize(ep_size={ep_size}): expert parallelism is not in this release")
    _source.mpu = mpu


def _world() -> Any:
    if not comm.is_initialized():
        raise DistributedError("process groups were asked for before init_distributed")
    return dist.group.WORLD


def _get_data_parallel_group() -> Any:
    """The ranks that train the same parameters on different data."""
    return _source.ask("data_parallel_group", _world)


def _get_data_parallel_world_size() -> int:
    """How many they are."""
    return _source.ask("data_parallel_world_size", comm.get_world_size)


def _get_data_parallel_rank() -> int:
    """This rank's place among them."""
    return _source.ask("data_parallel_rank", comm.get_rank)


def _get_broadcast_src_rank() -> int:
    """The rank of the world whose parameters the others of the data-parallel group start from."""
    return dist.get_global_rank(_get_sequence_data_parallel_group(), 0)


def _get_model_parallel_world_size() -> int:
    """How many ranks hold a model together."""
    return _source.ask("model_parallel_world_size", lambda: get_tensor_model_parallel_world_size())


def get_tensor_model_parallel_group() -> Any:
    """The ranks that hold the tensors of a model together. Raises `DistributedError` where there is no such group."""
    return _source.ask("tensor_model_parallel_group", lambda: _source.ask("model_parallel_group", _no_model_parallel))


def get_tensor_model_parallel_world_size() -> int:
    """How many they are; 1 without an mpu."""
    return _source.ask("tensor_model_parallel_world_size", lambda: _source.ask("model_parallel_world_size", 1))


def get_tensor_model_parallel_rank() -> int:
    """This rank's place among them."""
    return _source.ask("tensor_model_parallel_rank", lambda: _source.ask("model_parallel_rank", 0))


def get_tensor_model_parallel_src_rank() -> int:
    """The rank of the world that is the first among them."""
    if get_tensor_model_parallel_world_size() == 1:
        return comm.get_rank()
    return dist.get_global_rank(get_tensor_model_parallel_group(), 0)


def _no_model_parallel() -> Any:
    raise DistributedError(
        "there is no model-parallel group: give deepspeedlite.initialize(mpu=...) an object with "
        "get_model_parallel_group(), as Megatron's mpu has"
    )


get_model_parallel_group = get_tensor_model_parallel_group
get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank
get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank


def _get_sequence_parallel_group() -> Any:
    """The ranks that share a sequence. Raises `KeyError`, as in DeepSpeed, where sequences are not shared."""
    return _source.ask("sequence_parallel_group", _no_sequence_parallel)


def _no_sequence_parallel() -> Any:
    raise KeyError("no sequence parallel group: sequences are not shared over ranks")


def _get_sequence_parallel_world_size() -> int:
    """How many they are; 1 where sequences are not shared."""
    return _source.ask("sequence_parallel_world_size", 1)


def _get_sequence_parallel_rank() -> int:
    """This rank's place among them."""
    return _source.ask("sequence_parallel_rank", 0)


def _get_sequence_data_parallel_group() -> Any:
    """The ranks over which ZeRO shards."""
    return _source.ask("sequence_data_parallel_group", _get_data_parallel_group)


def _get_sequence_data_parallel_world_size() -> int:
    """How many they are."""
    return _source.ask("sequence_data_parallel_world_size", _get_data_parallel_world_size)


def _get_sequence_data_parallel_rank() -> int:
    """This rank's place among them."""
    return _source.ask("sequence_data_parallel_rank", _get_data_parallel_rank)
