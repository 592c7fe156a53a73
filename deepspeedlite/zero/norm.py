"""2-norms of flat gradients: taken piece by piece, joined over pieces, units and ranks.

A norm is finite only if every gradient is, so one number per rank says both how long the gradient is and whether any
of it is an infinity or NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from deepspeedlite.comm import Group


def norm_dtype(grad_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients' squares are summed."""
    return torch.float64 if grad_dtype is torch.float64 else torch.float32


def norms_of(grads: torch.Tensor, spans: Iterable[slice], dtype: torch.dtype) -> list[torch.Tensor]:
    """The norms of flat gradients' spans, each 0-dim and where the gradients are: nothing waits for a device."""
    everything = slice(0, grads.numel())
    cuts = (grads if span == everything else grads[span] for span in spans)
    return [torch.linalg.vector_norm(piece, dtype=dtype) for cut in cuts for piece in _pieces(cut)]


def joined(norms: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The norm of what has these norms."""
    if not norms:
        return torch.zeros((), dtype=dtype, device=device)
    return torch.linalg.vector_norm(torch.stack([norm.to(device, dtype) for norm in norms]))


def norm_of_all(norm: torch.Tensor, group: Group, alike: bool = False) -> torch.Tensor:
    """The norm of what the ranks of a group have these norms of; `alike`: of what they all have, finite on all."""
    if group.size == 1:
        return norm
    total = norm.square()
    group.all_reduce(total, label="the gradients' norm")
    return (total / group.size if alike else total).sqrt()


def _pieces(grads: torch.Tensor) -> Sequence[torch.Tensor]:
    """On a CPU torch takes 16-bit numbers to fp32 before it takes their norm: pieces of 1 MiB stay in the cache."""
    return grads.split(1 << 18) if grads.device.type == "cpu" and grads.dtype.itemsize == 2 else [grads]
