"""The name `deepspeed` for scripts and libraries that were written for DeepSpeed, where somebody asks for it.

    deepspeedlite --as_deepspeed train.py ...                       one training
    PYTHONPATH=$(python -m deepspeedlite.drop_in path) python ...   one shell, and all it starts
    python -m deepspeedlite.drop_in install                         this environment, until `uninstall`

`stand_in/` is the folder that carries the name: a package of one file and the metadata that libraries look for.
`modules.py` is the table of DeepSpeed's module paths and names, `release.py` what else DeepSpeed has, `absent.py` what
stands for names that are not here, `finder.py` serves imports from all three, `install.py` writes and removes what
`install` leaves in an environment, `docs.py` turns the table into docs/compatibility.md.

Nothing here imports torch, nor anything of the package but what the table names when somebody asks for it.
"""

from __future__ import annotations

STANDS_IN_FOR = "0.19.8"
"""The release of DeepSpeed whose names the table lists."""
VERSION = f"{STANDS_IN_FOR}+lite"
"""What `importlib.metadata.version("deepspeed")` says."""
HOME, NAME = "deepspeedlite", "deepspeed"
"""Our name, and the one that is served."""
