"""`get_accelerator()`: see `compat/accelerator.py`. This is the path that scripts import."""

from deepspeedlite.compat.accelerator import *  # noqa: F403
