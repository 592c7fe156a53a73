"""install.sh: the same wheel here and on every node, bad nodes named, nothing left; what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from cluster import Cluster, needs_cluster
from paths import ROOT

WORKERS = ["worker-1", "worker-2", "worker-3"]
HERE = ["head", *WORKERS]


def install(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "install.sh", *arguments], capture_output=True, text=True, env={**os.environ, **variables}
    )


def as_anybody() -> list[str]:
    """What lets install.sh run whoever the tests run as."""
    return ["-r"] if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "there is no option '--nonsense'; see ./install.sh --help"),
        (["-H"], "-H needs a value"),
        (["-H", "hosts", "-l"], "--local_only and --hostfile exclude each other"),
        (["-H", "/no/such/file"], "hostfile /no/such/file cannot be read: No such file or directory"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    done = install(*as_anybody(), *arguments, PYTHON=sys.executable)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_an_environment_that_is_not_there() -> None:
    done = install(*as_anybody(), "-l", PYTHON="/no/such/python")
    assert done.returncode == 2 and "'/no/such/python' does not run; activate an environment, or name" in done.stderr


def test_wrong_lines_of_the_hostfile_are_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("worker-1 slots=1\n-oX slots=1\n")
    done = install(*as_anybody(), "-H", str(tmp_path / "hosts"), PYTHON=sys.executable)
    assert done.returncode == 2 and "line 2: the host -oX begins with '-'" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which is to be refused")
def test_root_must_mean_it() -> None:
    done = install("-l", PYTHON=sys.executable)
    assert done.returncode == 2 and "if that is meant, add -r (--allow_sudo)" in done.stderr


def test_help_names_every_option() -> None:
    done = install("--help")
    assert done.returncode == 0
    for option in ("local_only", "hostfile", "pip_sudo", "allow_sudo", "no_clean", "pip_mirror", "verbose", "help"):
        assert f"-{option[0] if option not in ('pip_sudo', 'allow_sudo', 'pip_mirror') else ''}" in done.stdout
        assert f"--{option}" in done.stdout


# --- on hosts whose environments are their own ------------------------------------------------------------------------


class Nodes:
    """Hosts on which one path, `python`'s environment, is a different folder each."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.environment = cluster, folder, folder / "env"
        self.python = self.environment / "bin" / "python"
        made = folder / "made"
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        # What this Python has but for deepspeedlite; folders of the test's own can take something away from a host.
        self.others = folder / "others"
        self.others.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "deepspeedlite" not in entry.name and not entry.name.endswith(".pth"):
                (self.others / entry.name).symlink_to(entry)
        (self.site(made) / "others.pth").write_text(f"{self.others}\n")
        for entry in self.site(made).glob("setuptools*"):
            shutil.rmtree(entry)  # that of ensurepip is too old to build with
        self.environment.mkdir()
        for host in HERE:
            shutil.copytree(made, folder / host, symlinks=True)
            cluster.run(host, ["mount", "--bind", folder / host, self.environment])

    @staticmethod
    def site(environment: Path) -> Path:
        [found] = environment.glob("lib/python*/site-packages")
        return found

    def installed(self) -> dict[str, list[str]]:
        """What of deepspeedlite's is in each host's environment."""
        return {
            host: sorted(path.name for path in self.site(self.folder / host).glob("*deepspeedlite*")) for host in HERE
        }

    def install(self, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": str(self.python), "TMPDIR": str(self.folder / "tmp")}
        (self.folder / "tmp").mkdir(exist_ok=True)
        command = [root / "install.sh", "-r", "-H", self.cluster.hostfile(), *arguments]
        return self.cluster.run("head", command, timeout=200, env=environment, cwd=root, check=False)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Cluster(WORKERS) as cluster:
        yield Nodes(cluster, tmp_path)


@pytest.mark.slow
@needs_cluster()
def test_every_node_gets_it_and_bad_ones_are_named(nodes: Nodes) -> None:
    before, kept = sorted(os.listdir(ROOT)), set(Path("/tmp").glob("deepspeedlite-node.*"))
    (nodes.folder / "worker-1" / "bin" / "python").unlink()
    nodes.cluster.power_off("worker-3")
    done = nodes.install()
    assert done.returncode == 1, done.stdout + done.stderr
    [dist_info] = [name for name in nodes.installed()["head"] if name.endswith(".dist-info")]
    has = ["deepspeedlite", dist_info]
    assert nodes.installed() == {"head": has, "worker-1": [], "worker-2": has, "worker-3": []}
    version = dist_info.removeprefix("deepspeedlite-").removesuffix(".dist-info")
    for line in (
        f"worker-2: has {version}; env_report: ",
        f"deepspeedlite is on 2 of 4 nodes, in {nodes.python}",
        f"bad: worker-1: {nodes.python} does not run there; make the same environment there as here",
        "bad: worker-3: ssh: connect to host worker-3 port 22: No route to host",
    ):
        assert line in done.stdout, done.stdout + done.stderr

    # Again, with the bad ones mended, and with something of the first run spoilt.
    (nodes.folder / "worker-1" / "bin" / "python").symlink_to(sys.executable)
    nodes.cluster.power_on("worker-3")
    nodes.cluster.run("worker-3", ["mount", "--bind", nodes.folder / "worker-3", nodes.environment])
    spoilt = nodes.site(nodes.folder / "worker-2") / "deepspeedlite" / "engine.py"
    spoilt.write_text("raise SystemExit\n")
    done = nodes.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes.installed() == dict.fromkeys(HERE, has)
    assert spoilt.read_bytes() == (ROOT / "deepspeedlite" / "engine.py").read_bytes()
    assert "deepspeedlite is on 4 of 4 nodes" in done.stdout and "bad:" not in done.stdout
    assert sorted(os.listdir(ROOT)) == before and os.listdir(nodes.folder / "tmp") == [], "nothing is left"
    assert set(Path("/tmp").glob("deepspeedlite-node.*")) <= kept, "nor on the nodes"


def pack(name: str, version: str, folder: Path) -> None:
    """An installed pure package as a wheel of another version."""
    installed = distribution(name)
    info = f"{name}-{installed.version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file in installed.files or ():
            if file.parts[0] in (name, info) and file.suffix != ".pyc":
                data = Path(str(installed.locate_file(file))).read_bytes()
                if file.name == "METADATA":
                    data = data.replace(f"Version: {installed.version}".encode(), f"Version: {version}".encode(), 1)
                wheel.writestr(str(file).replace(info, f"{name}-{version}.dist-info"), data)


@pytest.mark.slow
@needs_cluster("sudo")
def test_what_is_missing_comes_from_the_mirror_and_a_broken_node_is_bad(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "mirror" / "rich").mkdir(parents=True)
    pack("rich", "99.0", tmp_path / "mirror" / "rich")
    for entry in nodes.others.glob("rich*"):
        entry.unlink()
    for settings in ("xdg/pip", "pip.conf"):  # no other index
        subprocess.run(["rm", "-rf", nodes.cluster.directory / "etc" / settings], check=True)
    serve = [sys.executable, "-m", "http.server", "--directory", str(tmp_path / "mirror"), "8000"]
    nodes.cluster.popen("worker-3", serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    broken = nodes.site(tmp_path / "worker-2") / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no libtorch')\n")
    # The wheel is kept, so from a copy of the checkout.
    root = tmp_path / "checkout"
    for name in ("deepspeedlite", "csrc", "tools"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("install.sh", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    done = nodes.install("--pip_mirror", "http://worker-3:8000", "--pip_sudo", "--no_clean", "--verbose", root=root)
    text = done.stdout + done.stderr
    folders = {line.split(":")[0]: Path(line.split()[-1]) for line in text.splitlines() if "the wheel stays in" in line}
    kept = {host: [file.name for file in folder.iterdir()] for host, folder in folders.items()}
    for folder in folders.values():
        shutil.rmtree(folder)
    assert done.returncode == 1, text
    for host in HERE:
        assert (nodes.site(tmp_path / host) / "rich-99.0.dist-info").exists(), text
        assert f"{host}: Successfully installed deepspeedlite" in text, text
    assert "deepspeedlite is on 3 of 4 nodes" in text, text
    assert "bad: worker-2: installed, but env_report finds: bad import torch" in text, text
    [wheel] = (root / "dist").iterdir()
    assert f"built {wheel.name} in {root}/dist" in text
    assert kept == {host: [wheel.name] for host in HERE}


@pytest.mark.slow
@needs_cluster()
def test_an_environment_that_all_share_is_installed_into_once(nodes: Nodes) -> None:
    for host in WORKERS:
        nodes.cluster.run(host, ["umount", nodes.environment])
        nodes.cluster.run(host, ["mount", "--bind", nodes.folder / "head", nodes.environment])
    done = nodes.install()
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert [line for line in text.splitlines() if line.endswith(": installing")] == ["head: installing"]
    assert text.count("shares the environment of the machine that sent it") == 3
    assert "deepspeedlite is on 4 of 4 nodes" in text
    assert not list(nodes.site(nodes.folder / "head").glob(".deepspeedlite*")), "the mark is gone"


@pytest.mark.slow
@needs_cluster()
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(nodes: Nodes, number: signal.Signals) -> None:
    hang = "import sys, time\nif 'install' in sys.orig_argv: time.sleep(300)\n"
    (nodes.site(nodes.folder / "worker-2") / "sitecustomize.py").write_text(hang)
    (nodes.folder / "tmp").mkdir()
    process = nodes.cluster.popen(
        "head",
        [ROOT / "install.sh", "-r", "-H", nodes.cluster.hostfile()],
        env={**os.environ, "PYTHON": str(nodes.python), "TMPDIR": str(nodes.folder / "tmp")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "worker-2: installing\n":
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == "install.sh: stopped; what has begun on a node may go on there"
    assert not nodes.cluster.processes("head", "ssh -T") and not os.listdir(nodes.folder / "tmp")
    for pid in nodes.cluster.processes("worker-2", " install "):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while any(nodes.cluster.processes(host, "bash -s") for host in WORKERS):  # each removes its folder when it ends
        assert time.monotonic() < until
        time.sleep(0.05)
