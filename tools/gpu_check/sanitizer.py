"""A small case of each kernel under compute-sanitizer: reads and writes outside of what was given, and races."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tools.gpu_check.kernels import FILES
from tools.gpu_check.setting import ROOT, NotHereError, Rows, Setting

FAULTS_FOUND = 9
# A case of each file that is quick, by pytest's -k.
SMALL = (
    "cuda and (16_bit_parameters or nan_spoils or rotary or (attention_and_its_gradients and 16-20) or what_torch_does)"
)


def rows(setting: Setting) -> Rows:
    """One for each of its tools, where it is."""
    files = [f"tests/parity/{name}" for name in FILES[:5]]
    for tool in ("memcheck", "racecheck"):
        yield setting.tried(tool, lambda tool=tool: clean(setting, tool, ["-m", "gpu", "-k", SMALL, *files]))  # type: ignore[misc]


def clean(setting: Setting, tool: str, tests: Sequence[str]) -> dict[str, Any]:
    """Run these tests under it; RuntimeError with its last words where it found something."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotHereError("compute-sanitizer is not on PATH (it is part of the CUDA toolkit)")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [program, "--tool", tool, "--error-exitcode", str(FAULTS_FOUND), "--kernel-name-exclude", "kns=at::"]
    limit_s = max(5.0, setting.seconds_left / 2)
    try:
        done = subprocess.run(
            [*command, *pytest, *tests], cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotHereError(f"not done in {limit_s:.0f} s") from None
    last = done.stdout.strip().splitlines()[-12:]
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: " + " / ".join(last))
    return {"tests": last[-1] if last else ""}
