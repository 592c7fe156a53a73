"""Tests on machines that lack programs: collected all the same, and skipped by the name of what they need."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import forked
import pytest
from cluster import PROGRAMS, SLURM
from paths import ROOT, TESTS
from programs import ALIASES, PACKAGES, missing, needs

FILES = sorted(path for path in TESTS.rglob("test_*.py") if path.name != "test_programs.py")
COLLECT = """
import json, os, pathlib, sys
import programs, pytest
root, out = sys.argv[1:]
os.chdir(root)
asked = set()
programs.find = lambda name: asked.add(name)  # there is no program at all

class Collected:
    def pytest_collection_finish(self, session):
        at_collection = sorted(asked)
        skipped = {}
        for name in programs.PACKAGES:  # each is the missing one
            programs.find = lambda other: None if other == name else "/there"
            reasons = {item.nodeid: programs.reason_to_skip(item) for item in session.items}
            skipped[name] = {node: reason for node, reason in reasons.items() if reason}
        found = {"asked": at_collection, "skipped": skipped, "all": len(session.items)}
        pathlib.Path(out).write_text(json.dumps(found))

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "tests"], plugins=[Collected()]))
"""


@pytest.mark.slow
def test_without_each_program_the_tests_that_need_it_skip_by_its_name(tmp_path: Path) -> None:
    """Collected once, in a process of its own and without any program; then each in turn is the missing one."""
    done = forked.run(COLLECT, ROOT, tmp_path / "collected", folder=tmp_path, timeout_s=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "collected").read_text())
    assert found["asked"] == [] and found["all"] > 3000, "collecting asks for no program"
    skipped: dict[str, set[str]] = {}
    for name, reasons in found["skipped"].items():
        named = f"needs {name} (Debian's package {PACKAGES[name]})"
        skipped[name] = {node for node, reason in reasons.items() if reason == named}
    on_hosts = skipped["ip"]
    assert len(on_hosts) > 50 and all(skipped[name] >= on_hosts for name in PROGRAMS)
    for name, part in (("pdsh", "pdsh"), ("mpirun.openmpi", "openmpi"), ("mpirun.mpich", "mpich"), ("srun", "slurm")):
        assert skipped[name] & on_hosts < on_hosts, "not all, and some:"
        assert any(node.endswith(f"{part}]") for node in skipped[name] & on_hosts)
        assert skipped[name] >= {node for node in on_hosts if node.endswith((f"[{part}]", f"-{part}]"))}
    assert skipped["slurmctld"] == skipped["srun"] and all("tests/cluster/" in node for node in skipped["slurmctld"])


def started_by(tree: ast.AST) -> set[str]:
    """Programs that a file starts: what its lists and tuples of words begin with."""
    lists = [node.elts for node in ast.walk(tree) if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1]
    firsts = {words[0].value for words in lists if isinstance(words[0], ast.Constant)}
    known = {alias: name for name in PACKAGES for alias in ALIASES.get(name, (name,))}
    return {known[first] for first in firsts if first in known}


def asked_for_by(tree: ast.Module) -> set[str]:
    """Programs that a file asks for: in calls, in a table PROGRAMS of its own, or with a cluster."""
    names: set[str] = set()
    for node in ast.walk(tree):
        function = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        is_table = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROGRAMS"
        if is_table or function in ("needs", "needs_cluster", "program", "find", "missing", "started"):
            words = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            names |= {word.split()[0] for word in words if isinstance(word, str) and word}
        if function == "needs_cluster":
            names |= set(PROGRAMS)
        if isinstance(node, ast.Name) and node.id == "SLURM":
            names |= set(SLURM)
    return names


# What is asked for by a name that is put together, or is only a word there.
ELSEWHERE = {
    "test_gpu_kernels.py": {"clang++-19", "hipcc"},  # a table's, by its first word
    "test_cluster_bed.py": {"pdsh", "mpirun.openmpi", "mpirun.mpich", "mpiexec.hydra", "srun", "setpriv"},
    "test_launcher.py": {"pdsh"},  # a stand-in's name
    "test_images.py": {"docker", "pdsh"},  # by needs_engine; inside containers
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_file_starts_it_asks_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert started_by(tree) - asked_for_by(tree) <= ELSEWHERE.get(path.name, set())
    assert "which(" not in path.read_text(), "helpers/programs.py asks, so that all reasons to skip are alike"


def test_a_reason_names_the_program_and_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("programs.search_path", lambda: str(tmp_path))
    assert missing("sshd", "ssh") == "needs sshd (Debian's package openssh-server)"
    (tmp_path / "clang++").touch(mode=0o755)
    assert missing("c++") is None
    with pytest.raises(AssertionError, match="no-such-program"):
        needs("no-such-program")
