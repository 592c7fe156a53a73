"""Scripts in processes of their own that need not import torch first: forked from what ranks are (ranks_origin.py)."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import context, origins_environment


def start(code: str, *arguments: object, stdout: Path, stderr: Path) -> Any:
    """`python -c CODE ARGUMENTS...`, in a moment: a multiprocessing Process. What it writes goes into the files."""
    process = context().Process(target=_run, args=(code, [*map(str, arguments)], str(stdout), str(stderr), os.getcwd()))
    with origins_environment():
        process.start()
    return process


def run(code: str, *arguments: object, folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with its output captured; `folder` is for that."""
    files = folder / f"stdout{os.getpid()}", folder / f"stderr{os.getpid()}"
    process = start(code, *arguments, stdout=files[0], stderr=files[1])
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(code, timeout_s, files[0].read_text(), files[1].read_text())
    said = [file.read_text() for file in files]
    return subprocess.CompletedProcess([*map(str, arguments)], process.exitcode, *said)


def _run(code: str, arguments: list[str], stdout: str, stderr: str, folder: str) -> None:
    os.chdir(folder)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not how it was started
    for number, name in ((1, stdout), (2, stderr)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
