"""Writes `deepspeedlite/comm/__init__.pyi`: what `deepspeedlite.comm` has, for type checkers and editors.

    python tools/comm_stub.py && make format

The collectives that scripts call are in `deepspeedlite/compat/comm.py`, and get there when they are first asked for, so
that the core need not know them; nothing that reads the files alone would find them. A test compares the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from deepspeedlite.compat.drop_in.table import modules

PACKAGE = Path(__file__).resolve().parents[1] / "deepspeedlite"
STUB = PACKAGE / "comm" / "__init__.pyi"
_HEAD = '''"""What `deepspeedlite.comm` has. Written by tools/comm_stub.py."""

from torch.distributed import ProcessGroup as ProcessGroup
from torch.distributed import ReduceOp as ReduceOp
'''


def stub() -> str:
    """The file's text."""
    own = ast.parse((PACKAGE / "comm" / "__init__.py").read_text())
    served = ast.parse((PACKAGE / "compat" / "comm.py").read_text())
    names = {"metrics.comms_logger": ["CommsLogger", "comms_logger"], "compat.comm": []}
    for node in own.body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names[str(node.module).partition(".")[2]] = [alias.name for alias in node.names]
    for name, entry in modules()["comm"].items():  # from other files
        if entry.home not in ("", "comm", "compat.comm", "metrics.comms_logger"):
            names.setdefault(entry.home, []).append(name)
    for node in served.body:
        names["compat.comm"] += [name for name in _defined(node) if not name.startswith("_")]
    imports = [f"from deepspeedlite.{home} import {name} as {name}" for home in names for name in sorted(names[home])]
    return "\n".join([_HEAD, *sorted(imports)]) + "\n"


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


if __name__ == "__main__":
    STUB.write_text(stub())
