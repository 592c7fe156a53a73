"""What goes wrong when ops are compiled."""

from __future__ import annotations


class OpBuildError(RuntimeError):
    """An op cannot be compiled or loaded here; the message says why, and how to mend it.

    Attributes:
        what: the reason alone.
        remedy: what follows it in the message; "" where there is none, or where the reason has it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy
