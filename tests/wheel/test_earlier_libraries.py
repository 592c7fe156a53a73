"""Compiled ops of before the package's rooms were rebuilt (commit 8fd37eb): today's code finds and takes them.

`libraries_of_0_1/` has what that code wrote: the record of a wheel's libraries, and the name that it gave a cached
library, both of the two small sources there, of which the library itself is compiled here. A change of the form of
either would leave installed wheels and caches unused without a word: so these tests prove that the record is still
read and believed, that the name is still the one that is looked for, and that what is found can be loaded and called.
They do not prove that a library of then works with today's torch: it calls nothing of torch's. (A cached one of then
has no checksum and is compiled once more. Other flags are another name, rightly: then record the name anew.)
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import program

from deepspeedlite.ops.op_builder import jit, prebuilt
from deepspeedlite.ops.op_builder.spec import OpSpec
from deepspeedlite.ops.op_builder.toolchain import Toolchain
from deepspeedlite.ops.op_builder.torch_build import TorchBuild

EARLIER = Path(__file__).parent / "libraries_of_0_1"
SPEC = OpSpec("earlier", "EarlierBuilder", "DS_BUILD_EARLIER", bindings=("earlier.cpp",), plain=("earlier.cpp",))
TORCH = TorchBuild(Path("/somewhere/torch"), "2.13.0+cpu", None, None)


@pytest.fixture(scope="module")
def library_of_then(tmp_path_factory) -> Path:
    """What the sources make."""
    library = tmp_path_factory.mktemp("earlier") / "earlier.so"
    subprocess.run([program("c++"), "-shared", "-fPIC", "-o", library, EARLIER / "csrc" / "earlier.cpp"], check=True)
    return library


def answer(library: Path) -> int:
    """What the library's one function gives; C++ has named it."""
    return int(ctypes.CDLL(str(library))._Z7earlierv())


@pytest.fixture(autouse=True)
def its_world(tmp_path, monkeypatch):
    """The sources, torch, Python and compiler of then, and no library yet."""
    monkeypatch.setattr(jit, "find_torch", lambda: TORCH)
    monkeypatch.setattr(jit, "csrc", lambda: EARLIER / "csrc")
    monkeypatch.setattr(prebuilt, "csrc", lambda: EARLIER / "csrc")
    monkeypatch.setattr(prebuilt, "lib", lambda: tmp_path / "lib")
    monkeypatch.setattr(Toolchain, "find", classmethod(lambda cls, spec: cls(Path("/usr/bin/c++"), TORCH)))
    monkeypatch.setattr(Toolchain, "identity", lambda self: "2.13.0+cpu /usr/bin/x86_64-linux-gnu-g++-12 1 2 ")
    monkeypatch.setattr(jit, "sys", SimpleNamespace(implementation=SimpleNamespace(cache_tag="cpython-311")))
    monkeypatch.setattr(jit, "platform", SimpleNamespace(machine=lambda: "x86_64"))
    monkeypatch.setattr(jit, "build", lambda *arguments: pytest.fail("it is compiled anew"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def test_a_library_that_was_cached_is_found_and_compiled_once_more_for_its_checksum(
    tmp_path, monkeypatch, library_of_then
):
    library = tmp_path / "cache" / "deepspeedlite" / (EARLIER / "cached").read_text().strip()
    library.parent.mkdir(parents=True)
    shutil.copy(library_of_then, library)
    made = []

    def build(wanted, *_) -> None:
        made.append(shutil.copy(library_of_then, wanted[0].library))

    monkeypatch.setattr(jit, "build", build)
    assert jit.compiled(SPEC) is None
    assert jit.built(SPEC) == jit.built(SPEC) == jit.compiled(SPEC) == library
    assert len(made) == 1 and answer(library) == 1
    monkeypatch.setattr(jit, "build", lambda *arguments: pytest.fail("it is compiled anew"))
    assert jit.built(SPEC) == library


def test_a_wheels_library_is_taken(tmp_path, library_of_then):
    shutil.copytree(EARLIER, tmp_path / "lib", ignore=shutil.ignore_patterns("csrc", "cached"))
    shutil.copy(library_of_then, tmp_path / "lib" / "earlier.so")
    assert jit.built(SPEC) == jit.compiled(SPEC) == tmp_path / "lib" / "earlier.so"
    assert answer(jit.built(SPEC)) == 1
    record = prebuilt.read_record()
    assert record is not None and (record.accelerator, record.torch, record.archs) == ("cpu", "2.13.0+cpu", ())
    assert record._asdict() == {**json.loads((EARLIER / "record.json").read_text()), "archs": ()}


def test_one_of_other_sources_is_not(tmp_path, monkeypatch, library_of_then):
    shutil.copytree(EARLIER / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / "earlier.h").write_text("#define EARLIER 2\n")
    monkeypatch.setattr(jit, "csrc", lambda: tmp_path / "csrc")
    monkeypatch.setattr(prebuilt, "csrc", lambda: tmp_path / "csrc")
    shutil.copytree(EARLIER, tmp_path / "lib", ignore=shutil.ignore_patterns("csrc", "cached"))
    shutil.copy(library_of_then, tmp_path / "lib" / "earlier.so")
    assert jit.compiled(SPEC) is None
