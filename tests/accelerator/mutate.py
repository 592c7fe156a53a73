"""Deletes each wait for streams and collectives of the library, one at a time, and says which case shows it.

    python mutate.py [--only WORD]

In a copy of the package each statement that calls `wait_stream`, `record_stream`, `synchronize`, or `wait` of a
collective's work becomes `pass`; then cases of train_on_threads.py run on that copy until one differs between seeds,
fails, or does not end. Prints one JSON line per mutant: its place, what it was, and the case that caught it, or null.
Waits for the disk and between threads of the host are not of streams, and not taken.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import threads_device

import deepspeedlite

HERE = Path(__file__).parent
PACKAGE = Path(deepspeedlite.__file__).parent
ROOMS = (
    "zero",
    "optim",
    "activation_checkpointing",
    "checkpoint/save.py",
    "comm/group.py",
    "parallel/pipe",
)
CALLS = {"wait_stream", "record_stream", "synchronize"}
WORKS = {"work", "labelled", "self._work", "self._reduction"}  # what collectives under way are called
LIMIT_S = 240
# By room, what uses it; others: all of these.
CASES = {
    "activation_checkpointing": ["stage 1, inputs on the host", "stage 3, inputs on the host"],
    "checkpoint": ["stage 2, saved meanwhile", "stage 3, saved and loaded"],
    "parallel": ["pipeline, accumulated", "pipeline, stage 1, bf16"],
    "": [
        "stage 3, ahead of use",
        "stage 2, gradients leave",
        "stage 2, gradients leave, accumulated",
        "stage 2, fp16, accumulated",
        "stage 1, bf16, clipped",
        "stage 3, all on the CPU",
        "stage 2, in the user's stream",
    ],
}


class Mutant(NamedTuple):
    file: Path  # in the package
    first: int  # lines from 1
    last: int
    indent: int
    what: str


def mutants() -> Iterator[Mutant]:
    for room in ROOMS:
        where = PACKAGE / room
        for path in sorted(where.rglob("*.py")) if where.is_dir() else [where]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Expr) and _is_wait(node.value):
                    last = node.end_lineno or node.lineno
                    yield Mutant(path.relative_to(PACKAGE), node.lineno, last, node.col_offset, ast.unparse(node))


def _is_wait(call: ast.expr) -> bool:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    return call.func.attr in CALLS or (call.func.attr == "wait" and ast.unparse(call.func.value) in WORKS)


def caught_by(mutant: Mutant, folder: Path) -> str | None:
    """The first case that is not what it should be."""
    path = folder / "deepspeedlite" / mutant.file
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[: mutant.first - 1], " " * mutant.indent + "pass\n", *lines[mutant.last :]]))
    try:
        for case in CASES.get(mutant.file.parts[0], CASES[""]):
            if not is_right(case, folder):
                return case
        return None
    finally:
        path.write_text(whole)


def is_right(case: str, folder: Path) -> bool:
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "train_on_threads.py"), "--seeds", "4", case]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return bool(rows) and all(
        isinstance(found, list) and all(late[key] == found[0][key] for late in found for key in ("losses", "norm"))
        for found in rows[0]["ranks"]
    )


def main(arguments: list[str]) -> None:
    only = arguments[1] if arguments[:1] == ["--only"] else ""
    threads_device.use()  # compiled before any case, whose time is limited
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(PACKAGE, folder / "deepspeedlite", ignore=shutil.ignore_patterns("__pycache__"))
        for cases in CASES.values():  # what differs without any mutant would say nothing
            for case in cases:
                assert is_right(case, folder) or only, f"{case} is wrong as it is"
        for mutant in mutants():
            place = f"{mutant.file}:{mutant.first}"
            if only in place:
                print(json.dumps({"at": place, "deleted": mutant.what, "by": caught_by(mutant, folder)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
