"""`PartitionedTensor`: a tensor of which each rank of a group holds a piece, and that all can make whole again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.parallel.pipe.partition import partition_uniform


class PartitionedTensor:
    """This rank's piece of `tensor`, which all ranks of `group` hold alike; the first pieces are the larger ones.

    Args:
        tensor: of any shape; only its piece is kept.
        group: the ranks.
        partition_meta: not used, as in DeepSpeed.
    """

    def __init__(self, tensor: torch.Tensor, group: Any, partition_meta: Any = None) -> None:
        self.group, self.num_parts, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.orig_size, self.orig_device = list(tensor.size()), tensor.device
        self.partition = partition_uniform(tensor.numel(), self.num_parts)
        begin, end = self.partition[self.rank : self.rank + 2]
        self.local_data = tensor.detach().reshape(-1)[begin:end].clone()

    @classmethod
    def from_meta(
        cls, meta: torch.Tensor | Sequence[int], local_part: torch.Tensor, group: Any, device: Any = None
    ) -> PartitionedTensor:
        """One made of a piece and what `to_meta` gave, on the rank that sent them or on its counterpart.

        Args:
            meta: from `to_meta`.
            local_part: from `data()`.
            group: the ranks that hold the pieces now.
            device: where `full` puts the tensor; the piece's device by default.
        """
        numbers = [int(value) for value in meta]
        sizes, rest = numbers[1 : numbers[0] + 1], numbers[numbers[0] + 1 :]
        made = cls.__new__(cls)
        made.group, made.num_parts, made.rank = group, rest[0], dist.get_rank(group)
        made.orig_size, made.partition = sizes, rest[2:]
        made.orig_device = torch.device(device) if device is not None else local_part.device
        made.local_data = local_part
        return made

    def to_meta(self) -> torch.Tensor:
        """What `from_meta` needs beside the piece: dimensions, shape, pieces, rank, and where each piece begins."""
        return torch.tensor([len(self.orig_size), *self.orig_size, self.num_parts, self.rank, *self.partition])

    def full(self, device: Any = None) -> torch.Tensor:
        """The whole tensor. Collective."""
        pieces = [self.local_data.new_empty(end - begin) for begin, end in pairwise(self.partition)]
        largest = max(piece.numel() for piece in pieces)  # every rank's message has one size
        padded = torch.nn.functional.pad(self.local_data.reshape(-1), (0, largest - self.local_data.numel()))
        gathered = [padded.new_empty(largest) for _ in pieces]
        dist.all_gather(gathered, padded, group=self.group)
        whole = torch.cat([found[: piece.numel()] for found, piece in zip(gathered, pieces)])
        return whole.view(self.orig_size).to(device or self.orig_device)

    def data(self) -> torch.Tensor:
        """The piece, flat."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """The piece's size."""
        return self.local_data.size()

    def full_size(self) -> list[int]:
        """The whole tensor's shape."""
        return self.orig_size
