"""Tensors that stand for values that are not here, and say so when the values are wanted.

A sharded parameter is empty while nobody uses it. torch would compute with it without a word: what is added to it in
place vanishes, its norm is 0, the product of two is 0. So it is a `ShardedParameter` meanwhile, and what is made of it
without its values (`.data`, `.detach()`, `.cpu()`) is a `ShardedTensor`. What asks for kind, place or shape is answered
as torch answers it; what reads or writes values is an error. Only the class changes: a parameter stays the object that
it is, and is a plain one, at no cost, while its values are there.

A rank that is left alone with a state dict gets a `MissingTensor` in place of each sharded value: name, shape, dtype.
Clients ask for a state dict on a rank that does not save it, or for its keys only. That is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepspeedlite.runtime.errors import DistributedError, EngineStateError
from deepspeedlite.runtime.tensors import tensors_in

# Attributes and methods that ask a parameter for its shape,
OF_SHAPE = {"shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "stride", "is_contiguous", "nbytes"}
OF_SHAPE |= {"__len__"}
# and those that ask for what does not depend on it either.
OF_KIND = {"dtype", "device", "layout", "names", "element_size", "itemsize", "is_floating_point", "is_complex"}
OF_KIND |= {"is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_leaf", "requires_grad", "requires_grad_"}
OF_KIND |= {"grad", "grad_fn", "retains_grad", "register_hook", "register_post_accumulate_grad_hook", "_version"}
# The result of these stands for the same values, and is as empty.
_SAME_VALUES = {"data", "detach", "to", "cpu", "cuda", "float", "half", "bfloat16", "double", "type", "contiguous"}
# What torch, optimizers and clients ask besides: where it is, and who watches it.
_OF_PLACE = {"data_ptr", "storage", "untyped_storage", "storage_offset", "storage_type", "get_device", "share_memory_"}
_OF_PLACE |= {"retain_grad", "backward", "__format__", "__dir__"}
# Attributes that are views; no other needs values.
_VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
_HARMLESS = OF_SHAPE | OF_KIND | _SAME_VALUES | _OF_PLACE
_HARMLESS_STARTS = ("is_", "new_", "_")
_MATHS_STARTS = ("__", "_foreach", "_fused", "_amp")


# A context in which sharded parameters are tensors like any other, which costs less: for what a step does with each.
as_plain = torch._C.DisableTorchFunctionSubclass


def name_of(func: Any) -> str:
    """A torch function's name, or that of the attribute which it reads or writes."""
    return _attribute_of(func) or getattr(func, "__name__", "")


def _attribute_of(func: Any) -> str:
    """The attribute that a function reads or writes; empty for one that does not."""
    accesses = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")
    return getattr(getattr(func, "__self__", None), "__name__", "") if accesses else ""


def _needs_values(func: Any, name: str) -> bool:
    if name in _HARMLESS or name.endswith("_like"):
        return False
    if _attribute_of(func):
        return name in _VIEWS
    return not name.startswith(_HARMLESS_STARTS) or name.startswith(_MATHS_STARTS)


class _Sharded:
    """What `ShardedParameter` and `ShardedTensor` have in common."""

    full_name: str  # the parameter's

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what needs no values.

        Raises:
            EngineStateError: what needs them.
        """
        name = name_of(func)
        given: list[Any] = list(tensors_in((args, kwargs), 0))
        first = next(each for each in given if isinstance(each, _Sharded))
        with as_plain():
            if _needs_values(func, name):
                raise EngineStateError(
                    f"parameter {first.full_name} is sharded over the ranks, and its values are not here at the "
                    f"moment: {name} would do nothing, or something wrong, without a word. Use it inside "
                    "deepspeedlite.zero.GatheredParameters([param], modifier_rank=0), which all ranks enter "
                    "(modifier_rank=None: to read it)"
                )
            result = func(*args, **(kwargs or {}))
            if name in _SAME_VALUES and type(result) is torch.Tensor and given[0] is first:
                empty = result.as_subclass(ShardedTensor)
                empty.full_name = first.full_name
                return empty
        return result


class ShardedTensor(_Sharded, torch.Tensor):
    """As empty as the sharded parameter that it was made of."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedTensor({self.full_name}, whose values are not here)"


class ShardedParameter(_Sharded, torch.nn.Parameter):
    """A parameter while its values are sharded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain parameter, for whoever calls `type(param)(...)`."""
        return torch.nn.Parameter(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedParameter({self.full_name}, whose values are not here)"


def mark_sharded(param: torch.nn.Parameter) -> None:
    """The parameter's values have gone. One of a class of its own stays what it is."""
    if type(param) is torch.nn.Parameter:
        param.__class__ = ShardedParameter


def mark_whole(param: torch.nn.Parameter) -> None:
    """The parameter's values are there again."""
    if type(param) is ShardedParameter:
        param.__class__ = torch.nn.Parameter  # type: ignore[assignment]


class MissingTensor(torch.Tensor):
    """A tensor without memory, on the meta device, that says why when its values are wanted."""

    why: str

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype, why: str) -> MissingTensor:
        """One of this shape and dtype.

        Args:
            shape: of the whole tensor.
            dtype: of the whole tensor.
            why: the message of the error.
        """
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(MissingTensor)
        made.why = why
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What needs no values is done, to the same effect on the result; what needs them raises DistributedError."""
        given = next((each for each in tensors_in((args, kwargs), 0) if isinstance(each, MissingTensor)), None)
        why = getattr(given, "why", "its values were not gathered")
        try:
            result = super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, TypeError) as error:
            if "meta" in str(error).lower():
                raise DistributedError(why) from error
            raise
        for each in tensors_in(result, 0):
            if isinstance(each, MissingTensor):
                each.why = why
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DistributedError(self.why)

    def __deepcopy__(self, memo: Any) -> Any:
        raise DistributedError(self.why)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"MissingTensor({tuple(self.shape)}, {self.dtype}: {self.why})"
