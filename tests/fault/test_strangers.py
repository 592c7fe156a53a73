"""Another user of the host, beside a job: each sentence of docs/security.md that says what he cannot do.

He is a process with another uid, forked from what ranks are. It needs root to become him.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest

from deepspeedlite.launcher.start import save_pid
from deepspeedlite.runtime.env import JOB_SECRET
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.transports import shared_memory

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")

RANK = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
rank, port, secret, uid = *map(int, sys.argv[1:3]), sys.argv[3], int(sys.argv[4])
os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
if secret:
    os.environ["DSL_JOB_SECRET"] = secret
from deepspeedlite.comm import Group, init_distributed
"".encode("idna")  # which could not be imported from root's folders later
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
init_distributed(timeout=timedelta(seconds=float(sys.argv[5])), verbose=False)
print("in", Group().all_gather_objects(f"rank {rank}"), flush=True)
dist.destroy_process_group()
"""

# Somebody who knows all but the secret: writes what a rank would write, under every name that he finds or can guess.
MISCHIEF = """
import os, pickle, sys, time
from datetime import timedelta
import torch.distributed as dist
port, marker = int(sys.argv[1]), sys.argv[2]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
class Evil:
    def __reduce__(self):
        return os.system, (f"touch {marker}",)
store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=1))
for attempt in range(2):
    for name in ("rank/0", "rank/1", "verdict", "fault", "read"):
        store.set(f"deepspeedlite/0.{attempt}/check_in/{name}", pickle.dumps(Evil()))
    for number in range(2):
        for kind in ("cpu", "gloo"):
            store.set(f"deepspeedlite/0.{attempt}/group/default_pg/0//{kind}//0/{number}", pickle.dumps(Evil()))
names = store.list_keys()
print(sorted(name for name in names if "check_in" not in name and "default_pg" not in name), flush=True)
print([store.get(name) for name in names if len(name) == 33 or "/" not in name.strip("/")], flush=True)
"""

# Somebody who lists the names: each value of a rank's is written over by what it would say of a world of three.
FORGERY = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), wait_for_workers=False, timeout=timedelta(seconds=1))
until = time.monotonic() + 30
while not (names := [name.strip("/") for name in store.list_keys() if len(name.strip("/")) == 32]):
    assert time.monotonic() < until
    time.sleep(0.01)
evil = json.dumps({"world_size": 3, "pid": 1, "host": "stranger", "token": "x"}).encode()
for name in names:
    store.set(name, bytes(40) + evil)  # in place of a signature and a random number, which it cannot make
print(len(names), flush=True)
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path, name: str, code: str, *arguments: object) -> Iterator[tuple[Any, Path, Path]]:
    """A process, and the files of what it says."""
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    process = forked.start(code, *arguments, stdout=out, stderr=err)
    try:
        yield process, out, err
    finally:
        process.kill()
        process.join()


def await_listener(port: int) -> None:
    late_at = time.monotonic() + 60
    while time.monotonic() < late_at:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("rank 0 does not listen")


@needs_root
def test_a_start_goes_well_among_strangers(tmp_path: Path, port: int) -> None:
    """None joins as rank 1, runs code, claims a rank, reads a name or an object, learns the secret or gets in from
    outside; and the start of those who belong to the job is not stopped.
    """
    tmp_path.chmod(0o777)
    secret, marker = "5e" * 16, tmp_path / "ran"
    with running(tmp_path, "zero", RANK, 0, port, secret, 0, 60) as (zero, out, err):
        await_listener(port)
        listening = {c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
        assert listening == {("127.0.0.1", port)}
        with running(tmp_path, "false", RANK, 1, port, "", STRANGER, 1) as (false, false_out, false_err):
            mischief = forked.run(MISCHIEF, port, marker, folder=tmp_path, timeout_s=60)
            assert mischief.returncode == 0, mischief.stderr
            look = f"import os; os.setuid({STRANGER}); open('/proc/{zero.pid}/environ').read()"
            assert "PermissionError" in forked.run(look, folder=tmp_path, timeout_s=60).stderr
            false.join(60)
            assert false.exitcode == 1 and "in [" not in false_out.read_text()
            assert "DistributedError" in false_err.read_text()
        with running(tmp_path, "one", RANK, 1, port, secret, 0, 60) as (one, one_out, one_err):
            for process, said, words in ((zero, out, err), (one, one_out, one_err)):
                process.join(60)
                assert said.read_text() == "in ['rank 0', 'rank 1']\n" and process.exitcode == 0, words.read_text()
    names, values = mischief.stdout.splitlines()
    assert re.fullmatch(r"\['/?[0-9a-f]{32}'(, '/?[0-9a-f]{32}')*(, '/?init/')?\]", names), names
    assert secret not in values and not marker.exists()


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("is_believed", [False, True])
def test_what_a_stranger_writes_over_a_value_is_not_believed(tmp_path: Path, port: int, is_believed: bool) -> None:
    """He can stop the start, which then says why. Without the signature's check his values count: this sees it."""
    code, secret = RANK, "5e" * 16
    if is_believed:
        taken_out = "from deepspeedlite.comm.guard.signed_store import SignedStore\n"
        taken_out += "SignedStore._believed = lambda self, key, found: found[40:] if found else None\n"
        code = RANK.replace("init_distributed(timeout", f"{taken_out}init_distributed(timeout")
    with running(tmp_path, "zero", code, 0, port, secret, 0, 8) as (zero, out, err):
        await_listener(port)
        forgery = forked.run(FORGERY, port, folder=tmp_path, timeout_s=60)
        assert forgery.returncode == 0 and int(forgery.stdout) > 0, forgery.stderr
        with running(tmp_path, "one", code, 1, port, secret, 0, 8) as (one, one_out, one_err):
            for process, said in ((zero, out), (one, one_out)):
                process.join(60)
                assert process.exitcode == 1 and not said.read_text()
            words = err.read_text() + one_err.read_text()
    assert ("disagree on the world size: 2 on rank 1; 3 on rank 0" in words) == is_believed, words
    assert ("is not signed: something else writes to this store" in words) != is_believed, words


@needs_root
def test_without_a_secret_a_stranger_runs_no_code(tmp_path: Path, port: int) -> None:
    """Under torchrun, say: he may stop the start by what he writes, and that is all."""
    tmp_path.chmod(0o777)
    marker = tmp_path / "ran"
    with running(tmp_path, "zero", RANK, 0, port, "", 0, 8) as (zero, out, _):
        await_listener(port)
        assert forked.run(MISCHIEF, port, marker, folder=tmp_path, timeout_s=60).returncode == 0
        zero.join(60)
        assert zero.exitcode == 1 and not out.read_text() and not marker.exists()


@needs_root
def test_a_strangers_connection_is_not_waited_for() -> None:
    """To the socket by which ranks of a host find each other's memory; its name is there for all to see."""
    listener, card = shared_memory._listen(2)
    if listener is None or card is None:
        pytest.skip("no memory can be shared here")
    ready, done = os.pipe(), os.pipe()
    stranger = os.fork()
    if stranger == 0:
        os.setuid(STRANGER)
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.connect(card[1])  # and says nothing
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    own = shared_memory._call(card[1], card[2], 1)
    peers: dict[int, socket.socket] = {}
    started = time.monotonic()
    with listener, own:
        shared_memory._answer(listener, card[2], peers, 2)
        peers[1].close()
    os.write(done[1], b"x")
    os.waitpid(stranger, 0)
    assert time.monotonic() - started < 5


def test_a_saved_pid_follows_no_link(tmp_path: Path) -> None:
    """Nor is another user's file in a folder of all written."""
    precious, path = tmp_path / "precious", tmp_path / f"{os.getpid()}.ds"
    precious.write_text("kept")
    path.symlink_to(precious)
    assert save_pid({"XDG_RUNTIME_DIR": str(tmp_path)}) == path
    assert path.read_text() == str(os.getpid()) and not path.is_symlink() and precious.read_text() == "kept"
    path.unlink()
    path.mkdir()
    with pytest.raises(LaunchError, match="cannot be written"):
        save_pid({"XDG_RUNTIME_DIR": str(tmp_path)})


@pytest.mark.slow
def test_the_secret_stands_on_no_command_line(tmp_path: Path) -> None:
    """Each start has another one, which ranks have and a dry run does not show."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, psutil\nprint(os.environ[{JOB_SECRET!r}])\n"
        f"assert not any(os.environ[{JOB_SECRET!r}] in ' '.join(p.info['cmdline'] or ())"
        " for p in psutil.process_iter(['cmdline']))\n"
    )
    command = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", "2", "--master_port", "0"]
    secrets = set()
    for _ in range(2):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (found,) = {line.split()[-1] for line in done.stdout.splitlines()}
        assert re.fullmatch("[0-9a-f]{32}", found)
        secrets.add(found)
    dry = subprocess.run([*command, "--dry_run", str(script)], capture_output=True, text=True, timeout=120)
    assert len(secrets) == 2 and JOB_SECRET not in dry.stdout
