"""The sections of the configuration, one file per family.

These files do without `from __future__ import annotations`: pydantic would compile each of the 300 annotations again
from its text, a third of the package's import time.
"""
