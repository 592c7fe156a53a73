"""What only a Python with torch can say, asked of one in a child: whether torch imports, and whether the ops load.

Torch is never imported into the report's own process, so a broken installation is a row and not a traceback. The child
sees no GPU, so none is initialised. It starts first and the report goes on meanwhile: importing torch takes longest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

_IMPORT_TIMEOUT_S = 50.0  # less than a node may take, so that a node with a torch that hangs still reports
_MARK = "dslite: "
# Reads constants of the build only. Of the ops those are loaded that are compiled: argv names the files. Each is named
# before it is loaded: one that kills the child is known by that, and is not taken for a broken torch.
_SCRIPT = (
    f"MARK = {_MARK!r}"
    + """
import json, sys, torch, torch.distributed as d
built = d.is_available()
nccl = getattr(torch._C, "_nccl_version", None) if built and d.is_nccl_available() else None
arches = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
def say(facts):
    print("\\n" + MARK + json.dumps(facts), flush=True)
say({"distributed": built, "gloo": built and d.is_gloo_available(), "arches": arches or "",
     "nccl": nccl() if nccl else None})
for path in sys.argv[1:]:
    say({"library": path, "failure": "the process dies of it"})
    try:
        torch.ops.load_library(path)
        say({"library": path, "failure": ""})
    except Exception as error:
        while error.__cause__ or error.__context__:  # torch's own words name the file alone
            error = error.__cause__ or error.__context__
        say({"library": path, "failure": (str(error).splitlines() or [type(error).__name__])[0]})
"""
)


class Probe:
    """The child, started now; `facts` waits for it."""

    def __init__(self, libraries: list[Path]) -> None:
        # Without a visible GPU it cannot touch one, whatever torch does on import.
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        self._started_s = time.monotonic()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *map(str, libraries)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._out: tuple[str, str] | None = None

    @property
    def import_timeout_s(self) -> float:
        """How long the child may take."""
        return _IMPORT_TIMEOUT_S

    def end(self) -> None:
        """Wait for the child, or kill it when it takes too long; before anyone asks for facts."""
        left_s = max(0.0, self._started_s + _IMPORT_TIMEOUT_S - time.monotonic())
        try:
            self._out = self._child.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()

    def facts(self) -> dict[str, Any] | str | None:
        """What it printed; its last words where torch does not import; None where it took too long."""
        if self._out is None:
            return None
        printed, words = self._out
        said = [json.loads(line[len(_MARK) :]) for line in printed.splitlines() if line.startswith(_MARK)]
        if not said:
            return (words.strip().splitlines() or [f"exit status {self._child.returncode}"])[-1]
        return {**said[0], "loads": {fact["library"]: fact["failure"] for fact in said[1:]}}


def op_builder() -> ModuleType:
    """The table of ops, which reading a report's other sections need not wait for."""
    from deepspeedlite.ops import op_builder as table

    return table


def compiled_libraries() -> dict[str, Path]:
    """The library of each op that is compiled for this Python already, in the wheel or in the cache."""
    builder = op_builder()
    found = {spec.name: builder.compiled(spec) for spec in builder.OPS.values()}
    return {name: path for name, path in found.items() if path is not None}
