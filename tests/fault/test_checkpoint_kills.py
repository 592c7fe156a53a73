"""A save that is killed, or fails, at each of its system calls; and ranks that die alone.

`faults.cpp` is preloaded into a process of its own, which saves over and over: first with its first call as the last,
then with its second, until a save gets through. Each time the newest checkpoint must load, exactly.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from models import tied_model
from pairwise import covering
from paths import BOOT, HELPERS, ROOT
from programs import program
from test_checkpoint_elastic import assert_same, config, engine_of, everything, train

from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tag import read_latest
from deepspeedlite.checkpoint.writer import TagWriter
from deepspeedlite.runtime.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
KILL, CRASH = -1, -2  # as in faults.cpp
STATES = ("exp_avg", "exp_avg_sq")


def in_a_process_of_its_own(call: str, **env: str) -> str:
    """What `call`, an expression with this module as `t`, prints; its failure is the test's."""
    code = f"{BOOT}import pathlib, test_checkpoint_kills as t; {call}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=480, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


# --- every system call --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> str:
    compiler = program("c++")
    if sys.platform != "linux":
        pytest.skip("preloading faults needs Linux")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = str(HELPERS / "faults.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


def _first(folder: Path) -> str:
    return "b"


def _next(folder: Path) -> str:
    shutil.copytree(folder.parent / "one", folder, dirs_exist_ok=True)
    return "b"


def _again(folder: Path) -> str:
    shutil.copytree(folder.parent / "one", folder, dirs_exist_ok=True)
    return "a"


def _again_after_a_kill(folder: Path) -> str:
    """An earlier release between the two renames that replaced a tag; and folders that do not say who left them."""
    shutil.copytree(folder.parent / "one", folder, dirs_exist_ok=True)
    (folder / "a").rename(folder / ".old.a")
    for name in UNKNOWN:
        (folder / name).mkdir()
        (folder / name / "rank_00000.safetensors").write_bytes(b"half")
    return "a"


def _again_beside_others(folder: Path) -> str:
    """Into a folder that has files of the user's."""
    shutil.copytree(folder.parent / "one", folder, dirs_exist_ok=True)
    for path in THEIRS:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(path)
    return "a"


UNKNOWN = (".old.b", ".tmp.a", ".tmp.b")
THEIRS = ("a/README.md", "a/exported/model.bin", "site/manifest.json")
SCENARIOS = (_first, _next, _again_after_a_kill, _again_beside_others)


class Attacker:
    """One engine that saves at step 2 after a checkpoint of step 1, another that loads what is left."""

    def __init__(self, folder: Path, **settings) -> None:
        self.folder = folder
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.faults_arm.argtypes = (ctypes.c_long, ctypes.c_int)
        self.is_direct = settings.get("format") == "deepspeed"  # whose checkpoints stay
        made = config(2, "bf16", checkpoint=settings if self.is_direct else {"keep_last": 1, **settings})
        self.engine, self.probe = engine_of(tied_model(), made), engine_of(tied_model(seed=1), config(1, "bf16"))
        self.expected = {}
        for step in (1, 2):
            train(self.engine, range(step, step + 1))
            self.expected[step] = everything(self.engine, STATES)
            if step == 1:
                self.save(folder / "one", "a")

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(folder, tag=tag)
        self.engine._checkpoints.wait()

    def attack(self, prepare, how: int) -> list[int]:
        """Save with a fault at each call in turn; the step that could be loaded after each (0: none)."""
        steps: list[int] = []
        through = False
        while not through:
            number = len(steps)
            work = self.folder / "work"
            work.mkdir()
            tag = prepare(work)
            through = (self.killed if how < 0 else self.failed)(work, tag, number, how)
            steps.append(self.load(work))
            self.save(work, "c")
            others = UNKNOWN if prepare is _again_after_a_kill else ()
            if self.is_direct:
                others = {tag for tag in ("a", "b") if (work / tag).exists()}
            if prepare is _again_beside_others:
                assert sorted(os.listdir(work / "a")) == ["README.md", "exported"], number
                assert [(work / path).read_text() for path in THEIRS] == [*THEIRS], number
                others = ("a", "site")
            assert sorted(os.listdir(work)) == sorted(["c", "latest", "zero_to_fp32.py", *others]), number
            shutil.rmtree(work)
        return steps

    def killed(self, work: Path, tag: str, number: int, how: int) -> bool:
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                self.library.faults_arm(number, how)
                self.save(work, tag)
                os._exit(0)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status == 0

    def failed(self, work: Path, tag: str, number: int, how: int) -> bool:
        self.library.faults_arm(number, how)
        try:
            self.save(work, tag)
        except CheckpointError as error:
            # (A leftover that cannot be removed is told in a warning, and stands in the way.)
            assert os.strerror(how) in str(error) or "File exists" in str(error), error
            return False
        finally:
            seen = self.library.faults_seen()
            self.library.faults_arm(-1, 0)
        assert self.load(work) == 2, "no error, and no checkpoint"
        return number >= seen

    def load(self, work: Path) -> int:
        if self.probe.load_checkpoint(work)[0] is None:
            return 0
        assert_same(everything(self.probe, STATES), self.expected[self.probe.global_steps])
        return self.probe.global_steps


def _attack_all(folder: Path, how: int, scenarios: list[str], **settings) -> None:
    attacker = Attacker(folder, **settings)
    for prepare in (globals()[name] for name in scenarios):
        steps = attacker.attack(prepare, how)
        assert set(steps) == {0 if prepare is _first else 1, 2}, (prepare.__name__, steps)
        assert how > 0 or steps == sorted(steps), (
            steps
        )  # old until some call, new from then on; an error may be survived
        assert len(steps) > 10, "the calls are not counted"
        print(prepare.__name__, len(steps), "calls, new from", steps.index(2))


HOW = {"kill": KILL, "crash": CRASH, "error": errno.EIO}
PAIRS = covering({"how": HOW, "use_async": (False, True), "scenario": [each.__name__ for each in SCENARIOS]}, 2, ())


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_the_newest_checkpoint_loads_whatever_call_of_a_save_is_the_last(tmp_path, faults, how, use_async):
    """Of `how`, `use_async` and scenarios every two meet."""
    scenarios = [scenario for *case, scenario in PAIRS if case == [how, use_async]]
    call = f"t._attack_all(pathlib.Path({str(tmp_path)!r}), {HOW[how]}, {scenarios}, async_save={use_async})"
    said = in_a_process_of_its_own(call, LD_PRELOAD=faults)
    print(said)
    assert said.count("calls, new from") == len(scenarios) > 0


@pytest.mark.parametrize(
    "how, scenarios", [("kill", ("_first", "_again")), ("crash", ("_next",)), ("error", ("_again",))]
)
def test_so_it_does_in_deepspeeds_layout(tmp_path, faults, how, scenarios):
    call = f"t._attack_all(pathlib.Path({str(tmp_path)!r}), {HOW[how]}, {scenarios}, format='deepspeed')"
    said = in_a_process_of_its_own(call, LD_PRELOAD=faults)
    print(said)
    assert said.count("calls, new from") == len(scenarios)


def _crash_without_fsync(folder: Path) -> None:
    attacker = Attacker(folder, fsync=False)
    for prepare in (_next, _again):
        for number in itertools.count():
            through = attacker.killed(folder / "work", prepare(folder / "work"), number, CRASH)
            try:
                attacker.load(folder / "work")
            except CheckpointError as error:
                print(error)
            shutil.rmtree(folder / "work")
            if through:
                break


def test_without_fsync_a_crash_of_the_machine_may_damage_a_checkpoint_and_is_noticed(tmp_path, faults):
    said = in_a_process_of_its_own(f"t._crash_without_fsync(pathlib.Path({str(tmp_path)!r}))", LD_PRELOAD=faults)
    assert "latest names no checkpoint" in said and "manifest.json is damaged" in said


# --- ranks that die alone -----------------------------------------------------------------------------------------

WORLD = 4


def _one_of_four(folder: Path, rank: int, victim: int, step: str, use_async: bool) -> None:
    """Save well, then with `victim` killed inside a step of its save; write down what the others are told, and when."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    engine = engine_of(tied_model(), config(2, checkpoint={"async_save": use_async}))
    train(engine, range(1))
    engine.save_checkpoint(folder / "ckpt")
    train(engine, range(1, 2))
    engine._checkpoints.wait()
    dist.barrier()
    if rank == victim:
        setattr(TagWriter, step, lambda *arguments, **more: os.kill(os.getpid(), signal.SIGKILL))
    started_s = time.monotonic()
    try:
        engine.save_checkpoint(folder / "ckpt")
        engine._checkpoints.wait()
    except CheckpointError as error:
        (folder / f"told{rank}").write_text(f"{time.monotonic() - started_s}\n{error}")
    while len(list(folder.glob("told*"))) < WORLD - 1:  # nobody hears of it because another has ended
        time.sleep(0.01)


def _four(folder: Path, victim: int, step: str, use_async: bool) -> None:
    import torch._dynamo  # (once, for all that are forked: an optimizer imports it)

    import deepspeedlite.factory  # noqa: F401

    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                _one_of_four(folder, rank, victim, step, use_async)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("victim, step", [(1, "write"), (0, "write"), (0, "commit"), (0, "prepare")])
@pytest.mark.parametrize("use_async", [False, True])
def test_all_hear_in_seconds_and_the_same_of_a_rank_that_died(tmp_path, victim, step, use_async):
    in_a_process_of_its_own(f"t._four(pathlib.Path({str(tmp_path)!r}), {victim}, {step!r}, {use_async})")
    told = [(tmp_path / f"told{rank}").read_text().split("\n", 1) for rank in range(WORLD) if rank != victim]
    assert {words for _, words in told} == {told[0][1]}
    assert f"rank {victim}: ended before it was done" in told[0][1]
    assert max(float(seconds) for seconds, _ in told) < 10
    with Reader(tmp_path / "ckpt" / "global_step1") as reader:
        reader.verify()
    assert read_latest(tmp_path / "ckpt") == "global_step1"


# --- failures that nobody waits for -------------------------------------------------------------------------------

SCRIPT = """
import os, sys, torch, deepspeedlite
model = torch.nn.Linear(64, 64)
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
          "checkpoint": {"async_save": True}}
engine = deepspeedlite.initialize(model=model, config=config)[0]
folder = sys.argv[1]
if sys.argv[2] == "fails":
    from deepspeedlite.checkpoint.writer import TagWriter
    def no_space(*arguments):
        raise OSError(28, os.strerror(28))
    TagWriter.commit = no_space
engine.save_checkpoint(folder)
print("the last line", end="")
"""


@pytest.mark.parametrize("ends, status", [("well", 0), ("fails", 1)])
def test_a_process_whose_last_save_failed_in_the_background_does_not_end_well(tmp_path, ends, status):
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ckpt"), ends]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == status, done.stderr
    assert done.stdout == "the last line"
    assert ("ends with status 1" in done.stderr and "No space left" in done.stderr) == (ends == "fails"), done.stderr
    assert read_latest(tmp_path / "ckpt") == (None if status else "global_step0")
