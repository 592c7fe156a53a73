"""Every error that deepspeedlite raises on purpose: see `runtime/errors.py`. This is the path that scripts import."""

from deepspeedlite.runtime.errors import *  # noqa: F403
