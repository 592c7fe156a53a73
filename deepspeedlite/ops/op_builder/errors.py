"""What goes wrong when ops are compiled."""

from __future__ import annotations


class OpBuildError(RuntimeError):
    """An op cannot be compiled or loaded here; the message says why."""
