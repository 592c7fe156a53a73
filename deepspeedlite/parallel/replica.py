"""What one copy of the model is spread over: the replica.

    world            data-parallel groups ->      a rank averages gradients, and shards states, with its row; all of a
    replica    |     0  2  4  6    of part 0      replica (a column) must skip the same steps and clip by one norm, that
    of ranks   v     1  3  5  7    of part 1      of the whole model.

Without model parallelism a replica is one process, and everything here is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from deepspeedlite.comm import Group


@dataclass(frozen=True)
class Replica:
    """The ranks that together hold one copy of the model; by default this process alone.

    A parameter is one of three things to a rank: a piece of one that is split over `tensor` (marked
    `tensor_model_parallel` or, by older scripts, `model_parallel`), a copy of what all ranks of `tensor` hold alike, or
    one that this rank alone has, as every one is where `tensor` is one rank. A copy of what another rank of the
    replica holds outside its `tensor` (layers tied over pipeline stages) is marked `ds_pipe_replicated`.
    """

    group: Group = field(default_factory=Group.alone)
    tensor: Group = field(default_factory=Group.alone)
    # In a checkpoint, parameters of one name on two ranks of a replica are one parameter, unless there are `parts` that
    # keep theirs apart: then this rank's names begin with `name_prefix`, and it can only be loaded by equally many.
    part: int = 0
    parts: int = 1

    @property
    def name_prefix(self) -> str:
        """What this rank's parameters and buffers are called in a checkpoint, before their names in the module."""
        return f"mp_rank_{self.part:02d}." if self.parts > 1 else ""

    def counts(self, param: torch.Tensor) -> bool:
        """Whether a norm of the whole model takes a parameter from this rank: from one rank of a replica it does."""
        if getattr(param, "ds_pipe_replicated", False):
            return False
        return self.tensor.rank == 0 or is_model_parallel_parameter(param)


class Tie(NamedTuple):
    """A module of which several ranks of a replica have a copy each, such as embedding and head of a pipeline."""

    key: str
    module: torch.nn.Module
    group: Group  # the ranks that have one
    is_first: bool  # whether this rank's copy is the one that counts in norms and gives the values at the start

    def holds(self, param: torch.Tensor) -> bool:
        """Whether a parameter is of the module."""
        return any(param is own for own in self.module.parameters())


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Whether a parameter is one rank's piece of a tensor-parallel one, as Megatron marks it."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))
