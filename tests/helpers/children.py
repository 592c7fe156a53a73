"""What child processes of tests need."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """In a child before it starts: what nohup, or a background job of CI, made this process ignore is heard again."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
