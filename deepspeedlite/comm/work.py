"""What a collective under way is to those who wait for it."""

from __future__ import annotations

from typing import Any, Protocol


class Work(Protocol):
    """A collective under way. Its buffers may be touched again after `wait` (on GPUs: by the current stream)."""

    def wait(self) -> Any:
        """Wait for completion; raises what the backend raises when a rank is gone."""
