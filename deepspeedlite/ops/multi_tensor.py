"""One pass over a whole list of tensors: scaling, casting, norms, looking for infinities, and flattening.

The ops of the library `utils` do it where they are there, torch where not. Nothing waits for the device: what is found
stays in tensors there. Tensors are contiguous, fp32, bf16 or fp16, and of one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeedlite.ops import is_available, load
from deepspeedlite.runtime.errors import OpError

_KNOWN = (torch.float32, torch.bfloat16, torch.float16)


def multi_tensor_scale(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    factor: float = 1.0,
    found_inf: Tensor | None = None,
    factor_tensor: Tensor | None = None,
) -> None:
    """Write inputs times `factor` (times `factor_tensor`) to outputs, which may be the inputs, in their dtypes.

    `found_inf`, a 0-d fp32 tensor on their device, becomes 1 where a result is infinite or NaN, and is left alone where
    none is. Without outputs that is all that happens.
    """
    if not inputs:
        return
    device_type = inputs[0].device.type
    if _op_takes("multi_tensor_scale", [*inputs, *outputs]):
        load("multi_tensor_scale", device_type)(list(inputs), list(outputs), found_inf, factor_tensor, float(factor))
        return
    for index, tensor in enumerate(inputs):
        scaled = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
        scaled = scaled if factor_tensor is None else scaled * factor_tensor
        if outputs:
            scaled = outputs[index].copy_(scaled)
        if found_inf is not None:
            found_inf.copy_(torch.maximum(found_inf, (~scaled.isfinite()).any().to(found_inf)))


def multi_tensor_cast(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Copy inputs to outputs, in their dtypes."""
    multi_tensor_scale(inputs, outputs)


def has_overflow(tensors: Sequence[Tensor], found_inf: Tensor | None = None) -> Tensor:
    """1 where an element is infinite or NaN, otherwise 0 (or what `found_inf` holds): a 0-d fp32 tensor."""
    if found_inf is None:
        found_inf = torch.zeros((), dtype=torch.float32, device=tensors[0].device if tensors else None)
    multi_tensor_scale(tensors, [], found_inf=found_inf)
    return found_inf


def multi_tensor_l2norm(tensors: Sequence[Tensor], per_tensor: bool = False) -> Tensor:
    """The 2-norm of all elements together, a 0-d fp32 tensor, or that of each tensor, shape (tensors,)."""
    norms = torch.zeros(len(tensors), dtype=torch.float32, device=tensors[0].device if tensors else None)
    if not tensors:
        pass
    elif _op_takes("multi_tensor_l2norm", tensors):
        load("multi_tensor_l2norm", tensors[0].device.type)(list(tensors), norms)
    else:
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32)).to(torch.float32)
    return norms if per_tensor else torch.linalg.vector_norm(norms)


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """All elements in one new 1-D tensor, of `dtype` or the first tensor's."""
    if not tensors:
        raise OpError("flatten: no tensors were given, so neither dtype nor device of the result is known")
    flat = torch.empty(
        sum(tensor.numel() for tensor in tensors), dtype=dtype or tensors[0].dtype, device=tensors[0].device
    )
    if _op_takes("multi_tensor_scale", [*tensors, flat]):
        multi_tensor_cast([tensor.view(-1) for tensor in tensors], _slices(flat, tensors))
    else:
        torch._foreach_copy_(_slices(flat, tensors), [tensor.reshape(-1) for tensor in tensors])
    return flat


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a 1-D tensor, in the shapes of `like`, one after the other.

    Raises:
        OpError: `flat` is not 1-D or has not as many elements as they have together.
    """
    numel = sum(tensor.numel() for tensor in like)
    if flat.dim() != 1 or flat.numel() != numel:
        raise OpError(f"unflatten: a tensor of shape {tuple(flat.shape)} does not hold {numel} elements in one row")
    return [part.view(tensor.shape) for part, tensor in zip(_slices(flat, like), like)]


def _slices(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return list(flat.split([tensor.numel() for tensor in like]))


def _op_takes(name: str, tensors: Sequence[Tensor]) -> bool:
    known = all(tensor.dtype in _KNOWN and tensor.is_contiguous() for tensor in tensors)
    return known and tensors[0].device.type in ("cpu", "cuda") and is_available(name, tensors[0].device.type)
