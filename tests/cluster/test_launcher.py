"""The launcher, by starting real processes: what ranks are given, how output arrives, how failures end.

Most scripts need no torch and end in milliseconds. Every test that kills something also checks that nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import hear_signals
from paths import ROOT

LAUNCHER = [sys.executable, "-m", "deepspeedlite.launcher"]
PLACE = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"]

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write a Python script, with what most of them need already imported."""

    def write(body: str, name: str = "train.py") -> Path:
        path = tmp_path / name
        path.write_text("import os, signal, subprocess, sys, time\n" + textwrap.dedent(body))
        return path

    return write


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without what would place a rank, and with `changes` (None removes)."""
    dropped = {*PLACE, "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DSL_LOG_LEVEL"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    changes = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **changes}
    kept.update({name: value for name, value in changes.items() if value is not None})
    return {name: value for name, value in kept.items() if changes.get(name, "") is not None}


def launch(*arguments: object, timeout: float = 30, cwd: Path | None = None, **env: str | None):
    """Run the launcher to its end."""
    return subprocess.run(
        [*LAUNCHER, *map(str, arguments)],
        capture_output=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def launched(*arguments: object, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher that runs on; ended with all it started when the test leaves."""
    process = subprocess.Popen(
        [*LAUNCHER, *map(str, arguments)],
        **{  # type: ignore[arg-type]
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": environment(),
            "preexec_fn": hear_signals,
            **settings,
        },
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate(timeout=10)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids_in(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in directory.glob("*.pid") if path.read_text()]


def assert_gone(pids: list[int], count: int) -> None:
    assert len(pids) == count
    wait_for(lambda: not any(map(is_alive, pids)), 3)


# What a rank is given


def test_each_rank_finds_its_place(script: Script) -> None:
    path = script(f"print([os.environ.get(n) for n in {PLACE}], os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])")
    done = launch("--num_gpus", 3, "--master_port", 0, path)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.decode().splitlines())
    for rank, line in enumerate(lines):
        assert line.startswith(f"[{rank}] {[str(rank), str(rank), '3', '3', '3', '0', '1']} 127.0.0.1 ")
    ports = {int(line.rsplit(" ", 1)[1]) for line in lines}
    assert len(lines) == 3 and len(ports) == 1 and ports.pop() > 1023
    assert b"starting 3 CPU ranks" in done.stderr and b"3 ranks ended well" in done.stderr


def test_arguments_pass_untouched(script: Script) -> None:
    path = script("print(sys.argv[1:])")
    words = ["--num_gpus", "9", "a b", "quote'\"$x", "--", "--local_rank=7", "", "-q", "naïve\n☃", "--help"]
    done = launch("--quiet", path, *words)
    assert done.stdout.decode() == f"{['--local_rank=0', *words]}\n"
    assert done.stderr == b""
    assert launch("--quiet", "--no_local_rank", "--", path, *words).stdout.decode() == f"{words}\n"


def test_module_runs_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("")
    (tmp_path / "pack/run.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    done = launch("--module", "pack.run", "x", cwd=tmp_path)
    assert done.stdout == b"__main__ pack ['--local_rank=0', 'x']\n"
    missing = launch("--module", "pack.walk", cwd=tmp_path)
    assert missing.returncode == 1 and b"No module named pack.walk" in missing.stderr


def test_no_python_runs_a_program(tmp_path: Path) -> None:
    program = tmp_path / "wrapper.sh"
    program.write_text('#!/bin/sh\necho "$RANK" "$@"\n')
    refused = launch("--no_python", program)
    assert refused.returncode == 2 and b"not executable" in refused.stderr and b"chmod +x" in refused.stderr
    program.chmod(0o755)
    done = launch("--no_python", "--num_gpus", 2, program, "a b")
    assert sorted(done.stdout.splitlines()) == [b"[0] 0 --local_rank=0 a b", b"[1] 1 --local_rank=1 a b"]
    assert launch("--no_python", "--no_local_rank", "echo", "hi").stdout == b"hi\n"


def test_a_program_that_cannot_be_executed_is_one_clear_line(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    done = launch("--no_python", "--num_gpus", 2, program)
    assert done.returncode == 2 and b"rank 0: cannot start" in done.stderr and b"Traceback" not in done.stderr


def test_gaps_are_filled_and_choices_kept(script: Script) -> None:
    path = script("print(os.environ['OMP_NUM_THREADS'], os.environ['PYTHONUNBUFFERED'], os.environ.get('ODD'))")
    cores = len(os.sched_getaffinity(0))
    done = launch("--num_gpus", 2, "--log_level", "debug", path, PYTHONUNBUFFERED=None, ODD="a b\n$c")
    assert f"[0] {max(1, cores // 2)} 1 a b\n[0] $c\n" in done.stdout.decode()
    assert b"OMP_NUM_THREADS=" in done.stderr
    done = launch("--log_level=debug", path, OMP_NUM_THREADS="7", PYTHONUNBUFFERED="x")
    assert done.stdout == b"7 x None\n" and b"OMP_NUM_THREADS=" not in done.stderr


def test_dry_run_starts_nothing_and_shows_only_what_is_set(script: Script, tmp_path: Path) -> None:
    path = script("open('started', 'w')")
    done = launch("--num_gpus", 2, "--dry_run", path, "a b", cwd=tmp_path, MY_TOKEN="hunter2")
    text = done.stdout.decode()
    assert done.returncode == 0 and not (tmp_path / "started").exists() and "hunter2" not in text
    shown = [line for line in text.splitlines() if line.startswith("RANK=")]
    assert len(shown) == 2 and "LOCAL_RANK=1" in shown[1] and f"{path} --local_rank=1 'a b'" in shown[1]
    subprocess.run(shown[1], shell=True, check=True, cwd=tmp_path)  # and it is a command that works
    assert (tmp_path / "started").exists()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_gpu", "2", "x.py"], "did you mean --num_gpus?"),
        (["--hostfile", "hosts", "x.py"], "hostfile hosts cannot be read"),
        (["-i", "worker-1", "x.py"], "there is no host 'worker-1'"),
        (["-i", "localhost:1-0", "x.py"], "'1-0' is no slot or range of slots"),
        (["-i", "localhost", "-e", "localhost", "x.py"], "exclude each other"),
        (["-i", "localhost:0", "--num_gpus", "1", "x.py"], "use one or the other"),
        (["--num_nodes", "2", "x.py"], "--num_nodes 2: there is this machine alone"),
        (["--bind_core_list", "0,0", "x.py"], "names a core twice"),
        (["--no_ssh", "x.py"], "--no_ssh needs --node_rank"),
        (["--force_multi", "--launcher", "rsh", "x.py"], "--launcher rsh: the launchers are"),
        (["--autotuning", "run", "x.py"], "--autotuning is not in this release"),
        (["--num_gpus", "0", "x.py"], "--num_gpus 0: at least one is needed"),
        (["--num_gpus", "two", "x.py"], "invalid int value: 'two'"),
        (["--master_port", "70000", "x.py"], "ports go from 1 to 65535"),
        (["--module", "--no_python", "x"], "exclude each other"),
        (["--num_gpus", "2"], "no script to start"),
        (["trian.py"], "does not exist"),
        (["--num_gpus"], "expected one argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = launch(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1 and done.stdout == b""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no_ssh", "--num_nodes", "2", "--node_rank", "0", "--master_addr", "x")])
def test_torchrun_around_the_launcher_is_refused(script: Script, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = script("open(os.environ['RANK'] + '.ran', 'w')")
    around = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*around, "-m", "deepspeedlite.launcher", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=60)
    assert done.returncode != 0 and not list(tmp_path.glob("*.ran"))
    assert "deepspeedlite: torchrun has started this launcher 2 times" in done.stderr
    assert "torchrun ... SCRIPT" in done.stderr and "deepspeedlite --num_gpus N SCRIPT" in done.stderr


@pytest.mark.slow
def test_one_machine_is_checked_without_ssh(script: Script, tmp_path: Path) -> None:
    """Nor does --force_multi go through it, whatever is installed."""
    for name in ("pdsh", "ssh"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    for path in (str(tmp_path), str(tmp_path / "none")):  # with both, and with none
        checked = launch("--check", script("print('ran')"), PATH=path)
        assert checked.returncode == 0 and b"the machine is ready" in checked.stderr, checked.stderr
        done = launch("--force_multi", script("print('ran')"), PATH=path)
        assert done.returncode == 0 and done.stdout == b"ran\n", done.stderr


@pytest.mark.slow
def test_two_parts_may_be_on_one_machine(script: Script, tmp_path: Path) -> None:
    """As somebody tries things out who has one machine: --no_ssh, by hand."""
    path = script(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(total := torch.ones(1))
        print("sum", total.item(), os.environ["CROSS_RANK"], os.environ["LOCAL_RANK"])
        dist.destroy_process_group()
        """
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = ["--no_ssh", "--num_nodes", "2", "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [*LAUNCHER, *map(str, places), "--node_rank", str(node), str(path)],
            env=environment(),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for node in range(2)
    ]
    outs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert "node-1: machine: is the one that node-0 is on; one command with --num_gpus is quicker" in outs[0][1]
    shown = [sorted(out.splitlines()) for out, _ in outs]
    assert shown == [[f"[node-{n}:{2 * n + rank}] sum 4.0 {n} {rank}" for rank in range(2)] for n in range(2)]


def test_a_misspelt_script_is_suggested(script: Script, tmp_path: Path) -> None:
    script("")
    assert b"did you mean train.py?" in launch("trian.py", cwd=tmp_path).stderr


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_busy_port_that_was_asked_for_is_refused(script: Script, busy_port: int) -> None:
    done = launch("--master_port", busy_port, script("print('started')"))
    assert done.returncode == 2 and done.stdout == b""
    assert f"--master_port {busy_port} is in use by another program" in done.stderr.decode()
    assert b"or 0 to have a free one picked" in done.stderr


def test_a_busy_usual_port_is_replaced(monkeypatch: pytest.MonkeyPatch, busy_port: int) -> None:
    from deepspeedlite.launcher import job

    monkeypatch.setattr(job, "DEFAULT_PORT", busy_port)
    port, note, _ = job.choose_port(None)
    assert port != busy_port and f"the usual port {busy_port} is in use" in note and str(port) in note
    assert job.choose_port(port)[:2] == (port, "")


def test_a_port_that_another_launch_has_chosen_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeedlite.launcher import job

    monkeypatch.setattr(job, "DEFAULT_PORT", job.choose_port(0).number)
    first, second = job.choose_port(None), job.choose_port(None)
    assert first.note == "" and second.number != first.number and "chosen by another launch" in second.note
    assert job.choose_port(first.number).number == first.number, "who asks for a port gets it"
    second.close()
    first.close()
    assert job.choose_port(None).number == first.number


@pytest.mark.slow
def test_launches_in_one_moment_do_not_meet(script: Script) -> None:
    """Each rank finds those of its own launch, though none was given a port."""
    path = script(
        """
        import torch
        from deepspeedlite import comm
        comm.init_distributed()
        mine = torch.tensor([float(sys.argv[-1])])
        comm.all_reduce(mine)
        assert mine.item() == 2 * float(sys.argv[-1]), mine
        """
    )
    command = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", "2", str(path)]
    started = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(4)
    ]
    said = [each.communicate(timeout=200)[0] for each in started]
    assert [each.returncode for each in started] == [0] * 4, "\n".join(said)


def test_a_picked_port_is_none_that_the_system_gives_to_others() -> None:
    """It is rank 0's only seconds later: one that any connection may get by then would be lost on a busy machine."""
    from deepspeedlite.launcher import job

    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    picked = {job.choose_port(0).number for _ in range(50)}
    assert len(picked) > 40 and (first_given <= 10_000 or max(picked) < first_given)


# Lean


def test_help_is_quick_and_launching_imports_no_torch(script: Script) -> None:
    def help_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = launch("--help")
        assert done.returncode == 0 and b"--num_gpus" in done.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times_s = [help_s() for _ in range(5)]  # of a processor, which other tests keep busy
    assert min(times_s) <= 0.15, times_s
    assert b"deepspeedlite " in launch("--version").stdout
    path = script("pass")
    code = f"""
        import sys
        from deepspeedlite.launcher.cli import main
        assert main(["--num_gpus", "2", "--quiet", {str(path)!r}]) == 0
        heavy = {{"torch", "pydantic", "rich", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# Failure


def test_the_first_failure_ends_the_others_and_is_blamed(script: Script) -> None:
    path = script(
        """
        if os.environ["RANK"] == "1":
            time.sleep(0.2)
            def fall():
                raise ValueError("the true cause")
            fall()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        """
    )
    started_s = time.monotonic()
    done = launch("--num_gpus", 3, path)
    text = done.stderr.decode()
    assert time.monotonic() - started_s < 5 and done.returncode == 1
    report = text[text.index("deepspeedlite: FAILED") :]
    assert "exit status 1" in report.splitlines()[0]
    assert re.search(r"^rank 1 failed first: exit code 1, 0\.\d+ s after the start$", report, re.MULTILINE)
    assert report.endswith("(the traceback is in its output, after [1]):\n    ValueError: the true cause\n")
    assert text.count("Traceback") == text.count("[1] ValueError: the true cause") == 1, "no traceback is shown twice"


def test_a_rank_that_ends_by_a_signal_gives_128_plus_it(script: Script) -> None:
    path = script(
        """
        if os.environ["RANK"] == "0":
            print("last words", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """
    )
    done = launch("--num_gpus", 2, path)
    assert done.returncode == 137
    text = done.stderr.decode()
    assert "rank 0 failed first: killed by SIGKILL" in text and "out of memory" in text
    assert text.endswith("its last lines on stderr:\n    last words\n")


@pytest.mark.slow
def test_a_rank_that_ends_well_before_others_is_named(script: Script) -> None:
    """Within seconds, once, and again if the others fail for it; not where all end at about the same time."""
    path = script(
        """
        if os.environ["RANK"] == "1":
            sys.exit(0)
        time.sleep(7 if "late" in sys.argv else 0.5)
        sys.exit(3 if "late" in sys.argv else 0)
        """
    )
    done = launch("--num_gpus", 3, path, "late")
    text = done.stderr.decode()
    said = r"rank 1 has ended with exit code 0, [\d.]+ s after the start, and ranks 0, 2 still run\n"
    assert done.returncode == 3 and len(re.findall(said, text)) == 1, text
    assert text.index("still run") < text.index("FAILED") and "ended before it, with exit code 0: rank 1\n" in text, (
        text
    )
    done = launch("--num_gpus", 3, path)
    assert done.returncode == 0 and "still run" not in done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "gone"), [("all_reduce(torch.ones(1 << 20))", 1), ("barrier()", 0), ("save_checkpoint()", 1)]
)
def test_ranks_that_wait_for_one_that_has_left_fail_soon(script: Script, call: str, gone: int) -> None:
    """Not after the ten minutes of the time limit, and with its number; also where it was the one with the store."""
    path = script(
        f"""
        import torch
        from deepspeedlite import comm
        from deepspeedlite.checkpoint.coordination import Ranks
        comm.init_distributed()
        comm.save_checkpoint = lambda ranks=Ranks(): ranks.meet("save_checkpoint")
        for step in range(3):
            if step == 2 and comm.get_rank() == {gone}:
                sys.exit(0)
            comm.{call}
        """
    )
    started_s = time.monotonic()
    done = launch("--num_gpus", 2, path, timeout=60)
    text = done.stderr.decode()
    assert done.returncode == 1 and time.monotonic() - started_s < 40, text
    said = rf"rank {gone} has ended|ranks \[{gone}\] did not call it \(of these, \[{gone}\] have ended\)"
    assert re.search(rf"(Distributed|Checkpoint)Error: [^$]*({said})", text) or gone == 0, text
    # Its sockets may be closed a while before its process has ended.
    soon = "the other 1 of 2 ranks were ended or had ended" if gone == 0 else "-"
    assert f"ended before it, with exit code 0: rank {gone}\n" in text or soon in text, text


@pytest.mark.slow
@pytest.mark.parametrize("slow_exit", [False, True])
def test_a_rank_that_lost_its_peer_is_not_blamed(script: Script, tmp_path: Path, slow_exit: bool) -> None:
    """Rank 1 fails; rank 0, blocked on a socket to it, dies of that, and may even exit first."""
    path = script(
        f"""
        import atexit, socket
        name = {str(tmp_path / "meet")!r}
        if os.environ["RANK"] == "0":
            server = socket.socket(socket.AF_UNIX)
            server.bind(name)
            server.listen()
            peer, _ = server.accept()
            if not peer.recv(1):
                raise RuntimeError("Connection closed by peer")
        peer = socket.socket(socket.AF_UNIX)
        while peer.connect_ex(name):
            time.sleep(0.01)
        def slowly():
            peer.close()
            time.sleep(0.5 * {slow_exit})
        atexit.register(slowly)
        raise KeyError("the true cause")
        """
    )
    for attempt in range(2):
        (tmp_path / "meet").unlink(missing_ok=True)
        done = launch("--num_gpus", 2, path)
        text = done.stderr.decode()
        assert "rank 1 failed first" in text, (attempt, text)
        assert text.endswith("KeyError: 'the true cause'\n") and done.returncode == 1


CHILDREN = """
def note(pid, kind):
    path = os.path.join({folder!r}, f"{{os.environ['RANK']}}-{{kind}}")
    with open(path + ".new", "w") as file:
        file.write(str(pid))
    os.rename(path + ".new", path + ".pid")
deaf = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15, 1)]; time.sleep(60)"
note(os.getpid(), "rank")
note(subprocess.Popen([sys.executable, "-c", deaf]).pid, "child")
note(subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True).pid, "own-session")
"""


@pytest.mark.slow
def test_children_of_failed_ranks_are_ended(script: Script, tmp_path: Path) -> None:
    path = script(CHILDREN.format(folder=str(tmp_path)) + "time.sleep(0.1)\nsys.exit(3)")
    started_s = time.monotonic()
    done = launch("--num_gpus", 2, path)
    assert done.returncode == 3 and time.monotonic() - started_s < 5
    pids = pids_in(tmp_path)
    assert len(pids) >= 3 and not any(map(is_alive, pids))


def test_what_ranks_left_behind_is_ended_after_a_good_end(script: Script, tmp_path: Path) -> None:
    body = f"""
        child = subprocess.Popen(["sleep", "60"])
        with open({str(tmp_path / "child.pid")!r}, "w") as file:
            file.write(str(child.pid))
        print("done")
        """
    started_s = time.monotonic()
    done = launch(script(body))
    assert done.returncode == 0 and done.stdout == b"done\n" and time.monotonic() - started_s < 5
    assert b"1 processes that ranks left behind were ended" in done.stderr
    assert_gone(pids_in(tmp_path), 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_all_ranks_and_ends_everything(
    script: Script, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    body = """
        def heard(number, frame):
            print("heard", number, flush=True)
            sys.exit(0)
        for number in (1, 2, 15):
            signal.signal(number, heard)
        note(os.getpid(), "ready")
        time.sleep(60)
        """
    path = script(CHILDREN.format(folder=str(tmp_path)) + textwrap.dedent(body))
    with launched("--num_gpus", 2, path) as process:
        wait_for(lambda: len(pids_in(tmp_path)) == 8)
        process.send_signal(number)
        for _ in range(30):  # impatience: do not wait out the grace of the deaf children
            time.sleep(0.3)
            if process.poll() is not None:
                break
            process.send_signal(number)
        out, err = process.communicate(timeout=5)
    assert process.returncode == status
    assert sorted(out.splitlines()) == [f"[{rank}] heard {number:d}".encode() for rank in range(2)]
    assert re.search(rb"2 ranks ended after \d\.", err)
    assert err.rstrip().endswith(number.name.encode())
    assert_gone(pids_in(tmp_path), 8)


@pytest.mark.slow
def test_deaf_ranks_are_killed_after_ctrl_c(script: Script, tmp_path: Path) -> None:
    path = script(CHILDREN.format(folder=str(tmp_path)) + "exec(deaf)")
    with launched("--num_gpus", 2, path) as process:
        wait_for(lambda: len(pids_in(tmp_path)) == 6)
        time.sleep(0.3)
        started_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130 and 4 < time.monotonic() - started_s < 7
    assert_gone(pids_in(tmp_path), 6)


def test_nohup_is_respected(script: Script, tmp_path: Path) -> None:
    path = script(f"open({str(tmp_path / 'up')!r}, 'w'); time.sleep(0.7)")
    with launched(path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        wait_for((tmp_path / "up").exists)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=5)
    assert process.returncode == 0


def test_ranks_die_with_a_launcher_that_is_killed(script: Script, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper.sh"  # so that the python is not the launcher's child
    wrapper.write_text(f"#!/bin/sh\n{sys.executable} {tmp_path}/train.py\ntrue\n")
    wrapper.chmod(0o755)
    body = CHILDREN.format(folder=str(tmp_path)).replace(", start_new_session=True", "")
    script(body + "exec(deaf)")
    with launched("--num_gpus", 2, "--no_python", wrapper) as process:
        wait_for(lambda: len(pids_in(tmp_path)) == 6)
        process.kill()
        process.wait(timeout=5)
        assert_gone(pids_in(tmp_path), 6)


def test_ranks_die_even_when_the_guardian_was_killed_first(script: Script, tmp_path: Path) -> None:
    path = script(f"open({str(tmp_path / 'rank.pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with launched(path) as process:
        wait_for(lambda: len(pids_in(tmp_path)) == 1)
        stats = [stat.read_text() for stat in Path("/proc").glob("[0-9]*/stat") if is_alive(int(stat.parent.name))]
        children = {int(text.split()[0]) for text in stats if text.rpartition(")")[2].split()[1] == str(process.pid)}
        (watchdog,) = children - set(pids_in(tmp_path))
        os.kill(watchdog, signal.SIGKILL)
        process.kill()
        process.wait(timeout=5)
        assert_gone(pids_in(tmp_path), 1)


def test_a_closed_reader_ends_the_job(script: Script, tmp_path: Path) -> None:
    path = script(
        f"""
        open({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".pid", "w").write(str(os.getpid()))
        while True:
            print("line")
            time.sleep(0.01)
        """
    )
    with launched("--num_gpus", 2, path) as process:
        assert process.stdout is not None
        wait_for(lambda: len(pids_in(tmp_path)) == 2)
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        assert process.wait(timeout=8) == 141
    assert_gone(pids_in(tmp_path), 2)


@pytest.mark.slow
def test_a_reader_that_has_stopped_keeps_nobody_from_ending(script: Script, tmp_path: Path) -> None:
    """Ranks end with the first failure though a pager is full; a signal gives up what it has not taken, no other."""
    path = script(
        f"""
        open({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".pid", "w").write(str(os.getpid()))
        if os.environ["RANK"] == "0":
            for _ in range(100_000):
                os.write(1, b"x" * 1000)
        time.sleep(1)
        sys.exit(5)
        """
    )
    with launched("--num_gpus", 2, path) as process:
        wait_for(lambda: len(pids_in(tmp_path)) == 2)
        wait_for(lambda: not any(map(is_alive, pids_in(tmp_path))))
        time.sleep(0.5)
        assert process.poll() is None, "it waits for its reader"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 5
        assert process.stderr is not None
        assert b"rank 1 failed first: exit code 5" in process.stderr.read()


# Output


def test_lines_of_four_busy_ranks_stay_whole(script: Script) -> None:
    path = script(
        """
        rank = os.environ["RANK"]
        for number in range(3000):
            text = f"{number} " + rank * (number % 211) + " end\\n"
            cut = number % 7
            os.write(1, text[:cut].encode())
            os.write(1, text[cut:].encode())
        """
    )
    done = launch("--num_gpus", 4, path)
    assert done.returncode == 0
    seen: dict[str, list[str]] = {str(rank): [] for rank in range(4)}
    for line in done.stdout.decode().splitlines():
        match = re.fullmatch(r"\[(\d)\] (.*)", line)
        assert match, line
        seen[match[1]].append(match[2])
    for rank, lines in seen.items():
        assert lines == [f"{number} {rank * (number % 211)} end" for number in range(3000)]


def test_bytes_that_are_no_text_survive_and_streams_stay_apart(script: Script) -> None:
    path = script("os.write(1, b'\\xff\\xfe out\\nlast'); os.write(2, b'\\x80 err\\n')")
    done = launch("--num_gpus", 2, "--quiet", path)
    assert sorted(done.stdout.splitlines()) == sorted(
        [b"[0] \xff\xfe out", b"[0] last", b"[1] \xff\xfe out", b"[1] last"]
    )
    assert sorted(done.stderr.splitlines()) == [b"[0] \x80 err", b"[1] \x80 err"]
    lone = launch("--quiet", path)
    assert lone.stdout == b"\xff\xfe out\nlast" and lone.stderr == b"\x80 err\n"


def test_progress_of_rank_0_is_forwarded_as_it_happens(script: Script) -> None:
    path = script(
        """
        for percent in (25, 50, 75, 100):
            os.write(1, b"%d%%\\r" % percent)
            time.sleep(0.25)
        os.write(1, b"\\ndone\\n")
        """
    )
    with launched("--num_gpus", 2, "--quiet", path) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1000)
        assert first == b"[0] 25%\r"
        rest, _ = process.communicate(timeout=10)
    assert b"[0] 50%\r[0] 75%\r" in rest
    assert b"[1] 100%\n[1] done\n" in rest and b"[1] 25%" not in rest  # other ranks: the last state of a line


def test_a_terminal_shows_rank_0_live_and_other_ranks_above_it(script: Script) -> None:
    path = script(
        """
        if os.environ["RANK"] == "1":
            time.sleep(0.4)
            print("news")
            sys.exit(0)
        size = os.get_terminal_size()
        print(sys.stdout.isatty(), sys.stderr.isatty(), size.columns)
        os.write(2, b"\\r 10%")
        time.sleep(0.8)
        os.write(2, b"\\r 20%\\n")
        """
    )
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "90"], stdin=theirs, check=True)
    plain = environment(NO_COLOR="1")
    with launched("--num_gpus", 2, "--quiet", path, stdin=theirs, stdout=theirs, stderr=theirs, env=plain):
        os.close(theirs)
        shown = everything_from(ours)
    assert shown.startswith(b"[0] True True 86\r\n\r[0]  10%")
    assert b"\r\x1b[2K[1] news\r\n[0]  10%" in shown and shown.endswith(b"\r[0]  20%\r\n")


def everything_from(terminal: int) -> bytes:
    """What is shown until everyone has closed it."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: everyone has
        while select.select([terminal], [], [], 10)[0]:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    return shown


def test_prefixes_have_colours_on_a_terminal_alone(script: Script) -> None:
    path = script("print('text')")
    ours, theirs = pty.openpty()
    with launched("--num_gpus", 2, "--quiet", path, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = everything_from(ours)
    colours = re.findall(rb"\x1b\[(3[1-6])m\[[01]\]\x1b\[0m text\r\n", shown)
    assert len(set(colours)) == 2, shown
    assert b"\x1b" not in launch("--num_gpus", 2, path).stdout


def test_each_rank_has_its_log(script: Script, tmp_path: Path) -> None:
    path = script(
        f"""
        rank, said = os.environ["RANK"], {str(tmp_path / "said")!r}
        print("out", rank, flush=True), print("err", file=sys.stderr, flush=True)
        if rank == "0":
            open(said, "w").close()
        while not os.path.exists(said):  # the failure ends the other, which is to have said its words before
            time.sleep(0.01)
        sys.exit(int(rank))
        """
    )
    done = launch("--num_gpus", 2, "--enable_each_rank_log", tmp_path / "a/b", path)
    logs = sorted((tmp_path / "a/b").iterdir())
    assert [re.sub(r"^\d{14}_", "", log.name) for log in logs] == ["rank0.log", "rank1.log"]
    for rank, log in enumerate(logs):
        assert sorted(log.read_text().splitlines()) == ["err", f"out {rank}"]
    assert f"its log: {logs[1]}" in done.stderr.decode() and b"[1] out 1" in done.stdout
    (tmp_path / "file").touch()
    refused = launch("--enable_each_rank_log", tmp_path / "file", path)
    assert refused.returncode == 2 and b"cannot make files there" in refused.stderr


# With torch


@pytest.mark.slow
def test_two_ranks_reduce_over_gloo(script: Script) -> None:
    pytest.importorskip("torch")
    path = script(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.full((3,), float(dist.get_rank() + 1))
        dist.all_reduce(value)
        print(value.tolist())
        dist.destroy_process_group()
        """
    )
    done = launch("--num_gpus", 2, "--master_port", 0, path, timeout=120, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(done.stdout.splitlines()) == [b"[0] [3.0, 3.0, 3.0]", b"[1] [3.0, 3.0, 3.0]"]


@pytest.mark.slow
def test_nothing_of_a_job_on_one_machine_listens_beyond_it(script: Script) -> None:
    """Neither the store nor gloo, which would ask for the machine's own name."""
    path = script(
        """
        import deepspeedlite, psutil, torch, torch.distributed as dist
        deepspeedlite.init_distributed(verbose=False)
        dist.all_reduce(torch.ones(1))
        found = psutil.Process().net_connections("tcp")
        print({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN})
        dist.destroy_process_group()
        """
    )
    done = launch("--num_gpus", 2, "--master_port", 0, path, timeout=120, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=None)
    assert sorted(done.stdout.splitlines()) == [b"[0] {'127.0.0.1'}", b"[1] {'127.0.0.1'}"], done.stderr


@pytest.mark.slow
def test_a_rank_that_raises_between_collectives_is_blamed(script: Script) -> None:
    pytest.importorskip("torch")
    path = script(
        """
        import torch, torch.distributed as dist
        from deepspeedlite import comm
        comm.init_distributed(verbose=False)
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            raise ValueError("the true cause")
        dist.all_reduce(torch.ones(1))
        """
    )
    done = launch("--num_gpus", 3, "--master_port", 0, path, timeout=120, OMP_NUM_THREADS="1")
    text = done.stderr.decode()
    assert done.returncode == 1 and "rank 1 failed first" in text, text
    assert "ValueError: the true cause" in text[text.index("deepspeedlite: FAILED") :]


# More of one machine


@pytest.mark.slow
def test_64_ranks_start_and_end(script: Script) -> None:
    done = launch("--num_gpus", 64, script("print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"), timeout=120)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.decode().split("\n")[:-1], key=lambda line: int(line.split()[1]))
    assert lines == [f"[{rank}] {rank} of 64" for rank in range(64)]


@pytest.mark.slow
def test_64_ranks_end_with_the_first_failure(script: Script, tmp_path: Path) -> None:
    body = "rank = int(os.environ['RANK'])\nopen(sys.argv[-1] + f'/{os.getpid()}.pid', 'w').close()\n"
    path = script(body + "time.sleep(0 if rank == 37 else 600)\nsys.exit(9)")
    done = launch("--num_gpus", 64, path, tmp_path, timeout=120)
    assert done.returncode == 9 and b"rank 37 failed first: exit code 9" in done.stderr
    pids = [int(found.stem) for found in tmp_path.glob("*.pid")]
    assert len(pids) > 1
    assert_gone(pids, len(pids))


def test_slots_are_named_without_a_hostfile(script: Script) -> None:
    done = launch("--include", "localhost:0-2", script("print(os.environ['WORLD_SIZE'])"))
    assert done.returncode == 0 and sorted(done.stdout.split()[1::2]) == [b"3"] * 3


def test_ranks_have_cores_of_their_own(script: Script) -> None:
    cores = sorted(os.sched_getaffinity(0))
    path = script("print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])")
    done = launch("--num_gpus", len(cores), "--bind_cores_to_rank", "--no_local_rank", path)
    assert sorted(done.stdout.decode().split("\n")[:-1]) == [f"[{n}] [{core}] 1" for n, core in enumerate(cores)]


def test_a_failed_training_starts_again_as_often_as_allowed(script: Script, tmp_path: Path) -> None:
    body = """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    print("attempt", count, flush=True)
    sys.exit(0 if count == sys.argv[1] else 7)
    """
    path = script(body)
    well = launch("--max_restarts", 3, "--no_local_rank", path, "2")
    assert well.returncode == 0 and well.stdout.split(b"\n")[:-1] == [b"attempt 0", b"attempt 1", b"attempt 2"]
    assert b"restart 2 of at most 3" in well.stderr
    badly = launch("--max_restarts", 1, "--no_local_rank", path, "2")
    assert badly.returncode == 7 and badly.stdout.count(b"attempt") == 2


def test_a_variables_file_and_a_venv_script_count_on_one_machine_too(script: Script, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("DSLT_A= x 'y\n")
    (tmp_path / "activate").write_text(f"export DSLT_B=$DSLT_A.b PATH={Path(sys.executable).parent}:$PATH\n")
    path = script("print([os.environ['DSLT_A'], os.environ['DSLT_B']])")
    done = launch("--venv_script", "activate", path, cwd=tmp_path, DSLT_A="a")
    assert done.stdout == b"""["x 'y", "x 'y.b"]\n""", done.stderr
    failed = launch("--venv_script", "nowhere", path, cwd=tmp_path)
    assert failed.returncode == 2 and b"--venv_script nowhere cannot be sourced" in failed.stderr
    (tmp_path / ".deepspeed_env").write_text("A=1\nnot a name=2\n")
    refused = launch(path, cwd=tmp_path)
    assert refused.returncode == 2 and b".deepspeed_env, line 2: 'not a name' is no variable's name" in refused.stderr


def test_the_launchers_pid_is_saved_while_it_runs(script: Script) -> None:
    path = script("print(open(f'/tmp/{os.getppid()}.ds').read() == str(os.getppid()), os.getppid())")
    word, pid = launch("--save_pid", path).stdout.split()
    assert word == b"True" and not os.path.exists(f"/tmp/{pid.decode()}.ds")
