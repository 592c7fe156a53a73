"""The torch that ops are compiled against, read from its files. (Importing it takes seconds.)"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.ops.op_builder.errors import OpBuildError

ACCELERATORS = ("cpu", "cuda", "rocm")


class TorchBuild(NamedTuple):
    """Where torch is and what it was built for; versions such as "13.0", None where it was not."""

    home: Path
    version: str
    cuda: str | None
    hip: str | None

    @property
    def accelerator(self) -> str:
        """What ops are compiled for: `$DS_ACCELERATOR` where it is one of ours, else torch's own.

        (That variable lets a wheel for GPUs be built against a CPU torch.)
        """
        named = os.environ.get("DS_ACCELERATOR", "").strip().lower()
        if named == "cuda" and self.hip:  # which DeepSpeed's users write for AMD's GPUs too
            return "rocm"
        if named in ACCELERATORS:
            return named
        return "cuda" if self.cuda else "rocm" if self.hip else "cpu"


def find_torch() -> TorchBuild:
    """This Python's torch. pip's isolated builds hide it, so site-packages are searched too.

    Raises:
        OpBuildError: there is none.
    """
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    found = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for home in [*found, *(Path(folder) / "torch" for folder in folders)]:
        if os.path.isfile(home / "version.py"):  # False, too, where a home may not be entered
            return _read(home)
    raise OpBuildError(
        f"torch is not installed for {sys.executable}",
        "install it first, and where the build is isolated from it (uv, build) pass --no-build-isolation",
    )


@cache
def _read(home: Path) -> TorchBuild:
    text = (home / "version.py").read_text()

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=]*= *'([^']*)'", text, re.MULTILINE)
        return match[1] if match else None

    return TorchBuild(home, value("__version__") or "unknown", value("cuda"), value("hip"))
