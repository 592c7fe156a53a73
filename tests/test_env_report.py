"""The environment report: what it says of this machine, and that broken things are rows with a remedy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeedlite import env_report
from deepspeedlite.env_report import BAD, INFO, OK, WARN, Row

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "deepspeedlite.env_report", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**kept, **env},
    )


def find(rows: list[Row], name: str) -> Row:
    (row,) = [row for row in rows if row.name == name]
    return row


@pytest.fixture
def fake_torch(tmp_path: Path) -> Path:
    """A directory with a torch that imports at once; its version.py is the test's to change."""
    package = tmp_path / "fake/torch"
    (package / "distributed").mkdir(parents=True)
    (package / "__init__.py").write_text("class _C: pass\n_C._nccl_version = lambda: (2, 27, 5)\n")
    (package / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: str | None = '13.0'\nhip = None\n")
    answers = ("is_available", "is_nccl_available", "is_gloo_available")
    (package / "distributed/__init__.py").write_text("".join(f"def {name}(): return True\n" for name in answers))
    return package


def report(fake_torch: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[Row]]:
    path = f"{fake_torch.parent}:{os.environ.get('PYTHONPATH', '')}"
    done = run("--json", PYTHONPATH=path, **env)
    return done, [Row(**row) for row in json.loads(done.stdout)["rows"]]


def test_this_machine_in_text_and_json() -> None:
    pytest.importorskip("torch")
    done = run("--json")
    rows = [Row(**row) for row in json.loads(done.stdout)["rows"]]
    assert done.returncode == 0 and done.stderr == "", done.stdout
    sections = list(dict.fromkeys(row.section for row in rows))
    assert sections == ["software", "torch", "gpus", "machine", "compilers", "variables"]
    assert find(rows, "import torch").value == "works"
    installed = env_report.installed_version("torch")
    assert installed and find(rows, "torch").value.startswith(installed)
    assert find(rows, "python").value.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert f"of {os.cpu_count()}" in find(rows, "cores").value
    for row in rows:
        assert row.status in (INFO, OK, WARN, BAD)
        assert bool(row.remedy) == (row.status in (WARN, BAD)), row


def test_it_takes_little_beyond_torchs_import(fake_torch: Path) -> None:
    started_s = time.perf_counter()
    done, rows = report(fake_torch)
    assert time.perf_counter() - started_s < 2
    assert done.returncode == 0 and find(rows, "nccl").value == "2.27.5"
    assert find(rows, "built for").value.startswith("CUDA 13.0")


def test_torch_too_old_broken_or_missing(fake_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_torch / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\nhip = None\n")
    done, rows = report(fake_torch)
    row = find(rows, "torch")
    assert done.returncode == 1 and row.status == BAD and row.value == "2.9.1, older than 2.10"
    assert "--upgrade" in row.remedy
    (fake_torch / "__init__.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    done, rows = report(fake_torch)
    row = find(rows, "import torch")
    assert done.returncode == 1 and row.status == BAD and "libc10.so: cannot open" in row.value
    monkeypatch.setattr(env_report.importlib.util, "find_spec", lambda name: None)
    (row,) = env_report.torch_section()
    assert row.status == BAD and row.value == "not installed" and "pytorch.org" in row.remedy


def test_torch_stays_out_of_the_process(fake_torch: Path) -> None:
    code = "import sys; from deepspeedlite import env_report as e; e.collect(); assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(fake_torch.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120, env=env)


def test_variables_show_and_secrets_do_not(fake_torch: Path) -> None:
    done, rows = report(
        fake_torch,
        NCCL_DEBUG="INFO",
        DS_API_KEY="hunter2",
        CUDA_PROXY="http://me:hunter3@proxy/x",
        HUGGING_FACE_TOKEN="hunter4",
        OMP_ODD="a\x1b[31m\nb",
    )
    assert find(rows, "NCCL_DEBUG").value == "INFO"
    assert find(rows, "DS_API_KEY").value == "(hidden)"
    assert find(rows, "CUDA_PROXY").value == "http://(hidden)@proxy/x"
    assert find(rows, "OMP_ODD").value == r"a\x1b[31m\nb"
    assert "hunter" not in done.stdout


def test_contradictory_variables_are_broken(fake_torch: Path) -> None:
    done, rows = report(fake_torch, RANK="3", WORLD_SIZE="2", LOCAL_RANK="0")
    row = find(rows, "world")
    assert done.returncode == 1 and row.status == BAD and "RANK" in row.value


def test_gpus_without_a_driver_and_a_torch_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeedlite.launcher import devices

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setattr(env_report, "find_devices", lambda environ: devices.find_devices(environ, tmp_path))
    monkeypatch.setattr(env_report, "torch_files", lambda: env_report.TorchFiles("2.13.0+cpu", "/x", None, None))
    monkeypatch.setattr(env_report, "_torch_loads", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    built = find(env_report.torch_section(), "built for")
    assert built.status == WARN and "this machine has nvidia GPUs" in built.value
    rows = env_report.gpus()
    assert find(rows, "visible").value == "1 nvidia (0)" and find(rows, "nvidia-smi").status == WARN
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (row,) = env_report.gpus()
    assert row.status == BAD and "names device 1, but this machine has 1" in row.value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = env_report.gpus()
    assert "hidden by variables" in row.value


def test_a_missing_or_old_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(env_report.REQUIRED, "no-such-package", "1")
    monkeypatch.setitem(env_report.REQUIRED, "pydantic", "99")
    rows = env_report.software()
    missing, old = find(rows, "no-such-package"), find(rows, "pydantic")
    assert missing.status == BAD and 'pip install "no-such-package>=1"' in missing.remedy
    assert old.status == BAD and "older than 99" in old.value


def test_compilers_that_hang_or_do_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho 'release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(env_report, "torch_files", lambda: env_report.TorchFiles("2.13", "/x", "13.0", None))
    row = find(env_report.compilers(), "nvcc")
    assert row.status == WARN and "built for CUDA 13.0" in row.value and "CUDA_HOME" in row.remedy
    nvcc.write_text("#!/bin/sh\nexec sleep 60\n")
    started_s = time.monotonic()
    assert env_report.output_of([str(nvcc)], timeout_s=0.2) == "" and time.monotonic() - started_s < 5
    nvcc.unlink()
    row = find(env_report.compilers(), "nvcc")
    assert row.status == WARN and "no working" in row.value
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert find(env_report.compilers(), "c++").status == WARN


def test_a_section_that_fails_is_a_row() -> None:
    def strange() -> list[Row]:
        raise OSError("no such thing")

    rows = env_report.collect([strange, lambda: [Row("b", "name", "value", OK)]])
    assert [row.status for row in rows] == [WARN, OK] and "no such thing" in rows[0].value


def test_rendering_is_aligned_and_plain_unless_asked() -> None:
    rows = [Row("one", "a", "x", OK), Row("one", "longer", "y", BAD, "mend it"), Row("two", "b", "z")]
    text = env_report.render(rows, colour=False)
    assert text.splitlines() == [
        "one",
        "  ok    a       x",
        "  bad   longer  y",
        "                -> mend it",
        "",
        "two",
        "        b       z",
        "",
        "1 broken, 0 to look at: mend the lines marked bad first",
    ]
    assert re.sub(r"\x1b\[[\d;]*m", "", env_report.render(rows, colour=True)) == text
    assert env_report.verdict([rows[0]]) == "all is well"


def test_what_is_required_is_what_pyproject_says() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*)\]", text, re.MULTILINE)
    assert listed
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed[1]))
    assert declared == {**env_report.REQUIRED, "torch": env_report.MIN_TORCH}
    assert f'requires-python = ">={".".join(map(str, env_report.MIN_PYTHON))}"' in text
