"""Several collectives under way as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class PendingWork:
    """Several collectives or messages as one, and what is done when all have been waited for; over at once if none."""

    def __init__(self, works: Sequence[Any] = (), then: Callable[[], Any] | None = None) -> None:
        self._works, self._then = works, then

    def wait(self, *arguments: Any) -> bool:
        """Wait for all; the second time there is nothing to wait for."""
        works, self._works = self._works, ()
        for work in works:
            work.wait(*arguments)
        then, self._then = self._then, None
        if then is not None:
            then()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` will not have to."""
        return all(work.is_completed() for work in self._works)
