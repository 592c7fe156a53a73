"""Experts split over ranks: each rank has a part of the inner columns of every expert, and the outputs are summed.

For transformers' modules of experts whose weights are one tensor for all, `gate_up_proj [experts, 2 * inner, hidden]`
and `down_proj [experts, hidden, inner]`. Every rank routes every token as the whole model does.
"""

from __future__ import annotations

from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.parallel.tensor.collectives import copy_in, sum_out


def are_experts(module: torch.nn.Module) -> bool:
    """Whether a module has the two weights above, and nothing else."""
    own = dict(module.named_parameters())
    if own.keys() != {"gate_up_proj", "down_proj"} or any(param.dim() != 3 for param in own.values()):
        return False
    experts, hidden, inner = own["down_proj"].shape
    return tuple(own["gate_up_proj"].shape) == (experts, 2 * inner, hidden)


def sum_outputs(module: torch.nn.Module, group: Group) -> None:
    """Have a module of experts that has this rank's part of them give the sum over all ranks."""

    def copied(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        def of(value: Any) -> Any:
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return copy_in(value, group) if is_float else value

        return tuple(of(value) for value in args), {name: of(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(copied, with_kwargs=True)
    module.register_forward_hook(lambda _, __, output: sum_out(output, group))
