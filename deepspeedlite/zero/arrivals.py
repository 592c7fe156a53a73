"""How many gradients of a unit a backward pass still owes: a counter, fed by `GradReducer` from autograd's hooks."""

from __future__ import annotations


class Arrivals:
    """Counts, in one backward pass after another, the gradients of one unit's parameters.

    Args:
        count: how many parameters there are; they are known by their index.
    """

    def __init__(self, count: int) -> None:
        # Between `begin` and `end`. A gradient that arrives outside comes from a pass that nobody has announced.
        self.in_pass = False
        # Whether this pass has sent what arrived for reduction: a gradient that comes later would be lost.
        self.is_launched = False
        # Whether a whole pass was seen. Before that nobody knows how often reentrant checkpoints bring a gradient.
        self.has_learnt = False
        # How often each gradient came in this pass,
        self._seen = [0] * count
        # and how often each comes in one pass: once, until a pass has shown otherwise. A parameter used in several
        # reentrant checkpoints comes several times; one that does not come keeps its unit open to the end of the pass.
        self._expected = [1] * count
        # Gradients that have not come as often as expected; what a pass brings too often does not count.
        self._missing = 0
        # A gradient came from a pass inside the pass before `has_learnt`: more may come, so only the end closes it.
        self._is_uncertain = False
        # Over all passes since `clear`, unlike the others: what the step's check for forgotten parameters asks.
        self.reached = [False] * count

    def begin(self, missing: int) -> None:
        """A backward pass starts that is to bring the gradients of so many parameters."""
        self._seen = [0] * len(self._seen)
        self._missing = missing
        self.in_pass, self.is_launched, self._is_uncertain = True, False, False

    def note(self, index: int, is_nested: bool) -> bool:
        """A gradient has come, of a pass inside the pass or not; whether it was the last one that was missing."""
        self.reached[index] = True
        self._seen[index] += 1
        self._is_uncertain = self._is_uncertain or is_nested
        if self._seen[index] != self._expected[index]:
            return False
        self._missing -= 1
        return self.is_complete

    @property
    def is_complete(self) -> bool:
        """Whether every gradient known to come in this pass has come."""
        return self._missing <= 0 and not self._is_uncertain

    def end(self) -> None:
        """The pass is over: learn how often each gradient comes."""
        self.in_pass, self.has_learnt = False, True
        self._expected = [max(known, seen) for known, seen in zip(self._expected, self._seen)]

    def clear(self) -> None:
        """The gradients are forgotten, and a pass that was under way with them."""
        self.in_pass = False
        self.reached = [False] * len(self.reached)
