"""`import deepspeed` arrives here where this folder's parent is on the path, and leaves with deepspeedlite.

The import system hands out what `sys.modules` holds when this file is done.
"""

from deepspeedlite.compat.drop_in.finder import stand_in

stand_in()
