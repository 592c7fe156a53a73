"""What `make release-check` refuses. That it passes is seen by running it: it takes minutes."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
from types import ModuleType

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def release_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"deepspeedlite/ops/lib/old.so": True}, "deepspeedlite/ops/lib/old.so does not belong there"),
        ({"deepspeedlite/__pycache__/x.py": True}, "__pycache__/x.py does not belong there"),
        ({"LICENSE": False}, "LICENSE is missing"),
        ({"deepspeedlite/ops/csrc/common/isa.h": False}, "csrc/common/isa.h is missing"),
    ],
)
def test_an_sdist_with_stray_or_missing_files_is_refused(change, message, release_check, tmp_path):
    sources = [f"deepspeedlite/ops/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*")]
    names = {**dict.fromkeys([*release_check.SDIST_FILES, *sources], True), **change}
    made = tmp_path / "deepspeedlite-0.1.0.tar.gz"
    with tarfile.open(made, "w:gz") as tar:
        for name in (name for name, is_there in names.items() if is_there):
            tar.addfile(tarfile.TarInfo(f"deepspeedlite-0.1.0/{name}"), io.BytesIO())
    if message is None:
        assert "files" in release_check.contents(made)
    else:
        with pytest.raises(release_check.CheckError, match=re.escape(message)):
            release_check.contents(made)


@pytest.mark.slow
def test_a_wheel_of_this_checkout_has_nothing_stray(release_check, tmp_path):
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    command = [sys.executable, ROOT / "tools" / "make_wheel.py", "--untagged", "--out", tmp_path]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    [made] = tmp_path.glob("*.whl")
    assert "0 libraries of ops" in release_check.contents(made)


def test_a_failing_command_is_told_with_its_last_lines(release_check):
    with pytest.raises(release_check.CheckError, match=r"exit status 3\nbefore\nthe reason"):
        release_check.run(["sh", "-c", "echo before; echo the reason >&2; exit 3"])
    with pytest.raises(release_check.CheckError, match="exit status 0\nsomething else"):
        release_check.run(["sh", "-c", "echo something else"], "wanted")


def test_make_help_lists_every_target_with_a_line():
    text = (ROOT / "Makefile").read_text()
    told = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    wanted = {
        *("demo", "test", "test-fast", "test-images", "test-wheels", "test-cluster", "lint", "format", "typecheck"),
        *("bench", "wheel", "image-cpu", "image-cuda", "image-rocm", "ops", "report", "install-hosts", "release-check"),
        *("clean", "help"),
    }
    assert wanted <= told
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)).split())
    assert told <= phony
