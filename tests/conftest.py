"""Pytest's set-up for all tests: what they import from (helpers/paths.py), and the end of the rank workers.

Ranks are started by `harness.distributed`; see its docstring. `from harness import distributed` is how tests use it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
from paths import HELPERS, put_on_path

put_on_path()
pytest_plugins = ["sessions"]

if "COVERAGE_PROCESS_CONFIG" in os.environ:  # `make coverage`, which makes Python code slow
    import hypothesis

    hypothesis.settings.register_profile(
        "traced", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("traced")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_unless`: of a large matrix, the cases that have none of the named values are slow."""
    for item in items:
        for mark in item.iter_markers("slow_unless"):
            for name, values in mark.kwargs.items():
                quick = values if isinstance(values, tuple) else (values,)
                if item.callspec.params[name] not in quick:  # type: ignore[attr-defined]
                    item.add_marker(pytest.mark.slow)


def pytest_sessionfinish() -> None:
    """Leave no worker process behind, whether the session passed, failed or was interrupted."""
    harness = sys.modules.get("harness")
    if harness is not None:
        harness.close_pool()


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    """Fails a test that leaves torch.distributed running in pytest's own process, which others need to be alone in."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left torch.distributed running in pytest's own process: use @distributed", pytrace=False)


@pytest.fixture
def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def aio_faults(tmp_path_factory) -> Path:
    """What `LD_PRELOAD` puts before libc, so that transfers of async_io fail: see faults_aio.cpp."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("preloading faults needs a C++ compiler")
    library = tmp_path_factory.mktemp("faults") / "faults_aio.so"
    source = HELPERS / "faults_aio.cpp"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def cuobjdump() -> Callable[[Path], set[str]]:
    """Which GPUs a library has code for, by NVIDIA's own tool."""
    found = [
        *Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"),
        *map(Path, filter(None, [shutil.which("cuobjdump")])),
    ]
    if not found or shutil.which("nvcc") is None:
        pytest.skip("needs nvcc and cuobjdump (pip install nvidia-cuda-cuobjdump)")

    def archs(library: Path) -> set[str]:
        done = subprocess.run([found[0], "--list-elf", library], capture_output=True, text=True, check=True)
        return set(re.findall(r"sm_\w+", done.stdout))

    return archs
