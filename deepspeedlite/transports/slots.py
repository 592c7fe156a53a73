"""Slots: memory in which ranks of a host show each other the same few bytes, without a call to the kernel.

A board is a rank's memory that all others map: a count of what it has shown so far, and two slots. What is shown as
number n lies in slot n % 2, and the count becomes n after it is there. A rank shows n when it has taken n - 1 of every
other; so each of them has shown n - 1, and had taken n - 2 before: nobody reads the slot that is written.

[Note: the order of memory]
The bytes have to be seen before the count. A processor of x86 makes a core's stores visible in their order, and none of
these steps is a compiler's to move. Elsewhere nothing is promised: `ARE_ORDERED` is false, and messages are sent.

[Note: who sleeps]
Who has looked in vain for `_SPIN_S` says so on its board and waits for a message, which those who show something send.
One that is missed, as the one looked just before the other wrote, is made up for by looking again now and then.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

ARE_ORDERED = platform.machine() in ("x86_64", "AMD64")
"""Whether boards may be used on this machine."""

SLOT_NBYTES = 1 << 16
"""The most that can be shown at once."""

_HEAD_NBYTES = 4096
BOARD_NBYTES = _HEAD_NBYTES + 2 * SLOT_NBYTES
"""Of a rank's memory; what is never written takes none."""

_SPIN_S = 0.002
_LOOKS = 300  # before the processor is offered to others in between: a few tens of microseconds
# Words of a board's head: the count, whether its rank sleeps, and from here on, of each slot, what for and how much.
_COUNT, _SLEEPS, _ABOUT = 0, 16, 32


class Board:
    """A view of one rank's board.

    Args:
        memory: uint8, of `BOARD_NBYTES`, zeros at first.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        head: Any = memory[:_HEAD_NBYTES].numpy()  # whose type says nothing of its buffer before Python 3.12
        self.head = memoryview(head).cast("q")
        self._slots = [memory[_HEAD_NBYTES + at : _HEAD_NBYTES + at + SLOT_NBYTES] for at in (0, SLOT_NBYTES)]

    @property
    def count(self) -> int:
        """What was shown so far."""
        return self.head[_COUNT]

    @property
    def sleeps(self) -> bool:
        """Whether its rank waits for a message."""
        return bool(self.head[_SLEEPS])

    @sleeps.setter
    def sleeps(self, value: bool) -> None:
        self.head[_SLEEPS] = value

    def show(self, count: int, tensor: torch.Tensor, purpose: int) -> None:
        """This rank's: put a contiguous tensor where others see it."""
        slot, about = self._slots[count % 2], _ABOUT + 2 * (count % 2)
        slot[: tensor.nbytes].view(tensor.dtype).copy_(tensor.view(-1))
        self.head[about], self.head[about + 1] = purpose, tensor.nbytes
        self.head[_COUNT] = count

    def shown(self, count: int) -> tuple[torch.Tensor, int]:
        """What was shown under a number, and what for; valid until the number after the next is shown."""
        about = _ABOUT + 2 * (count % 2)
        return self._slots[count % 2][: self.head[about + 1]], self.head[about]


def have_shown(boards: Sequence[Board], count: int) -> bool:
    """Whether all have shown this number, within a moment that is not worth going to sleep for."""
    looks, stop_s = 0, 0.0
    heads = [board.head for board in boards]
    while any(head[_COUNT] < count for head in heads):
        looks += 1
        if looks < _LOOKS:
            continue
        os.sched_yield()
        stop_s = stop_s or time.monotonic() + _SPIN_S
        if time.monotonic() > stop_s:
            return False
    return True
