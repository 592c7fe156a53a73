"""The fixtures of all tests.

They are in a plugin since pytest binds those of a conftest.py to its folder as it was collected first: a session of
sessions.py, which collects file by file, would lose them after its first file.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paths import HELPERS
from programs import find, program, reason_to_skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := reason_to_skip(item):
        pytest.skip(reason)


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
    compiler = program("c++")
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
        *map(Path, filter(None, [find("cuobjdump")])),
    ]
    program("nvcc")
    if not found:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump)")

    def archs(library: Path) -> set[str]:
        done = subprocess.run([found[0], "--list-elf", library], capture_output=True, text=True, check=True)
        return set(re.findall(r"sm_\w+", done.stdout))

    return archs
