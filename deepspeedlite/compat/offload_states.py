"""Model states that leave the device for a while, between two phases of a program: `engine.offload_states`.

The memory behind the tensors goes, the tensors and all views of them stay: `reload` puts the memory back, with its
content. On CPU ranks the states are in the host's memory already, and nothing is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch

from deepspeedlite.runtime.device import on_accelerator
from deepspeedlite.runtime.errors import UnsupportedError


class OffloadStateTypeEnum(str, Enum):
    """What can be offloaded, under DeepSpeed's names."""

    optim_states = "optim_states"  # what the optimizer keeps
    hp_params = "hp_params"  # fp32 masters of 16-bit parameters
    lp_params = "lp_params"  # the model's values
    lp_grads = "lp_grads"  # averaged gradients
    contiguous_grad_buffer = "contiguous_grad_buffer"  # gradients as a backward pass brings them


def states_of(units: Iterable[Any], state: Mapping[torch.Tensor, Mapping[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """The tensors of each kind of an engine's units, and of its optimizer's state."""
    units = list(units)
    kept = [value for held in state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    return {
        "optim_states": kept,
        "hp_params": [master for unit in units for master in unit.masters],
        "lp_params": [tensor for unit in units for tensor in (unit.flat.shard, unit.flat.values)],
        "lp_grads": [unit.grads.shard for unit in units],
        "contiguous_grad_buffer": [unit.grads.full for unit in units],
    }


class OffloadedStates:
    """Tensors whose device memory is given back, and their content in host memory.

    Args:
        states: tensors by kind.
        include: the kinds that are meant, names or members of the enum; all if None.
        device: where to; only "cpu".
        pinned: page-locked host memory, which is copied faster.

    Raises:
        UnsupportedError: another device, or an unknown kind.
    """

    def __init__(
        self, states: Mapping[str, list[torch.Tensor]], include: Container[Any] | None, device: Any, pinned: bool
    ) -> None:
        if getattr(device, "value", device) != "cpu":
            raise UnsupportedError(f"offload_states: states go to the cpu, not to {getattr(device, 'value', device)}")
        everything: Iterable[Any] = include if isinstance(include, Iterable) else ()
        for asked in everything:
            if getattr(asked, "value", asked) not in states:
                raise UnsupportedError(f"offload_states: {asked!r} is not one of {', '.join(states)}")
        self._kept: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        known: set[int] = set()
        for kind, tensors in states.items():
            if include is not None and kind not in include and OffloadStateTypeEnum(kind) not in include:
                continue
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes() and is_on_device(storage) and storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    self._put_away(storage, pinned)

    def _put_away(self, storage: torch.UntypedStorage, pinned: bool) -> None:
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        host = torch.empty(content.shape, dtype=torch.uint8, pin_memory=pinned and on_accelerator(content))
        self._kept.append((storage, host.copy_(content)))
        storage.resize_(0)

    @property
    def nbytes(self) -> int:
        """What left the device."""
        return sum(host.nbytes for _, host in self._kept)

    def reload(self, non_blocking: bool = False) -> None:
        """Everything comes back."""
        for storage, host in self._kept:
            storage.resize_(host.nbytes)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(
                host, non_blocking=non_blocking
            )
        self._kept.clear()


class StatesAway:
    """Takes an engine's model states off the device and brings them back; one at a time is away, or none.

    Args:
        units: the engine's.
        state: its optimizer's, asked for anew each time.
    """

    def __init__(self, units: Sequence[Any], state: Callable[[], Mapping[torch.Tensor, Mapping[str, Any]]]) -> None:
        self._units, self._state = units, state
        self.away: OffloadedStates | None = None

    def offload(self, include: Container[Any] | None, device: Any, pinned: bool) -> None:
        """See `OffloadedStates`."""
        self.away = OffloadedStates(states_of(self._units, self._state()), include, device, pinned)
        self._follow()

    def reload(self, non_blocking: bool) -> None:
        """Bring back what is away, if anything is."""
        if self.away is not None:
            self.away.reload(non_blocking)
            self._follow()
        self.away = None

    def _follow(self) -> None:
        for unit in self._units:
            unit.flat.follow_memory()


def is_on_device(storage: torch.UntypedStorage) -> bool:
    """Whether this memory is an accelerator's."""
    return storage.device.type != "cpu"
