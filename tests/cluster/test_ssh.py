"""dslite_ssh between real hosts: who says what, how commands are quoted, statuses, hosts that are dead or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from children import hear_signals
from cluster import Cluster, needs_cluster
from paths import ROOT

WORKERS = ["worker-1", "worker-2", "worker-3"]
TOOL = [sys.executable, "-m", "deepspeedlite.ssh"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(WORKERS) as cluster:
        yield cluster


def on_all(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.run("head", [*TOOL, "-H", cluster.hostfile(), *arguments], cwd=ROOT, check=False)


def spoken(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The lines of each host."""
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        host, _, text = line.partition(": ")
        found.setdefault(host, []).append(text)
    return found


@needs_cluster()
def test_every_host_answers(cluster: Cluster) -> None:
    done = on_all(cluster, "hostname")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [f"{name}: {name}" for name in WORKERS]


@needs_cluster()
@pytest.mark.parametrize(
    "words",
    [
        ["echo $((2+3)) | tr 5 x; echo '*'"],
        ["--", "printf", "%s,", "a b", '"c  d"', "$HOME", "'e\n  f'", "ü", "\\$x"],
        ["ls", "-d", "/"],
        ["--", "-no-such-option"],
    ],
)
def test_words_are_read_as_ssh_reads_them(cluster: Cluster, words: list[str]) -> None:
    ours = on_all(cluster, *words)
    command = words[words[0] == "--" :]
    theirs = cluster.run("head", ["ssh", "--", "worker-1", *command], check=False)
    assert spoken(ours) == (dict.fromkeys(WORKERS, theirs.stdout.splitlines()) if theirs.stdout else {})
    assert ours.returncode == theirs.returncode
    assert all(f"{name}: {line}" in ours.stderr for name in WORKERS for line in theirs.stderr.splitlines())


@pytest.mark.slow
@needs_cluster()
def test_hosts_run_at_once_and_their_lines_stay_whole(cluster: Cluster) -> None:
    script = "for i in $(seq 300); do printf 'one '; printf 'two '; echo $i; done; printf unfinished; sleep 2"
    started = time.monotonic()
    done = on_all(cluster, script)
    assert time.monotonic() - started < 5.5, "in turn they would need more than 6 s"
    assert spoken(done) == {name: [*(f"one two {i}" for i in range(1, 301)), "unfinished"] for name in WORKERS}


@needs_cluster()
def test_the_status_is_the_first_failure_in_the_files_order_and_all_are_listed(cluster: Cluster) -> None:
    done = on_all(cluster, 'case $(hostname) in worker-2) sleep 0.7; exit 7;; worker-3) echo "bad" >&2; exit 3;; esac')
    assert done.returncode == 7
    assert done.stderr.splitlines() == [
        "worker-3: bad",
        "dslite_ssh: 2 of 3 hosts failed:",
        "  worker-2: exit status 7",
        "  worker-3: exit status 3",
    ]


@pytest.mark.slow
@needs_cluster()
def test_a_command_that_hangs_is_given_up(cluster: Cluster) -> None:
    started = time.monotonic()
    done = on_all(cluster, "--timeout", "2", "echo here; [ $(hostname) != worker-1 ] || sleep 64")
    assert time.monotonic() - started < 10
    assert (done.returncode, spoken(done)) == (124, {name: ["here"] for name in WORKERS})
    assert done.stderr.splitlines()[1:] == ["  worker-1: took longer than 2 s"]
    assert not cluster.processes("head", "ssh -n"), "no ssh is left"


@needs_cluster()
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(cluster: Cluster, number: signal.Signals) -> None:
    command = [*TOOL, "-H", cluster.hostfile(), "echo here; sleep 65"]
    pipe = subprocess.PIPE
    process = cluster.popen("head", command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert "here" in process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number and err == "dslite_ssh: stopped; what runs on the hosts may go on there\n"
    assert not cluster.processes("head", "ssh -n")


@pytest.mark.slow
def test_a_signal_while_hosts_still_start_leaves_no_ssh(tmp_path: Path) -> None:
    ssh, hosts, mark = tmp_path / "ssh", tmp_path / "hosts", f"{os.getpid()}.5"
    ssh.write_text(f"#!/bin/sh\necho here\nexec sleep 6{mark}\n")
    ssh.chmod(0o755)
    hosts.write_text("".join(f"host-{i}\n" for i in range(12)))
    for attempt in range(6):
        pipe = subprocess.PIPE
        command = [*TOOL, "-H", str(hosts), "--ssh", str(ssh), "x"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_signals)
        assert "here" in process.stdout.readline()
        time.sleep(0.004 * attempt)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (130, "dslite_ssh: stopped; what runs on the hosts may go on there\n")
    assert not [line for p in psutil.process_iter(["cmdline"]) if f"6{mark}" in (line := p.info["cmdline"] or ())]


@needs_cluster()
def test_a_reader_that_leaves_ends_it(cluster: Cluster) -> None:
    command = f"{' '.join(TOOL)} -H {cluster.hostfile()} 'while :; do echo x; sleep 0.01; done' | head -n 2"
    done = cluster.run("head", ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, check=False, timeout=20)
    assert (done.returncode, len(done.stdout.splitlines())) == (128 + signal.SIGPIPE, 2)
    assert not cluster.processes("head", "ssh -n")


@needs_cluster()
@pytest.mark.slow
def test_dead_hosts_cost_nobody_else_anything() -> None:
    with Cluster(WORKERS) as cluster:
        cluster.power_off("worker-1", silent=True)
        command = [*TOOL, "-H", cluster.hostfile(), "echo here; [ $(hostname) = worker-2 ] || sleep 60"]
        pipe = subprocess.PIPE
        process = cluster.popen("head", command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        assert {process.stdout.readline() for _ in range(2)} == {"worker-2: here\n", "worker-3: here\n"}
        cluster.cut("worker-3")  # in the middle of it
        _, err = process.communicate(timeout=30)
        assert process.returncode == 255
        assert err.splitlines()[-3:-1] == [
            "dslite_ssh: 2 of 3 hosts failed:",
            "  worker-1: exit status 255: ssh: connect to host worker-1 port 22: No route to host",
        ]
        assert err.splitlines()[-1].startswith("  worker-3: exit status 255: Timeout, server worker-3 not responding")


def alone(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([*TOOL, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_wrong_command_lines_and_no_ssh(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a\nb slots=2\n")
    for arguments, message in {
        (): "there is no command; write it last",
        ("-H", str(hosts), "--"): "there is no command",
        ("-H", "/none", "true"): "hostfile /none cannot be read",
        ("-H", str(hosts), "--timeout", "0", "true"): "0 is no time; write seconds",
        ("-H", str(hosts), "--at_once", "0", "true"): "0 hosts at a time would be none; write at least 1",
    }.items():
        done = alone(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    done = alone("-H", str(hosts), "--ssh", "no-such-ssh", "true")
    assert done.returncode == 255
    assert "  a: no-such-ssh cannot be run: No such file or directory; install openssh-client" in done.stderr


def test_no_more_than_so_many_run_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("".join(f"host-{i}\n" for i in range(12)))
    fake = tmp_path / "ssh"
    fake.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/run.$$; ls {tmp_path} | grep -c run.; sleep 0.2; rm {tmp_path}/run.$$\n"
    )
    fake.chmod(0o755)
    done = alone("-H", str(tmp_path / "hosts"), "--at_once", "3", "--ssh", str(fake), "true")
    counts = [int(line.split(": ")[1]) for line in done.stdout.splitlines()]
    assert len(counts) == 12 and max(counts) == 3
