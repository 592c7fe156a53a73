"""`--as_deepspeed`: the environment in which Python finds this library under DeepSpeed's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def folder() -> Path:
    """The folder to put on PYTHONPATH."""
    return Path(__file__).resolve().parents[1] / "drop_in" / "stand_in"  # where environments made long ago look for it


def with_stand_in(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Pythons find the stand-in before any other `deepspeed`."""
    there = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(folder())]
    return {**environ, "PYTHONPATH": os.pathsep.join([str(folder()), *there])}
