"""Says which ranks, or machines, have ended well while others run on: a script that leaves its loop early on one rank.

That may be right, as where rank 0 saves at the end, so it is one line and no failure; it is said when it has lasted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeedlite.launcher.report import duration
from deepspeedlite.runtime.log import logger

GRACE_S = 5.0
_NAMED = 8


class EarlyEnds:
    """What has been said of it.

    Args:
        noun: of what ends.
        started_s: time.monotonic() of the start.
    """

    def __init__(self, noun: str, started_s: float) -> None:
        self._noun, self._started_s = noun, started_s
        self._told: set[str] = set()

    def look(self, ended_s: Mapping[str, float], running: Sequence[str], now_s: float) -> bool:
        """Say what there is to say. True if there will be more: call again within about a second.

        Args:
            ended_s: what has ended well, and when.
            running: what has not ended.
            now_s: time.monotonic().
        """
        new = {name: at_s for name, at_s in ended_s.items() if name not in self._told} if running else {}
        due = [name for name, at_s in new.items() if now_s - at_s >= GRACE_S]
        if due:
            self._told.update(due)
            after = duration(min(new[name] for name in due) - self._started_s)
            logger.info(
                "%s %s ended with exit code 0, %s after the start, and %s still %s",
                *(self._names(due), "have" if len(due) > 1 else "has", after),
                *(self._names(running), "run" if len(running) > 1 else "runs"),
                extra={"ranks": (-1,)},
            )
        return len(due) < len(new)

    def _names(self, names: Sequence[str]) -> str:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{self._noun}{'s' * (len(names) > 1)} {', '.join(names[:_NAMED])}{more}"
