"""Logging: one line per event, from rank 0 unless a call names other ranks.

`DSL_LOG_LEVEL` (debug, info, warning, error; default info) sets the level; any other word is a `ConfigError`. Warnings
and errors of every rank are shown, since a rank that is alone with a problem is the one to hear from; info and debug
come from rank 0. The rank is read from the environment when a line is written, so logging works before and after
`init_distributed` and needs no torch.
"""

from __future__ import annotations

import logging
import os
import sys

from deepspeedlite.runtime.errors import ConfigError

LEVEL_VARIABLE, _LEVELS_THERE_ARE = "DSL_LOG_LEVEL", "use debug, info, warning or error, or unset it"


def current_rank() -> int:
    """This process's global rank as its launcher set it; 0 when started alone."""
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0


class _RankFilter(logging.Filter):
    """Drops info and debug of ranks other than 0, except records that were addressed to this rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = current_rank()
        ranks = getattr(record, "ranks", None)
        if ranks is not None:
            return rank in ranks or -1 in ranks
        return rank == 0 or record.levelno >= logging.WARNING


class _OneLineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rank = current_rank()
        where = "" if rank == 0 else f" rank {rank}"
        clock = self.formatTime(record, "%H:%M:%S")
        text = f"[{clock} deepspeedlite{where}] {'' if record.levelno <= logging.INFO else record.levelname + ': '}"
        text += record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is now, so that redirection and test capture work."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _make_logger() -> logging.Logger:
    made = logging.getLogger("deepspeedlite")
    if not made.handlers:
        level = logging.getLevelName(os.environ.get(LEVEL_VARIABLE, "").strip().upper() or "INFO")
        if not isinstance(level, int):
            raise ConfigError(f"{LEVEL_VARIABLE}={os.environ[LEVEL_VARIABLE]} is no level; {_LEVELS_THERE_ARE}")
        handler = _CurrentStderr()
        handler.setFormatter(_OneLineFormatter())
        handler.addFilter(_RankFilter())
        made.addHandler(handler)
        made.propagate = False
        made.setLevel(level)
    return made


logger = _make_logger()


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Write one line from the given ranks (-1: all of them; None: rank 0)."""
    logger.log(level, message, extra={"ranks": tuple(ranks) if ranks else (0,)})


_said: set[str] = set()


def log_once(message: str, level: int = logging.INFO) -> None:
    """Write a line the first time it is met in this process, and never again."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def log_dist_once(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """`log_dist` the first time a message is met in this process."""
    if message not in _said:
        _said.add(message)
        log_dist(message, ranks, level)
