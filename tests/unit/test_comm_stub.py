"""`deepspeedlite.comm` for those who read it without running it: type checkers and editors."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
from paths import ROOT

from deepspeedlite import comm
from deepspeedlite.compat.drop_in.table import modules


def tool() -> ModuleType:
    """tools/comm_stub.py, which writes the stub."""
    spec = importlib.util.spec_from_file_location("comm_stub", ROOT / "tools" / "comm_stub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stub_has_every_name_that_is_served_and_no_other():
    text = tool().STUB.read_text()
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(tool().stub())), "run: python tools/comm_stub.py"
    told = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    told |= {
        alias.asname
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    served = {name for name, entry in modules()["comm"].items() if entry.home}
    assert told == served | set(comm.__all__)
    assert all(hasattr(comm, name) for name in told)


SCRIPT = """
import torch
from deepspeedlite import comm

comm.init_distributed("gloo")
comm.all_reduce(torch.ones(3), op=comm.ReduceOp.SUM, prof=True)
ranks: int = comm.get_world_size()
"""


# Most of torch, and none of what the script and the stub name: half a minute less.
NOT_READ = [f"torch.{part}.*" for part in ("_dynamo", "_inductor", "_export", "_functorch", "_higher_order_ops")]
NOT_READ += [f"torch.{part}.*" for part in ("_subclasses", "ao", "cuda", "distributions", "export", "fx", "nn", "onnx")]
NOT_READ += ["torch.optim.*", "torch.testing.*", "torch.utils.*", "sympy.*", "numpy.*"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mypy_reads_a_users_script(tmp_path):
    """Strictly; and it finds a wrong argument, a name that is not there, and a keyword that there is not."""
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(SCRIPT)
    bad.write_text(
        "from deepspeedlite import comm\n\ncomm.all_reduce(3)\ncomm.all_reduced\ncomm.barrier(profile=True)\n"
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{','.join(NOT_READ)}]\nfollow_imports = skip\n")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(good), str(bad)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    wrong = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert len(wrong) == 3 and all(line.startswith("bad.py:") for line in wrong), ran.stdout + ran.stderr
    assert "[arg-type]" in wrong[0] and "[attr-defined]" in wrong[1] and "[call-arg]" in wrong[2], ran.stdout
