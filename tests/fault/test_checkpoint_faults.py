"""What can go wrong with a checkpoint: kills, full disks, I/O errors, damage. The last whole one always loads."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model
from paths import BOOT, ROOT
from programs import program
from test_checkpoint_elastic import assert_same, config, engine_of, everything, train

from deepspeedlite.checkpoint import coordination
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.tag import read_latest
from deepspeedlite.comm.desync import explained
from deepspeedlite.runtime.errors import CheckpointError, DistributedError, EngineStateError

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

FORMAT = ROOT / "docs" / "checkpoint-format.md"


def save_two(folder: Path, **more):
    engine = engine_of(tied_model(), config(2, "bf16", **more))
    train(engine, range(2))
    engine.save_checkpoint(folder)
    return engine


# --- kills --------------------------------------------------------------------------------------------------------

KILLS = 16  # per parametrization: 32 in all; test_checkpoint_kills.py goes through the system calls one by one


def _train_forever(folder: Path, rank: int, round_: int, use_async: bool, reference: list[float]) -> None:
    """One rank of a training that saves after every step, from wherever the last whole checkpoint is."""
    store = dist.FileStore(str(folder / f"store{round_}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    settings = config(2, checkpoint={"async_save": use_async, "keep_last": 2, "fsync": False})
    engine = engine_of(tied_model(), settings)
    engine.load_checkpoint(folder / "ckpt")
    while True:
        step = engine.global_steps
        losses = train(engine, range(step, step + 1))
        if losses[0] != reference[step]:
            (folder / "wrong").write_text(f"step {step}: {losses[0]} is not {reference[step]}")
        engine.save_checkpoint(folder / "ckpt")
        if (folder / "ckpt" / "latest").exists():  # a first save in the background may be under way
            (folder / f"ready{round_}.{rank}").touch()


def _fork(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1), os.dup2(devnull, 2)
            _train_forever(*arguments)
        finally:
            os._exit(1)
    return pid


def _zygote(folder: Path, use_async: bool) -> None:
    """Runs in a fresh process that has torch imported and no threads: forks the ranks, kills them, checks."""
    import deepspeedlite.factory  # noqa: F401  (once, for all that are forked)
    from deepspeedlite.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(4))])
    rng = random.Random(int(use_async))
    both = json.loads((folder / "reference").read_text())
    newest = 0
    for round_ in range(KILLS):
        pids = [_fork(folder, rank, round_, use_async, both[str(rank)]) for rank in range(2)]
        deadline = time.monotonic() + 60
        while not (folder / f"ready{round_}.0").exists():
            assert time.monotonic() < deadline, "no save in a minute"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.06)
        victims = pids if round_ % 2 else [rng.choice(pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01 * rng.random())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not (folder / "wrong").exists(), (folder / "wrong").read_text()
        tag = read_latest(folder / "ckpt")
        with Reader(folder / "ckpt" / str(tag)) as reader:
            reader.verify()
            steps = reader.manifest.global_steps
        assert steps >= newest, f"went back from step {newest} to {steps}"
        newest = steps
        if newest > len(both["0"]) - 60:  # begin anew
            shutil.rmtree(folder / "ckpt")
            newest = 0
    print("killed", KILLS, "times; at step", newest)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("use_async", [False, True])
def test_a_training_killed_at_random_instants_goes_on_from_its_last_checkpoint(tmp_path, reference, use_async):
    shutil.copy(reference, tmp_path)
    code = f"{BOOT}import pathlib, test_checkpoint_faults as t; t._zygote(pathlib.Path({str(tmp_path)!r}), {use_async})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"killed {KILLS} times" in done.stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The losses of 400 steps without any kill, by rank."""
    folder = tmp_path_factory.mktemp("reference")
    code = f"{BOOT}import pathlib, test_checkpoint_faults as t; t._reference_run(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder / "reference"


def _reference_run(folder: Path) -> None:

    import deepspeedlite.factory  # noqa: F401

    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            dist.init_process_group("gloo", store=dist.FileStore(str(folder / "s"), 2), rank=rank, world_size=2)
            losses = train(engine_of(tied_model(), config(2)), range(400))
            (folder / f"losses{rank}").write_text(json.dumps(losses))
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    both = {str(rank): json.loads((folder / f"losses{rank}").read_text()) for rank in range(2)}
    (folder / "reference").write_text(json.dumps(both))


# --- failing writes -----------------------------------------------------------------------------------------------


def raised(action) -> str:
    with pytest.raises(CheckpointError) as told:
        action()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, str(told.value))
    assert len(set(everyone)) == 1, everyone
    return everyone[0]


@pytest.mark.parametrize("use_async", [False, True])
@distributed(world_size=2)
def test_an_io_error_in_the_middle_fails_on_every_rank_and_loses_nothing(tmp_path, use_async):
    engine = save_two(tmp_path, checkpoint={"async_save": use_async})
    expected = everything(engine, ("exp_avg",))
    train(engine, range(2, 3))
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def save():
        engine.save_checkpoint(tmp_path, tag="second")
        engine._checkpoints.wait()

    message = raised(save)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "rank 1: OSError" in message and "too large" in message
    engine.load_checkpoint(tmp_path)
    assert_same(everything(engine, ("exp_avg",)), expected)
    engine.save_checkpoint(tmp_path, tag="second")
    engine.destroy()
    if dist.get_rank() == 0:
        assert read_latest(tmp_path) == "second"
        assert sorted(os.listdir(tmp_path)) == ["global_step2", "latest", "second", "zero_to_fp32.py"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    program("mount")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@distributed(world_size=2)
def test_a_full_disk_and_a_read_only_one(small_disk):
    engine = save_two(small_disk)
    expected = everything(engine, ("exp_avg",))
    if dist.get_rank() == 0:
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(b"x" * (free - 60_000))
    dist.barrier()
    assert "No space left" in raised(lambda: engine.save_checkpoint(small_disk, tag="second"))
    if dist.get_rank() == 0:
        assert sorted(os.listdir(small_disk)) == ["filler", "global_step2", "latest", "zero_to_fp32.py"]
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    dist.barrier()
    assert "Read-only file system" in raised(lambda: engine.save_checkpoint(small_disk, tag="second"))
    engine.load_checkpoint(small_disk)
    assert_same(everything(engine, ("exp_avg",)), expected)


@distributed(world_size=2, env={"DEEPSPEED_TIMEOUT": "0.02"})
def test_a_call_by_one_rank_alone_is_an_error_that_says_so(tmp_path):
    engine = engine_of(tied_model(), config(1))
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        coordination._NOTICE_S = 0.2
        with (
            redirect_stderr(StringIO()) as said,
            pytest.raises(CheckpointError, match=r"must be called by every rank, and ranks \[1\]"),
        ):
            engine.save_checkpoint(tmp_path)
        assert "save_checkpoint waits for rank 1, up to 1 s more" in said.getvalue()
        store.set("raised", "")
    else:
        store.wait(["raised"])
        with pytest.raises(DistributedError, match="rank 0 waits in save_checkpoint"), explained("a sum", [0, 1]):
            raise RuntimeError("what a collective that rank 0 does not call ends in")
    store.set(f"here{dist.get_rank()}", "")
    store.wait(["here0", "here1"])
    engine.save_checkpoint(tmp_path)
    assert engine.load_checkpoint(tmp_path)[0]


@distributed(world_size=2)
def test_ranks_that_call_different_things(tmp_path):
    engine = engine_of(tied_model(), config(1))
    call = (engine.save_checkpoint, engine.load_checkpoint)[dist.get_rank()]
    assert "the ranks call different things: save_checkpoint, load_checkpoint" in raised(lambda: call(tmp_path))
    assert not os.listdir(tmp_path)
    engine.save_checkpoint(tmp_path)


@distributed(world_size=2)
def test_tags_and_values_that_cannot_be_saved(tmp_path):
    engine = engine_of(tied_model(), config(1, checkpoint={"tag_validation": "fail"}))
    assert "rank 1: 'b'" in raised(lambda: engine.save_checkpoint(tmp_path, tag="ab"[dist.get_rank()]))
    assert "cannot be a directory's name" in raised(lambda: engine.save_checkpoint(tmp_path, tag="../b"))
    message = raised(lambda: engine.save_checkpoint(tmp_path, client_state={"a": {"b": [1, object()]}}))
    assert "client_state['a']['b'][1] is a builtins.object" in message
    assert not os.listdir(tmp_path)


@distributed(world_size=2)
def test_different_tags_are_told_or_not_and_rank_0s_is_taken(tmp_path):
    for validation, warnings in (("warn", 1), ("ignore", 0)):
        engine = engine_of(tied_model(), config(1, checkpoint={"tag_validation": validation}))
        with redirect_stderr(StringIO()) as said:
            engine.save_checkpoint(tmp_path / validation, tag=f"rank{dist.get_rank()}")
        expected = warnings if dist.get_rank() == 0 else 0
        assert said.getvalue().count("rank 0: 'rank0', rank 1: 'rank1'") == expected, said.getvalue()
        assert read_latest(tmp_path / validation) == "rank0"
        with Reader(tmp_path / validation / "rank0") as reader:
            assert len(reader.manifest.files) == 2


def _save_as_nobody(folder: Path) -> None:
    os.umask(0o022)
    engine = engine_of(tied_model(), config(1))
    engine.save_checkpoint(folder, tag="mine")
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        engine.save_checkpoint(folder, tag="other")
    except CheckpointError as error:
        print(error)
    assert engine.load_checkpoint(folder)[0]


def test_a_folder_that_may_not_be_written(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders, and perhaps TMPDIR, are root's alone
        if os.geteuid() == 0 and Path("/tmp") in folder.parents:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = (
        f"{BOOT}import pathlib, test_checkpoint_faults as t; "
        f"t._save_as_nobody(pathlib.Path({str(tmp_path / 'ckpt')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "saving checkpoint other" in done.stdout and "PermissionError" in done.stdout and ".tmp.other" in done.stdout
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["latest", "mine", "zero_to_fp32.py"]


@distributed(world_size=2)
def test_keep_last_removes_the_oldest_and_a_tag_can_be_written_again(tmp_path):
    model = tied_model()
    model.register_buffer("nothing", torch.empty(0, 3))
    engine = engine_of(model, config(3, checkpoint={"keep_last": 2, "async_save": True}))
    for tag in (1, 2, 3, 3):
        train(engine, range(1))
        engine.save_checkpoint(tmp_path, tag=tag)
    engine.destroy()
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "latest", "zero_to_fp32.py"]
    with Reader(tmp_path / "3") as reader:
        reader.verify()
        assert reader.manifest.global_steps == 4
    with pytest.raises(EngineStateError):
        engine.save_checkpoint(tmp_path)


# --- damage -------------------------------------------------------------------------------------------------------


@distributed(world_size=2)
def test_damage_is_found_before_anything_changes(tmp_path):
    engine = save_two(tmp_path)
    expected = everything(engine, ("exp_avg",))
    good, bad = tmp_path / "global_step2", tmp_path / "bad"
    manifest = (good / "manifest.json").read_bytes()

    def rewritten(change):
        body = json.loads(manifest)
        del body["crc32"]
        change(body)
        rest = json.dumps(body)[1:].encode()
        (bad / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(rest) + rest)

    def flip(name):
        data = bytearray((bad / name).read_bytes())
        data[len(data) * 2 // 3] ^= 4
        (bad / name).write_bytes(data)

    def outside(body):
        body["files"]["../global_step2/rank_00000.safetensors"] = body["files"]["rank_00000.safetensors"]

    def absurd(body):
        body["parameters"][0]["shape"] = [1 << 60]

    def absurd_pieces(body):
        absurd(body)
        pieces = body["parameters"][0]["pieces"]
        for kind in pieces:
            pieces[kind] = [[pieces[kind][0][0], pieces[kind][0][1], 0, 0, 1 << 60]]

    def absurd_header():
        data = (bad / "rank_00001.safetensors").read_bytes()
        (bad / "rank_00001.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + data[8:])

    damages = {
        "flipped manifest": (lambda: flip("manifest.json"), "altered"),
        "flipped rank 0": (lambda: flip("rank_00000.safetensors"), "checksum does not match"),
        "flipped rank 1": (lambda: flip("rank_00001.safetensors"), "checksum does not match"),
        "cut manifest": (lambda: os.truncate(bad / "manifest.json", len(manifest) // 2), "cut short"),
        "cut file": (lambda: os.truncate(bad / "rank_00001.safetensors", 30_000), "damaged"),
        "missing file": (lambda: (bad / "rank_00001.safetensors").unlink(), "cannot be read"),
        "missing manifest": (lambda: (bad / "manifest.json").unlink(), "not a whole checkpoint"),
        "outside": (lambda: rewritten(outside), "leads outside"),
        "absurd shape": (lambda: rewritten(absurd), "elements of its"),
        "absurd pieces": (lambda: rewritten(absurd_pieces), "does not lie in"),
        "absurd header": (absurd_header, "its header claims"),
        "newer": (lambda: rewritten(lambda body: body.update(version=2)), "version 2"),
    }
    train(engine, range(2, 3))
    before = everything(engine, ("exp_avg",))
    for damage, (inflict, message) in damages.items():
        if dist.get_rank() == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            inflict()
        dist.barrier()
        assert message in raised(lambda: engine.load_checkpoint(tmp_path, tag="bad")), damage
        assert_same(everything(engine, ("exp_avg",)), before)
        if dist.get_rank() == 0 and damage != "missing manifest":  # without one it is no checkpoint
            assert command(["verify", str(bad)]) == 1, damage
    if dist.get_rank() == 0:
        assert command(["verify", str(good)]) == 0
        assert command(["verify", str(tmp_path)]) == 1, "one of them is damaged"
    dist.barrier()
    engine.load_checkpoint(tmp_path)
    assert_same(everything(engine, ("exp_avg",)), expected)


@distributed(world_size=2)
def test_the_documented_reader_reads_a_checkpoint(tmp_path):
    engine = save_two(tmp_path)
    namespace: dict = {"__name__": "documented"}
    exec(re.search(r"```python\n(.*?)```", FORMAT.read_text(), re.S).group(1), namespace)
    weights = namespace["read_weights"](tmp_path / "global_step2")
    assert_same(weights, dict(engine.module_state_dict()))
