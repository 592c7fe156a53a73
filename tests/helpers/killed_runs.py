"""Trainings of two ranks under the launcher, of which one rank is killed while they save: whom does the launcher blame?

    python killed_runs.py FOLDER RUNS SEED     prints a line for each run: victim, status, blamed, what was wrong

Launchers and ranks are forked from this process, which has imported torch: a run takes a second, not ten. They are real
processes, with signals, sockets and exit statuses of their own.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = """
import os, sys, torch, deepspeedlite
import torch.distributed as dist
torch.set_num_threads(1)
folder, stage, background, loads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4] == "1"
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
config = {
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": stage},
    "checkpoint": {"async_save": background, "fsync": False},
}
engine, *_ = deepspeedlite.initialize(model=model, config=config)
for step in range(100_000):
    engine.backward(engine(torch.randn(1, 64)).square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag=f"t{step % 2}")
    if loads:
        engine.load_checkpoint(folder)
    if step == 1:
        with open(f"{folder}/{dist.get_rank()}.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"{folder}/{dist.get_rank()}.new", f"{folder}/{dist.get_rank()}.pid")
"""


class ForkedPopen:
    """What the agent needs of subprocess.Popen, for a Python script."""

    def __init__(self, argv: Any, **how: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            how["preexec_fn"]()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, how["stdout"]), (2, how["stderr"])):
                os.dup2(source, target)
            os.closerange(3, 256)  # others' ends of pipes
            os.environ.clear()
            os.environ.update(how["env"])
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            sys.argv[:] = [word for word in argv[1:] if not word.startswith("--local_rank")]
            runpy.run_path(argv[1], run_name="__main__")
            code = 0
        except BaseException as error:
            sys.last_value = error
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            atexit._run_exitfuncs()
            os._exit(code)


def launch(folder: Path, script: Path, *arguments: object) -> int:
    """A launcher in a process of its own, whose output goes to `folder/said`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        file = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from deepspeedlite.launcher import agent, cli

        agent.subprocess.Popen = ForkedPopen  # type: ignore[misc, assignment]
        options = ("--num_gpus", "2", "--master_port", "0", "--enable_each_rank_log", str(folder / "logs"))
        status = cli.main([*options, str(script), *map(str, arguments)])
    finally:
        os._exit(status)


def one_run(folder: Path, script: Path, victim: int, rnd: random.Random) -> tuple[int, str, str]:
    """The launcher's status, whom it blamed, and all that it said."""
    folder.mkdir()
    stage, background, loads = rnd.choice((1, 3)), rnd.randrange(2), rnd.randrange(2)
    pid = launch(folder, script, folder, stage, background, loads)
    late_at = time.monotonic() + 120
    while not all((folder / f"{rank}.pid").exists() for rank in range(2)):
        assert time.monotonic() < late_at and not os.waitpid(pid, os.WNOHANG)[0], (folder / "said").read_text()
        time.sleep(0.01)
    time.sleep(rnd.random() * 0.3)
    os.kill(int((folder / f"{victim}.pid").read_text()), signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = (folder / "said").read_text(errors="replace")
    blamed = re.search(r"rank (\d) failed first", said)
    return status, blamed[1] if blamed else "nobody", said


def main(folder: Path, runs: int, seed: int) -> None:
    """Every other run kills rank 0."""
    import torch  # noqa: F401 - once, for all that are forked

    import deepspeedlite
    import deepspeedlite.checkpoint.load
    import deepspeedlite.checkpoint.save
    import deepspeedlite.factory

    assert deepspeedlite.initialize
    os.environ["OMP_NUM_THREADS"] = "1"
    rnd, script = random.Random(seed), folder / "script.py"
    script.write_text(SCRIPT)
    for run in range(runs):
        status, blamed, said = one_run(folder / str(run), script, run % 2, rnd)
        noise = said.count("[c10d]") + said.count("frame #")
        print(run % 2, status, blamed, noise, flush=True)
        if blamed != str(run % 2):
            print(said, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
