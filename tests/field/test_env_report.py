"""The environment report: what it says of this machine, and that broken things are rows with a remedy."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from programs import needs, program

from deepspeedlite.env_report import (
    BAD,
    INFO,
    OK,
    SECTIONS,
    WARN,
    Row,
    machine,
    nodes,
    packages,
    render,
    rows,
    tools,
    verdict,
)
from deepspeedlite.env_report import report as reporting
from deepspeedlite.env_report.probe import Probe
from deepspeedlite.env_report.rows import TorchFiles
from deepspeedlite.ops.op_builder.library_file import write_sum


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "deepspeedlite.env_report", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
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
    found = [Row(**row) for row in json.loads(done.stdout)["rows"]]
    assert done.returncode == 0 and done.stderr == "", done.stdout
    sections = list(dict.fromkeys(row.section for row in found))
    assert sections == list(SECTIONS)
    assert find(found, "import torch").value == "works"
    installed = rows.installed_version("torch")
    assert installed and find(found, "torch").value.startswith(installed)
    assert find(found, "python").value.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert f"of {os.cpu_count()}" in find(found, "cores").value
    assert not [row for row in found if row.name == "this section"], "no section fails"
    for row in found:
        assert row.status in (INFO, OK, WARN, BAD)
        assert bool(row.remedy) == (row.status in (WARN, BAD)), row


def test_it_takes_little_beyond_torchs_import(fake_torch: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done, found = report(fake_torch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # (Of a processor: how long it takes depends on what else runs.)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0 and find(found, "nccl").value == "2.27.5"
    assert find(found, "built for").value.startswith("CUDA 13.0")


def test_torch_too_old_broken_or_missing(fake_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_torch / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\nhip = None\n")
    done, found = report(fake_torch)
    row = find(found, "torch")
    assert done.returncode == 1 and row.status == BAD and row.value == "2.9.1, older than 2.10"
    assert "--upgrade" in row.remedy
    (fake_torch / "__init__.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    done, found = report(fake_torch)
    row = find(found, "import torch")
    assert done.returncode == 1 and row.status == BAD and "libc10.so: cannot open" in row.value
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    (row,) = packages.torch_section(Probe([]))
    assert row.status == BAD and row.value == "not installed" and "pytorch.org" in row.remedy


def test_torch_stays_out_of_the_process(fake_torch: Path) -> None:
    code = "import sys; from deepspeedlite import env_report as e; e.collect(); assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(fake_torch.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120, env=env)


def test_variables_show_and_secrets_do_not(fake_torch: Path) -> None:
    done, found = report(
        fake_torch,
        NCCL_DEBUG="INFO",
        DS_API_KEY="hunter2",
        CUDA_PROXY="http://me:hunter3@proxy/x",
        HUGGING_FACE_TOKEN="hunter4",
        OMP_ODD="a\x1b[31m\nb",
    )
    assert find(found, "NCCL_DEBUG").value == "INFO"
    assert find(found, "DS_API_KEY").value == "(hidden)"
    assert find(found, "CUDA_PROXY").value == "http://(hidden)@proxy/x"
    assert find(found, "OMP_ODD").value == r"a\x1b[31m\nb"
    assert "hunter" not in done.stdout


def test_contradictory_variables_are_broken(fake_torch: Path) -> None:
    done, found = report(fake_torch, RANK="3", WORLD_SIZE="2", LOCAL_RANK="0")
    row = find(found, "world")
    assert done.returncode == 1 and row.status == BAD and "RANK" in row.value


def test_gpus_without_a_driver_and_a_torch_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeedlite.host import gpus as devices

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setattr(machine, "find_devices", lambda environ: devices.find_devices(environ, tmp_path))
    monkeypatch.setattr(packages, "torch_files", lambda: TorchFiles("2.13.0+cpu", "/x", None, None))
    monkeypatch.setattr(packages, "_torch_loads", lambda probe: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    built = find(packages.torch_section(None), "built for")
    assert built.status == WARN and "this machine has nvidia GPUs" in built.value
    found = machine.gpus()
    assert find(found, "visible").value == "1 nvidia (0)" and find(found, "nvidia-smi").status == WARN
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (row,) = machine.gpus()
    assert row.status == BAD and "names device 1, but this machine has 1" in row.value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = machine.gpus()
    assert "hidden by variables" in row.value


def test_a_missing_or_old_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.REQUIRED, "no-such-package", "1")
    monkeypatch.setitem(packages.REQUIRED, "pydantic", "99")
    found = packages.software()
    missing, old = find(found, "no-such-package"), find(found, "pydantic")
    assert missing.status == BAD and 'pip install "no-such-package>=1"' in missing.remedy
    assert old.status == BAD and "older than 99" in old.value


def test_compilers_that_hang_or_do_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho 'release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(tools, "torch_files", lambda: TorchFiles("2.13", "/x", "13.0", None))
    row = find(tools.compilers(), "nvcc")
    assert row.status == WARN and "built for CUDA 13.0" in row.value and "CUDA_HOME" in row.remedy
    nvcc.write_text("#!/bin/sh\nexec sleep 60\n")
    started_s = time.monotonic()
    assert rows.output_of([str(nvcc)], timeout_s=0.2) == "" and time.monotonic() - started_s < 5
    nvcc.unlink()
    row = find(tools.compilers(), "nvcc")
    assert row.status == WARN and "no working" in row.value
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert find(tools.compilers(), "c++").status == WARN


def test_a_section_that_fails_is_a_row() -> None:
    def strange() -> list[Row]:
        raise OSError("no such thing")

    found = reporting.run({"strange": strange, "b": lambda: [Row("b", "name", "value", OK)]})
    assert [row.status for row in found] == [WARN, OK] and "no such thing" in found[0].value


def test_rendering_is_aligned_and_plain_unless_asked() -> None:
    some = [Row("one", "a", "x", OK), Row("one", "longer", "y", BAD, "mend it"), Row("two", "b", "z")]
    text = render(some, colour=False)
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
    assert re.sub(r"\x1b\[[\d;]*m", "", render(some, colour=True)) == text
    assert verdict([some[0]]) == "all is well"


def test_what_is_required_is_what_pyproject_says() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed and "zlib-ng" in packages.OPTIONAL, "what has a condition is done without where it does not hold"
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed[1]))
    assert declared == {**packages.REQUIRED, "torch": packages.MIN_TORCH}
    assert f'requires-python = ">={".".join(map(str, packages.MIN_PYTHON))}"' in text


# --- what is asked for on the command line ----------------------------------------------------------------------------


def rows_of(done: subprocess.CompletedProcess[str]) -> list[Row]:
    return [Row(**row) for row in json.loads(done.stdout)["rows"]]


def test_only_some_sections_and_unknown_ones_are_refused() -> None:
    done = run("--json", "--only", "machine", "--only", "disk")
    assert {row.section for row in rows_of(done)} == {"machine", "disk"}
    done = run("--only", "compiler")
    assert done.returncode == 2 and "did you mean compilers?" in done.stderr


def test_a_path_that_is_not_there_is_broken_and_one_that_is_tells_its_disk(tmp_path: Path) -> None:
    done = run("--only", "disk", "--path", str(tmp_path / "none"))
    assert done.returncode == 1 and "--path DIR" in done.stdout
    found = machine.disk([str(tmp_path)])
    assert "free of" in found[0].value and find(found, "O_DIRECT").status in (OK, WARN)
    assert not list(tmp_path.iterdir()), "nothing is left there"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small /dev/shm of its own")
def test_a_small_shared_memory_gets_a_remedy() -> None:
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
    script = f"{mount}{sys.executable} -m deepspeedlite.env_report --json --only machine"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    if not done.stdout:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    row = find(rows_of(done), "/dev/shm")
    assert row.status == WARN and "--shm-size" in row.remedy and row.value.endswith("of 64 MiB")


def test_low_limits_get_remedies() -> None:
    script = f"ulimit -n 256; ulimit -l 64; exec {sys.executable} -m deepspeedlite.env_report --json --only machine"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    for name, remedy in (("open files", "ulimit -n"), ("locked memory", "ulimit -l")):
        row = find(rows_of(done), name)
        assert row.status == WARN and remedy in row.remedy


# --- ops and their cache ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ops_without_a_compiler_say_who_does_their_work(tmp_path: Path) -> None:
    done = run("--json", "--only", "ops", CXX="/no/such/compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    row = find(rows_of(done), "cpu_adam")
    assert row.status == WARN and "torch does its work" in row.value and "CXX=/no/such/compiler" in row.value


@needs("c++")
@pytest.mark.slow
def test_an_op_that_does_not_load_is_broken_and_what_builds_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeedlite.ops.op_builder import OPS, built

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = built(OPS["cpu_adam"])
    assert find(rows_of(run("--json", "--only", "ops")), "cpu_adam").value == "compiled, and loads"
    content = library.read_bytes()
    os.truncate(library, 5000)
    done = run("--json", "--only", "cache")
    damaged = find(rows_of(done), library.name)
    assert damaged.value == f"has 5000 of {len(content)} bytes" and "compiled again when it is needed" in damaged.remedy
    library.write_bytes(b"no library" * 99)
    write_sum(library)
    (library.parent / "cpu_lion-0123.tmp").mkdir()
    (library.parent / "cpu_lion-4567.so").touch()
    done = run("--json", "--only", "ops", "--only", "cache")
    broken = find(rows_of(done), "cpu_adam")
    assert done.returncode == 1 and broken.status == BAD and f"delete {library}" in broken.remedy
    assert find(rows_of(done), "cpu_lion-0123.tmp").value == "left by a killed build"
    assert find(rows_of(done), "of no use here").value.startswith("1, ")


@needs("c++")
@pytest.mark.slow
def test_an_op_that_kills_its_process_is_blamed_and_torch_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeedlite.ops.op_builder import OPS, built

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = built(OPS["cpu_adam"])
    library.unlink()  # its name is what counts
    source = "__attribute__((constructor)) static void die(void) { __builtin_trap(); }"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=source, text=True, check=True)
    write_sum(library)
    done = run("--json", "--only", "torch", "--only", "ops")
    row = find(rows_of(done), "cpu_adam")
    assert done.returncode == 1 and row.status == BAD and "the process dies of it" in row.value
    assert find(rows_of(done), "import torch").status == OK


def test_a_torch_that_prints_is_heard_all_the_same(fake_torch: Path) -> None:
    with (fake_torch / "__init__.py").open("a") as file:
        file.write("import atexit\nprint('hello', end='')\natexit.register(print, 'bye')\n")
    _, rows = report(fake_torch)
    assert find(rows, "import torch").value == "works" and find(rows, "nccl").value == "2.27.5"


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--json", "--only", "cache", TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    row = find(rows_of(done), "folder")
    assert row.status == WARN and "TORCH_EXTENSIONS_DIR" in row.remedy


@pytest.mark.slow
def test_without_any_package_each_remedy_is_the_right_one(tmp_path: Path) -> None:
    code = "import sys; from deepspeedlite.env_report import main; sys.exit(main(['--json']))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", code]  # without site-packages
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    rows = rows_of(done)
    assert done.returncode == 1 and find(rows, "torch").value == "not installed"
    assert {row.name for row in rows if row.status == BAD} == {"torch", *packages.REQUIRED}
    assert not any("report this" in row.remedy or (row.section == "ops" and row.remedy) for row in rows)


def test_a_wheel_for_another_cuda_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = packages.op_builder()
    record = builder.Record("cuda", "2.13.0", "13.0", None, ("8.0", "9.0"), "abc", {})
    monkeypatch.setattr(builder, "read_record", lambda: record)
    for module in (packages, tools):
        monkeypatch.setattr(module, "torch_files", lambda: TorchFiles("2.13.0+cu128", "/x", "12.8", None))
    (row,) = packages._wheel_record(builder)
    assert row.status == BAD and "13.0" in row.value and "12.8" in row.value and "DS_SKIP_CUDA_CHECK" in row.value
    assert find(tools.accelerators(), "the wheel's CUDA").status == WARN


def test_a_gpu_that_the_wheel_has_no_code_for_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = packages.op_builder()
    record = builder.Record("cuda", "2.13.0", "13.0", None, ("8.0", "9.0"), "abc", {})
    monkeypatch.setattr(builder, "read_record", lambda: record)
    good = machine._nvidia_gpu("0, NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, 580.95.05")
    assert (good.name, good.status) == ("GPU 0", OK) and good.value.endswith("supported by this wheel")
    bad = machine._nvidia_gpu("1, NVIDIA B200, 183359 MiB, 10.0, 580.95.05")
    assert bad.status == BAD and "this GPU is 10.0" in bad.value and "make wheel" in bad.value


# --- several nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[str]:
    """An ssh command that reaches this machine through a real sshd as `one` and `two`; `dead` refuses."""
    sshd, _, _ = program("sshd"), program("ssh"), program("ssh-keygen")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {tmp_path}/host", "StrictModes no", "UsePAM no"]
    settings += [f"AuthorizedKeysFile {tmp_path}/user.pub", f"PidFile {tmp_path}/pid", "PermitRootLogin yes"]
    (tmp_path / "sshd_config").write_text("\n".join([*settings, "AcceptEnv NCCL_*", ""]))
    hosts = [f"Host {name}\n  Port {port}\n  SetEnv NCCL_DEBUG={name}\n" for name in ("one", "two")]
    rest = f"Host dead\n  Port 1\nHost *\n  HostName 127.0.0.1\n  IdentityFile {tmp_path}/user\n"
    rest += f"  StrictHostKeyChecking no\n  UserKnownHostsFile {tmp_path}/known\n  LogLevel ERROR\n"
    (tmp_path / "ssh_config").write_text("".join(hosts) + rest)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([sshd, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"ssh -F {tmp_path}/ssh_config"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run an sshd of its own")
def test_nodes_are_asked_by_ssh_and_what_differs_is_shown(ssh: str, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("one slots=2\n# a comment\n\ntwo slots=2\ndead slots=2\n")
    only = ("--only", "variables", "--only", "compilers")
    done = run("--hostfile", str(hostfile), "--ssh", ssh, *only, "--json")
    found = rows_of(done)
    assert done.returncode == 1, "one node is dead"
    assert find(found, "one").value == find(found, "two").value == "nothing broken", found
    assert find(found, "dead").status == BAD and "Connection refused" in find(found, "dead").value
    assert find(found, "variables NCCL_DEBUG").value == "one: one; two: two"
    assert not [row for row in found if row.name.startswith("compilers")], "the same machine is like itself"


def test_a_node_that_hangs_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "ssh"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(nodes, "NODE_TIMEOUT_S", 0.3)
    found = nodes.reports(["a", "b"], str(sleeper))
    assert [row.status for row in nodes.broken(found)] == [BAD, BAD] and "did not answer" in found["a"][0].value
    assert nodes.differences(found) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a\nb\na slots=1\n", "line 3: a is on line 1 already"),
        ("-oX=y slots=1\n", "for an option"),
        (None, "cannot be read"),
    ],
)
def test_hostfiles_that_are_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    hostfile = tmp_path / "hostfile"
    if text is not None:
        hostfile.write_text(text)
    done = run("--hostfile", str(hostfile))
    assert done.returncode == 2 and message in done.stderr
