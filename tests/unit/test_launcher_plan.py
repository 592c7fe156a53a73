"""What the launcher decides without starting anything: hosts, slots, places, commands, the check; and its protocol."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from programs import needs

from deepspeedlite.env_report.preflight import Found, check, facts, table
from deepspeedlite.env_report.rows import BAD, WARN
from deepspeedlite.host.cores import cpu_quota, usable_cores
from deepspeedlite.host.gpus import Devices
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.backends import BACKENDS, Launch, Reach, find_backend
from deepspeedlite.launcher.cli import parse
from deepspeedlite.launcher.hostfile import numbers_in, select
from deepspeedlite.launcher.job import Assignment, build_job
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.multinode import assign_ranks, dry_run
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.plan import choose_hosts, exported, ranks_environ
from deepspeedlite.runtime.errors import LaunchError

# --include and --exclude

SLOTS = st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=8).map(sorted)
POOLS = st.dictionaries(st.sampled_from(["a", "b", "worker-1", "n.x", "c_d"]), SLOTS, min_size=1)


def spelled(slots: list[int], as_ranges: bool) -> str:
    """A list of slots, runs of at least two written as ranges if asked."""
    parts: list[str] = []
    index = 0
    while index < len(slots):
        end = index
        while as_ranges and end + 1 < len(slots) and slots[end + 1] == slots[end] + 1:
            end += 1
        parts.append(str(slots[index]) if end == index else f"{slots[index]}-{slots[end]}")
        index = end + 1
    return ",".join(parts)


@given(POOLS, st.data(), st.booleans(), st.booleans())
def test_selection_equals_a_plain_one(
    pool: dict[str, list[int]], data: st.DataObject, wanted: bool, ranges: bool
) -> None:
    named = data.draw(st.lists(st.sampled_from(sorted(pool)), unique=True, min_size=1))
    picks = {
        host: data.draw(st.none() | st.lists(st.sampled_from(pool[host]), unique=True, min_size=1)) for host in named
    }
    text = "@".join(host if slots is None else f"{host}:{spelled(slots, ranges)}" for host, slots in picks.items())
    pairs = {(host, slot) for host, slots in pool.items() for slot in slots}
    meant = {(h, s) for h, slots in picks.items() for s in (pool[h] if slots is None else slots)}
    left = pairs & meant if wanted else pairs - meant
    plain = {host: sorted(s for h, s in left if h == host) for host in pool if any(h == host for h, _ in left)}
    if not plain:
        with pytest.raises(LaunchError, match="leaves no slot"):
            select(pool, text if wanted else None, None if wanted else text)
        return
    found = select(pool, text if wanted else None, None if wanted else text)
    assert found == plain and list(found) == [host for host in pool if host in plain]


@given(POOLS, st.text(st.sampled_from("ab:@,-0123x "), max_size=12))
def test_a_selection_is_understood_or_refused(pool: dict[str, list[int]], text: str) -> None:
    try:
        found = select(pool, text or None, None)
    except LaunchError as error:
        assert "--include" in str(error) and text in str(error)
        return
    assert all(set(slots) <= set(pool[host]) for host, slots in found.items())


@pytest.mark.parametrize(
    ("include", "said"),
    [
        ("worker-3", "no host 'worker-3'; did you mean worker-"),
        ("worker-1:9", "worker-1 has no slot 9; its slots are [0, 1]"),
        ("worker-1:0@worker-1:1", "names worker-1 twice"),
        ("worker-1:0,0-1", "names a slot twice"),
        ("worker-1:", "'' is no slot"),
        ("worker-1:1-0", "'1-0' is no slot or range"),
    ],
)
def test_a_wrong_selection_names_what_is_wrong(include: str, said: str) -> None:
    with pytest.raises(LaunchError) as raised:
        select({"worker-1": [0, 1], "worker-2": [0, 1]}, include, None)
    assert said in str(raised.value)


def test_slots_of_a_machine_without_gpus_are_free() -> None:
    assert select({"localhost": None}, "localhost:0-2", None) == {"localhost": [0, 1, 2]}


def test_hosts_are_counted_cut_and_spared(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=4\nb slots=2\nc slots=4\n")
    options = parse(["--hostfile", str(hostfile), "--num_nodes", "2", "--num_gpus", "2", "t.py"])
    assert choose_hosts(options, {}) == ({"a": [0, 1], "b": [0, 1]}, {"c": [0, 1]}, True)
    with pytest.raises(LaunchError, match="--num_gpus 3: b has 2 slots"):
        choose_hosts(replace(options, num_gpus=3), {})
    with pytest.raises(LaunchError, match="neither --hostfile FILE nor a Slurm allocation"):
        choose_hosts(parse(["--launcher", "pdsh", "t.py"]), {})
    slurm = parse(["--launcher", "slurm", "t.py"])
    assert choose_hosts(slurm, {"SLURM_JOB_NODELIST": "n[1-2]"}) == ({"n1": None, "n2": None}, {}, True)


def test_ranks_are_numbered_through_the_hosts() -> None:
    assignments = assign_ranks([Found("a", [0, 2]), Found("b", [1])], "a", 29500, 0)
    assert [(p.host, p.first_rank, p.node_rank, p.world_size) for p in assignments] == [("a", 0, 0, 3), ("b", 2, 1, 3)]
    job = build_job(
        LaunchOptions(str(ROOT / "setup.py")), assignments[1], {"CUDA_VISIBLE_DEVICES": "5,7", "DS_ACCELERATOR": "cpu"}
    )
    assert job.ranks[0].prefix == "[b:2] " and job.ranks[0].env["CROSS_RANK"] == "1"


# A hundred hosts


@pytest.mark.parametrize("name, commands", [
    pytest.param("ssh", 100, marks=needs("ssh")),
    pytest.param("pdsh", 1, marks=needs("pdsh")),
])  # fmt: skip
def test_a_dry_run_of_a_hundred_hosts(name: str, commands: int) -> None:
    hosts = {f"node-{index}": list(range(8)) for index in range(100)}
    text = dry_run(parse(["--launcher", name, "t.py", "--x", "a b"]), hosts)
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("node-")]) == 100
    assert "node-99  792-799  0,1,2,3,4,5,6,7" in text and "'a b'" in text
    assert sum("deepspeedlite.launcher.node" in line for line in lines) == commands


def test_the_check_of_a_hundred_hosts_shows_each_and_names_the_odd_ones() -> None:
    own = {**facts({"DS_ACCELERATOR": "cpu"}), "files": -1, "own_name": "", "shm_bytes": 8 << 30, "cores": 8}
    own["cache"] = ["/c", True, 8 << 30]
    found = [Found(f"node-{index}", [0], {**own, "machine": str(index)}, reached=True) for index in range(100)]
    assert not [row for row in check(found, "node-0") if row.status in (BAD, WARN)]
    found[7].facts |= {"torch": "1.0"}
    found[8].facts |= {"python": "3.10.1", "devices": asdict(Devices("nvidia", ["0", "1"]))}
    found[8].slots = [0, 1, 2]
    found[9] = Found("node-9", [0], error="ssh: connect to host node-9 port 22: Connection timed out")
    found[10].skew_s = -7.0
    found[11].reached = False
    found[12].facts |= {"files": 64, "cores": 0, "shm_bytes": 64 << 20, "cache": ["/c", True, 1 << 20]}
    found[13].facts |= {"machine": "3", "fault": "script no.py does not exist"}
    rows = check(found, "node-0")
    bad = {(row.section, row.name) for row in rows if row.status == BAD}
    wanted = {
        ("node-7", "torch"),
        ("node-8", "python"),
        ("node-8", "GPUs"),
        ("node-9", "reached"),
        ("node-11", "master"),
        ("node-13", "machine"),
        ("node-13", "start"),
    }
    assert bad == wanted
    odd = {(row.section, row.name) for row in rows if row.status == WARN}
    assert odd == {("node-10", "clock")} | {("node-12", n) for n in ("open files", "cores", "/dev/shm", "ops' folder")}
    text = table(rows, colour=False)
    assert len(re.findall(r"^node-\d+ ", text, re.MULTILINE)) == 100
    assert all(f"{host}: {name}: " in text for host, name in wanted) and "\x1b" not in text
    assert max(map(len, text.splitlines())) < 200


def test_two_parts_on_one_machine_are_a_mistake_of_a_hostfile_alone() -> None:
    own = {**facts({"DS_ACCELERATOR": "cpu"}), "machine": "1"}

    def row(by_hand: bool, *ids: str) -> tuple[str, str]:
        own["devices"] = asdict(Devices("nvidia" if ids else "cpu", ids))
        found = [Found("node-0", [0], own), Found("node-1", [0] if len(ids) < 2 else [1], own)]
        (one,) = [row for row in check(found, by_hand=by_hand) if row.name == "machine"]
        return one.status, one.value

    assert row(False) == (BAD, "is node-0 under another name")
    assert row(True) == row(True, "0", "1") == (WARN, "is the one that node-0 is on")
    assert row(True, "3") == (BAD, "is the one that node-0 is on, and both would use GPU 3")


# Commands


def test_every_backend_starts_one_agent_per_host(tmp_path: Path) -> None:
    for name in ("ssh", "pdsh", "mpirun", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Module: rcmd/exec\n")
        (tmp_path / name).chmod(0o755)
    secret = {"DSL_LAUNCHER_KEY": "s3cr3t"}
    reach = Reach(["a", "b"], frozenset(), "10.0.0.1:99", secret, 2222, ("-v",), "/lib x", "/py")
    agent = "/py -m deepspeedlite.launcher.node"
    for name in BACKENDS:
        launches: list[Launch] = find_backend(name, path=str(tmp_path)).launches(reach)
        if name != "slurm":
            assert "-p 2222" in f"{launches[0].argv} {launches[0].env}".replace("', '", " "), name
        text = "\n".join(" ".join(launch.argv) for launch in launches)
        assert agent in text and "-v" in text, name
        assert "s3cr3t" not in text, "others see commands"
        assert len(launches) == (2 if name == "ssh" else 1)
        assert all("s3cr3t" in launch.env.values() for launch in launches) or name == "ssh"
    impi, mvapich = (find_backend(name, path=str(tmp_path)).launches(reach)[0] for name in ("impi", "mvapich"))
    for launch, pin in ((impi, "I_MPI_PIN"), (mvapich, "MV2_ENABLE_AFFINITY")):
        assert list(launch.argv[:8]) == ["mpirun", "-n", "2", "-ppn", "1", "-hosts", "a,b", "-genvlist"]
        assert launch.env[pin] == "0"


def test_pdsh_is_used_where_it_can_run_a_command_for_each_host(tmp_path: Path) -> None:
    for name, says in (("ssh", ""), ("pdsh", "echo Module: rcmd/ssh")):  # as Fedora's has it alone
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    assert find_backend(None, path=str(tmp_path)) is BACKENDS["ssh"]
    with pytest.raises(LaunchError, match=r"its module exec is not there \(Fedora: pdsh-rcmd-exec\); --launcher ssh"):
        find_backend("pdsh", path=str(tmp_path))
    (tmp_path / "pdsh").write_text("#!/bin/sh\necho Module: rcmd/ssh\necho Module: rcmd/exec\n")
    assert find_backend(None, path=str(tmp_path)) is find_backend("pdsh", path=str(tmp_path)) is BACKENDS["pdsh"]
    assert find_backend(None, ["a:22"], str(tmp_path)) is BACKENDS["ssh"]


# Cores


def test_cores_are_shared_out_evenly() -> None:
    assert numbers_in("0-2, 8", "--bind_core_list", "core") == [0, 1, 2, 8]
    for text, said in (("", "no core"), ("3-1", "no core"), ("0,0", "twice"), ("x", "no core")):
        with pytest.raises(LaunchError, match=said):
            numbers_in(text, "--bind_core_list", "core")
    usable = sorted(os.sched_getaffinity(0))
    assignment = Assignment(range(len(usable)), len(usable), "127.0.0.1", 1)
    job = build_job(
        LaunchOptions(str(ROOT / "setup.py"), bind_cores_to_rank=True), assignment, {"DS_ACCELERATOR": "cpu"}
    )
    assert [rank.cores for rank in job.ranks] == [(core,) for core in usable]
    assert job.ranks[0].env["OMP_NUM_THREADS"] == "1"
    with pytest.raises(LaunchError, match="cannot have a core each"):
        build_job(
            LaunchOptions(str(ROOT / "setup.py"), bind_cores_to_rank=True),
            replace(assignment, slots=range(999)),
            {"DS_ACCELERATOR": "cpu"},
        )


def test_a_quota_of_any_control_group_above_counts(tmp_path: Path) -> None:
    """Both versions, seen from within a container (whose own group is the top) and from outside."""
    for number, files in enumerate(
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
            {
                "proc/self/cgroup": "0::/a.slice/b\n",
                "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a.slice/b/cpu.max": "max 100000\n",
            },
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/7\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
        )
    ):
        root = tmp_path / str(number)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        assert cpu_quota(root) == 1.5 and usable_cores(root) == 1
    assert cpu_quota(tmp_path / "none") is None


# Variables


def test_a_variables_file_is_read_as_users_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written on Windows, with blanks, quotes and names of variables that each machine has its own of."""
    text = "\ufeffexport A = 1 2 \r\n# no\nB=/x:$LD:${LD}\nC='$LD'\nD=\\$LD \\\\ \\n\nE=\"$B\"\nF=$5$(x)\nG=$NONE.\n"
    (tmp_path / "vars").write_bytes(text.encode())
    environ = {"DS_ENV_FILE": str(tmp_path / "vars"), "NCCL_X": "$LD\\$", "H": "$LD"}
    monkeypatch.chdir(tmp_path)
    options = parse(["--export_env", "H", "--export_env", "I='$LD'", "t.py"])
    options = replace(options, env=exported(options, environ))
    wanted = {"A": "1 2", "B": "/x:/l:/l", "C": "$LD", "D": "$LD \\ \\n", "E": "/x:/l:/l", "F": "$5$(x)", "G": "."}
    wanted |= {"H": "$LD", "I": "'$LD'", "NCCL_X": "$LD\\$", "LD": "/l"}
    assert ranks_environ(options, {"LD": "/l"}) == wanted
    (tmp_path / "vars").write_bytes("A=1\n".encode("utf-16"))
    with pytest.raises(LaunchError, match="is written in UTF-16, not UTF-8; convert it: iconv"):
        exported(options, environ)


# The protocol


def link_over(*fds: int) -> protocol.Link:
    """One end, whose loop the test turns by itself."""
    return protocol.Link(Loop(), lambda link: None, *fds)


def pair() -> tuple[protocol.Link, protocol.Link]:
    one, two = socket.socketpair()
    return link_over(one.detach()), link_over(two.detach())


def hear(link: protocol.Link) -> tuple[bytes, dict[str, Any]]:
    """The next frame."""
    deadline_s = time.monotonic() + 20
    while not (frames := link.receive()):
        assert time.monotonic() < deadline_s and not link.closed
        time.sleep(0.01)
    return frames[0]


@given(st.lists(st.tuples(st.sampled_from([b"O", b"T"]), st.binary(max_size=300)), max_size=20), st.integers(1, 50))
def test_frames_arrive_whole_however_they_are_cut(frames: list[tuple[bytes, bytes]], size: int) -> None:
    near, far = socket.socketpair()
    sender = link_over(os.dup(near.fileno()))
    collected = b"motd: welcome\n" + far.recv(1000)
    for kind, body in frames:
        sender.send(kind, body.hex(), raw=body if kind == b"O" else None)
        collected += far.recv(100_000)
    read_fd, write_fd = os.pipe()
    receiver = link_over(read_fd, os.open(os.devnull, os.O_WRONLY))
    got = []
    for start in range(0, len(collected), size):
        os.write(write_fd, collected[start : start + size])
        got += receiver.receive()
    assert [f for f in got if f[0] in (b"O", b"T")] == [(k, b if k == b"O" else b.hex()) for k, b in frames]
    for link in (sender, receiver):
        link.close()
    os.close(write_fd)
    near.close()
    far.close()


def test_a_link_that_is_not_read_keeps_no_writer_waiting() -> None:
    near, far = pair()
    started_s = time.monotonic()
    for _ in range(100):
        near.send(protocol.OUTPUT, raw=bytes(1 << 16))
    assert near.waits_for is not None and time.monotonic() - started_s < 1
    received = 0
    while received < 100:
        near.flush()
        received += len(far.receive())
    assert near.waits_for is None
    near.close()
    assert far.receive() == [] and far.closed
    far.close()


def test_garbage_closes_a_link() -> None:
    headers = (b"\xff\xff\xff\xffO", (3).to_bytes(4, "big") + b"J{]")
    for garbage in (*(protocol.MAGIC + header for header in headers), b"x" * (2 << 20)):
        near, far = socket.socketpair()
        link = link_over(far.detach())
        threading.Thread(target=near.sendall, args=(garbage,), daemon=True).start()
        deadline_s = time.monotonic() + 5
        while not link.closed and time.monotonic() < deadline_s:
            link.receive()
        assert link.closed
        link.close()
        near.close()


def test_an_agent_runs_nothing_for_one_who_does_not_know_its_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv = [
            sys.executable,
            "-m",
            "deepspeedlite.launcher.node",
            "--connect",
            f"127.0.0.1:{server.getsockname()[1]}",
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DSL_LAUNCHER_KEY": "ours"}
        agent = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
        link = link_over(server.accept()[0].detach())
        link.send(protocol.CHALLENGE, "n")
        kind, hello = hear(link)
        assert (
            kind == protocol.HELLO
            and hello["proof"] == protocol.proof("ours", "n", "node")
            and "ours" not in str(hello)
        )
        link.send(protocol.WELCOME, protocol.proof("theirs", hello["nonce"], "launcher"))
        options = {"script": "touch", "script_args": [str(tmp_path / "ran")], "no_python": True, "no_local_rank": True}
        assignment = {"slots": [0], "world_size": 1, "master_addr": "x", "master_port": 1}
        link.send(protocol.ASK, {"options": options})
        link.send(protocol.JOB, {"assignment": assignment, "terminals": {}})
        assert "is not the one that started it" in agent.communicate(timeout=20)[1]
        assert agent.returncode == 0 and not (tmp_path / "ran").exists()
        link.close()
