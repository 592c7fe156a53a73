"""What a rank that is left alone gets in place of sharded values: their names, shapes and dtypes.

Clients ask for a state dict on a rank that does not save it, or for its keys only. That is answered. Whoever reads a
value, or saves one, is told why there is none.
"""

from __future__ import annotations

from typing import Any

import torch

from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.tensors import tensors_in


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
