"""Where things are, and what tests and their child processes import from."""

from __future__ import annotations

import sys
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
IMPORTED = [str(ROOT), str(HELPERS), *sorted({str(file.parent) for file in TESTS.glob("*/test_*.py")})]
BOOT = f"import sys; sys.path[:0] = {IMPORTED}; "  # how the code of a child starts, so that it imports as tests do


def put_on_path() -> None:
    """Let every test import the package, the helpers and other tests, whichever folder pytest was given.

    tests/ itself, where pytest finds conftest.py, leaves the path: its folders have names that packages have too.
    """
    sys.path[:] = [*IMPORTED, *(path for path in sys.path if path not in {*IMPORTED, str(TESTS)})]
