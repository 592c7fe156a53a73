"""Folders as users, clients and other jobs leave them: what is not ours stays, and what is wrong is said at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from test_checkpoint_faults import raised

import deepspeedlite
from deepspeedlite.checkpoint.__main__ import main as command
from deepspeedlite.checkpoint.manifest import encode
from deepspeedlite.checkpoint.reader import Reader
from deepspeedlite.checkpoint.staging import SaveRecord
from deepspeedlite.checkpoint.tag import read_latest
from deepspeedlite.checkpoint.writer import TagWriter
from deepspeedlite.runtime.errors import CheckpointError, EngineStateError
from deepspeedlite.runtime.process_record import ProcessRecord

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

FAR = ProcessRecord(host="far-away", boot="b", space="c", pid=1, ticks=1, started="yesterday")
EARLIER = Path(__file__).parent / "checkpoint_of_0_1"  # written by that release


def engine_of(**checkpoint):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "checkpoint": {"fsync": False, **checkpoint},
    }
    return deepspeedlite.initialize(model=model, config=config)[0]


def step(engine) -> None:
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder: links, kinds and contents."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (about.st_mode, content, os.readlink(path) if path.is_symlink() else "")
    return found


@contextmanager
def within(seconds: int):
    """Fail where the body takes longer: opening a FIFO would wait for ever."""

    def too_long(*_):
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def on_first(action) -> None:
    """Do it once, before any rank goes on."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()


# --- what users pass ----------------------------------------------------------------------------------------------

FOLDERS = [
    *[("", "names none"), ("  ", "names none"), ("a\0b", "names none"), (None, "a NoneType"), (3, "a int")],
    *[(b"there", "names none"), ("~/ckpt", "os.path.expanduser"), ("file", "is a file"), ("file/below", "is a file")],
    *[("loop", "is no folder"), ("broken", "is no folder"), ("fifo", "is a file and no folder")],
]
TAGS = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "../a",
    "latest",
    "zero_to_fp32.py",
    " a",
    "a ",
    "a\nb",
    "a\tb",
    "a" * 201,
    b"a",
]


@distributed(world_size=[1, 2])
def test_folders_and_tags_that_cannot_be_are_one_error_and_nothing_is_written(tmp_path):
    os.chdir(tmp_path)

    def prepare():
        Path("file").touch()
        os.symlink("loop", "loop"), os.symlink("nowhere", "broken"), os.mkfifo("fifo")

    on_first(prepare)
    engine, before = engine_of(), tree(tmp_path)
    with within(30):
        for folder, words in FOLDERS:
            assert words in raised(lambda folder=folder: engine.save_checkpoint(folder)), folder
            assert words in raised(lambda folder=folder: engine.load_checkpoint(folder)), folder
        for tag in TAGS:
            assert "the checkpoint tag" in raised(lambda tag=tag: engine.save_checkpoint("new", tag=tag))
    last = dist.get_world_size() - 1  # what one rank alone gets wrong
    message = raised(lambda: engine.save_checkpoint(None if dist.get_rank() == last else "new"))
    assert f"rank {last}: " in message and "a NoneType" in message
    assert tree(tmp_path) == before
    for tag in (0, 7, "ä b", "1.5"):
        engine.save_checkpoint(Path("new"), tag=tag)
        assert engine.load_checkpoint("new")[0] == f"new/{tag}"


@distributed(world_size=[1, 2])
def test_weights_are_not_written_where_no_folder_can_be(tmp_path):
    os.chdir(tmp_path)
    on_first(lambda: Path("file").touch())
    engine, last = engine_of(), dist.get_world_size() - 1
    for folder, name in (
        ("", "a.bin"),
        (None, "a.bin"),
        ("file", "a.bin"),
        ("~/a", "a.bin"),
        ("new", None),
        ("new", ""),
    ):
        with pytest.raises(EngineStateError, match="save_16bit_model could not write"):
            engine.save_16bit_model(folder, name)
    if dist.get_rank() == 0:
        assert set(os.listdir()) <= {"file", "new"} and not list(Path().glob("new/*"))
    assert engine.save_16bit_model("new" if dist.get_rank() == 0 else None, "a.bin"), "only rank 0 writes"
    assert last or torch.load("new/a.bin").keys() == engine.module.state_dict().keys()


# --- what is there already ----------------------------------------------------------------------------------------


def _foreign_manifest(folder: Path) -> None:
    (folder / "best").mkdir()
    (folder / "best" / "manifest.json").write_text("{}")


def _of_deepspeed(folder: Path) -> None:
    (folder / "best").mkdir()
    (folder / "best" / "mp_rank_00_model_states.pt").write_bytes(b"PK")


def _tag_is_a_link(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").touch()
    (folder / "best").symlink_to("photos")


def _latest_is_a_link(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    (folder / "latest").symlink_to("checkpoint-10")


IN_THE_WAY = {
    "another program's manifest": (_foreign_manifest, "is not a checkpoint's"),
    "DeepSpeed's checkpoint": (_of_deepspeed, "is a checkpoint of DeepSpeed's"),
    "a file as tag": (lambda folder: (folder / "best").touch(), "is a file that is not ours"),
    "a FIFO as tag": (lambda folder: os.mkfifo(folder / "best"), "is a FIFO that is not ours"),
    "a link as tag": (_tag_is_a_link, "is a link that is not ours"),
    "a folder as latest": (lambda folder: (folder / "latest").mkdir(), "is a folder that is not ours"),
    "a link as latest": (_latest_is_a_link, "is a link that is not ours"),
    "notes as latest": (
        lambda folder: (folder / "latest").write_text("news:\n- none"),
        "is not ours, and is in the way",
    ),
}


@distributed(world_size=[1, 2])
def test_what_is_in_the_way_of_a_checkpoint_stays_and_is_said_before_anything_is_written(tmp_path):
    for use_async in (False, True):
        engine = engine_of(keep_last=1, async_save=use_async)
        for number, (what, (prepare, words)) in enumerate(IN_THE_WAY.items()):
            folder = tmp_path / f"{use_async}{number}"
            on_first(lambda folder=folder, prepare=prepare: (folder.mkdir(), prepare(folder)))
            before = tree(folder)
            assert words in raised(lambda folder=folder, engine=engine: engine.save_checkpoint(folder, "best")), what
            assert tree(folder) == before, what


THEIRS = (
    "best/config.json",
    "best/exported/model.bin",
    "site/manifest.json",
    "site/photo.jpg",
    ".tmp.notes/a",
    ".old.b/a",
)
THEIRS += (".tmp.b.0123456789abcdef/a", "zero_to_fp32.py", "manifest.json", "best/rank_00000.safetensors")


@distributed(world_size=[1, 2])
def test_no_file_but_ours_is_ever_removed(tmp_path):
    def prepare():
        for name in THEIRS:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)

    on_first(prepare)
    engine = engine_of(keep_last=1)
    for tag in ("best", "best", "a", "b"):
        step(engine)
        engine.save_checkpoint(tmp_path, tag=tag)
        assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / tag)
        if tag == "a":
            on_first(lambda: (tmp_path / "a" / "README.md").write_text("added later"))
            on_first(lambda: shutil.copytree(tmp_path / "a", tmp_path / "my_copy"))
    assert [(tmp_path / name).read_text() for name in THEIRS] == [*THEIRS]
    assert (tmp_path / "a" / "README.md").read_text() == "added later"
    assert os.listdir(tmp_path / "a") == ["README.md"] and len(os.listdir(tmp_path / "best")) == 3
    with Reader(tmp_path / "my_copy") as reader, Reader(tmp_path / "b") as newest:
        reader.verify(), newest.verify()
    names = {name.split("/")[0] for name in THEIRS}
    assert set(os.listdir(tmp_path)) == names | {"a", "b", "my_copy", "latest"}


@distributed(world_size=[1, 2])
def test_the_same_tag_twice_is_the_new_one_and_files_added_since_stay(tmp_path):
    engine = engine_of(async_save=True)
    for number in range(3):
        step(engine)
        engine.save_checkpoint(tmp_path, tag="best", client_state={"number": number})
        on_first(lambda: (tmp_path / "best").mkdir(exist_ok=True))  # a client's files, while the save goes on
        on_first(lambda number=number: (tmp_path / "best" / f"{number}.txt").write_text(f"{number}"))
    assert engine.load_checkpoint(tmp_path)[1] == {"number": 2} and engine.global_steps == 3
    size = dist.get_world_size()
    if dist.get_rank() == 0:
        assert command(["verify", str(tmp_path)]) == 0
        names = os.listdir(tmp_path / "best")
        assert {"0.txt", "1.txt", "2.txt", "manifest.json"} <= set(names) and len(names) == 4 + size, names
        assert sorted(os.listdir(tmp_path)) == ["best", "latest", "zero_to_fp32.py"]


@distributed(world_size=[1, 2])
def test_keep_last_leaves_the_checkpoint_that_latest_names(tmp_path):
    engine = engine_of(keep_last=1)
    engine.save_checkpoint(tmp_path, tag="named")
    for tag in ("a", "b"):
        engine.save_checkpoint(tmp_path, tag=tag, save_latest=False)
    assert sorted(os.listdir(tmp_path)) == ["b", "latest", "named", "zero_to_fp32.py"]


# --- which checkpoint is meant ------------------------------------------------------------------------------------


@distributed(world_size=[1, 2])
def test_a_lost_latest_and_a_missing_tag_are_errors_that_name_what_is_there(tmp_path):
    engine = engine_of(keep_last=2)
    assert engine.load_checkpoint(tmp_path / "new") == (None, {})
    on_first(lambda: ((tmp_path / "site").mkdir(), (tmp_path / "site" / "manifest.json").write_text("{}")))
    assert engine.load_checkpoint(tmp_path) == (None, {}), "nothing of ours is there"
    for tag in ("a", "b"):
        engine.save_checkpoint(tmp_path, tag=tag)
    assert "there is no checkpoint c in" in (said := raised(lambda: engine.load_checkpoint(tmp_path, tag="c")))
    assert "it has a, b: name one" in said
    assert "is a checkpoint itself" in raised(lambda: engine.load_checkpoint(tmp_path / "a"))
    on_first(lambda: (tmp_path / "latest").write_text("gone"))
    assert "names gone, and there is no such" in (said := raised(lambda: engine.load_checkpoint(tmp_path)))
    assert "it has a, b: name one" in said
    if dist.get_rank() == 0:
        assert command(["verify", str(tmp_path)]) == 1, "what latest names is missing"
    on_first(lambda: (tmp_path / "latest").unlink())
    assert "has no file 'latest'" in (said := raised(lambda: engine.load_checkpoint(tmp_path))) and "a, b" in said
    assert engine.load_checkpoint(tmp_path, tag="a")[0] and engine.load_checkpoint(tmp_path, tag="b")[0]


@distributed(world_size=[1, 2])
def test_what_an_earlier_release_has_saved_loads_and_is_replaced(tmp_path):
    on_first(lambda: shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True))
    on_first(lambda: shutil.copytree(EARLIER / "best", tmp_path / ".old.best"))  # killed after both renames
    engine = engine_of(keep_last=1)
    assert engine.load_checkpoint(tmp_path) == (str(tmp_path / "best"), {"epoch": 3}) and engine.global_steps == 2
    weights = [-0.19590067863464355, 0.18871620297431946, -0.38821592926979065, -0.3266226351261139]
    assert engine.module[0].weight.flatten().tolist()[:4] == weights
    step(engine)
    engine.save_checkpoint(tmp_path, tag="best")
    on_first(lambda: (tmp_path / "best").rename(tmp_path / ".old.best"))  # killed between them
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / ".old.best") and engine.global_steps == 3
    engine.save_checkpoint(tmp_path, tag="next")
    assert sorted(os.listdir(tmp_path)) == ["latest", "next", "zero_to_fp32.py"]


# --- others that save here ----------------------------------------------------------------------------------------

OTHER_JOB = """
import sys, time, torch, deepspeedlite
from deepspeedlite.checkpoint.writer import TagWriter
model = torch.nn.Linear(2, 1)
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
engine = deepspeedlite.initialize(model=model, config=config)[0]
if sys.argv[2] == "saving":
    TagWriter.commit = lambda *arguments: (print("there", flush=True), time.sleep(600))
engine.save_checkpoint(sys.argv[1], tag="theirs")
print("there", flush=True)
time.sleep(600)
"""


def _other_job(folder: Path, how: str) -> int:
    """Another job, which is no child of this process; its number, when it is there."""
    script = folder.parent / "other.py"
    script.write_text(OTHER_JOB)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    between = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True); "
    between += "print(p.pid, p.stdout.readline(), flush=True); os._exit(0)"
    words = [sys.executable, "-c", between, sys.executable, str(script), str(folder), how]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**env, "DS_ACCELERATOR": "cpu"}, timeout=100)
    pid, said = done.stdout.split()
    assert said == "there"
    return int(pid)


@distributed(world_size=2)
def test_two_jobs_that_save_into_one_folder_are_told_of_each_other(tmp_path):
    engine = engine_of()
    for how in ("saving", "between saves"):
        folder = tmp_path / how
        pid = [_other_job(folder, how) if dist.get_rank() == 0 else 0]
        dist.broadcast_object_list(pid)
        before, since_s = tree(folder), time.monotonic()
        said = raised(lambda folder=folder: engine.save_checkpoint(folder, tag="mine"))
        assert time.monotonic() - since_s < 10
        assert f"two jobs save into {folder}: process {pid[0]} on {socket.gethostname()}, started 20" in said, said
        assert "theirs" in said and tree(folder) == before
        if how == "between saves":  # before this one had started: an idle notebook must not cost this job its work
            copied = tmp_path / "earlier"
            on_first(lambda folder=folder, to=copied: (shutil.copytree(folder, to), _make_old(to / "theirs")))
            with redirect_stderr(StringIO()) as warned:
                engine.save_checkpoint(copied, tag="mine")
            assert dist.get_rank() or f"process {pid[0]} on" in warned.getvalue()
        on_first(lambda pid=pid: os.kill(pid[0], signal.SIGKILL))
        until_s = time.monotonic() + 20
        while Path(f"/proc/{pid[0]}").exists() and time.monotonic() < until_s:
            time.sleep(0.02)
        engine.save_checkpoint(folder, tag="mine")  # nothing has to be cleared by hand
        left = {"mine", "latest", "zero_to_fp32.py"} | ({"theirs"} if how == "between saves" else set())
        assert set(os.listdir(folder)) == left


def _make_old(tag: Path) -> None:
    for path in tag.iterdir():
        os.utime(path, (1e9, 1e9))


@distributed(world_size=[1, 2])
def test_leftovers_go_when_their_process_is_known_to_have_ended_and_else_stay(tmp_path):
    engine, here = engine_of(), ProcessRecord.here()
    owners = {
        "ended": here.model_copy(update={"ticks": here.ticks - 1}),  # its number is another's now
        "before": here.model_copy(update={"boot": "an earlier start"}),
        "elsewhere": FAR,
        "container": FAR.model_copy(update={"host": here.host, "boot": here.boot, "space": "pid:[1]"}),
    }

    def prepare():
        for tag, owner in owners.items():
            staging = tmp_path / f".tmp.{tag}.{'0' * 16}"
            (staging / "new").mkdir(parents=True)
            (staging / "new" / "rank_00000.safetensors").write_bytes(b"half")
            (staging / "owner.json").write_bytes(
                SaveRecord(owner=owner, tag=tag, files=["rank_00000.safetensors"]).to_bytes()
            )

    on_first(prepare)
    with redirect_stderr(StringIO()) as said:
        engine.save_checkpoint(tmp_path, tag="mine")
    left = [f".tmp.{tag}.{'0' * 16}" for tag in ("container", "elsewhere")]
    assert sorted(os.listdir(tmp_path)) == sorted(["mine", "latest", "zero_to_fp32.py", *left])
    if dist.get_rank() == 0:
        assert "process 1 on far-away, started yesterday is saving elsewhere" in said.getvalue()


@distributed(world_size=[1, 2])
def test_where_locks_do_not_tell_records_do(tmp_path):
    """As on NFS: a file system without locks, and a job on another host."""
    engine, here = engine_of(), ProcessRecord.here()
    fcntl.flock, flock = _no_locks, fcntl.flock
    try:
        engine.save_checkpoint(tmp_path, tag="mine")
        on_first(lambda: rewritten(tmp_path / "mine", _put("state", "saved_by", FAR.model_dump())))
        with redirect_stderr(StringIO()) as said:
            engine.save_checkpoint(tmp_path, tag="mine")
        if dist.get_rank() == 0:
            assert "process 1 on far-away, started yesterday has saved mine while this one runs" in said.getvalue()
        init = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        alive = here.model_copy(update={"pid": 1, "ticks": int(init[19])})
        theirs = tmp_path / f".tmp.theirs.{'0' * 16}"
        on_first(
            lambda: (
                theirs.mkdir(),
                (theirs / "owner.json").write_bytes(SaveRecord(owner=alive, tag="theirs").to_bytes()),
            )
        )
        assert "process 1 on" in raised(lambda: engine.save_checkpoint(tmp_path, tag="mine"))
    finally:
        fcntl.flock = flock
    assert sorted(os.listdir(tmp_path)) == [f".tmp.theirs.{'0' * 16}", "latest", "mine", "zero_to_fp32.py"]


def _no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_forked_process_does_not_hold_its_parents_folder(tmp_path):
    """A loader's worker may outlive a job that was killed in the middle of a save."""
    code = f"""
import os, signal, sys, time
from deepspeedlite.checkpoint.writer import TagWriter
TagWriter({str(tmp_path)!r}, "a").prepare()
if os.fork() == 0:
    os.close(1), os.close(2), time.sleep(60), os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60)
    writer = TagWriter(tmp_path, "b")
    assert len(writer.prepare()) == 1
    writer.discard()
    assert os.listdir(tmp_path) == []


# --- what is no checkpoint ----------------------------------------------------------------------------------------


def rewritten(folder: Path, change) -> None:
    """A manifest that is forged well: its checksum is right."""
    body = json.loads((folder / "manifest.json").read_bytes())
    del body["crc32"]
    body = change(body) or body
    rest = json.dumps(body)[1:].encode()
    (folder / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(rest) + rest)


def _put(*path_and_value):
    """A change of one value of a manifest."""
    *path, value = path_and_value

    def change(body):
        at = body
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


FILE = "rank_00000.safetensors"
PIECES = ("parameters", 0, "pieces", "weight")
FORGED = {
    "a list as manifest": lambda body: {"format": "deepspeedlite", "version": 1, "parameters": []},
    "files as a list": _put("files", []),
    "a negative size": _put("files", FILE, "nbytes", -1),
    "a path that leaves": _put("files", "../a/b", {"nbytes": 1, "crc32": "0"}),
    "an absolute path": _put("files", "/etc/passwd", {"nbytes": 1, "crc32": "0"}),
    "a negative offset": _put(*PIECES, [[FILE, "weight.0", -1, 0, 6]]),
    "a huge offset": _put(*PIECES, [[FILE, "weight.0", 1 << 62, 0, 6]]),
    "a list as offset": _put(*PIECES, [[FILE, "weight.0", [0], 0, 6]]),
    "a list as file": _put(*PIECES, [[[FILE], "weight.0", 0, 0, 6]]),
    "a list as tensor": _put(*PIECES, [[FILE, ["weight.0"], 0, 0, 6]]),
    "a number as piece": _put(*PIECES, [7]),
    "no pieces": _put(*PIECES, None),
    "a huge shape": _put("parameters", 0, "shape", [1 << 60, 1 << 60]),
    "a negative shape": _put("parameters", 0, "shape", [-3, -2]),
    "a name that is none": _put("parameters", 0, "name", 7),
    "a name twice": _put("parameters", 0, "name", "1.weight"),
    "other names that are none": _put("parameters", 0, "tied", [["a"]]),
    "a dtype that is none": _put("parameters", 0, "dtype", ["float32"]),
    "a group that is none": _put("parameters", 0, "group", "first"),
    "another key": _put("parameters", 0, "surprise", 1),
    "a tag that is none": _put("tag", 7),
    "a state that is none": _put("state", []),
    "counters that are none": _put("state", "engine", [1]),
    "a world that is none": _put("world_size", -2),
    "options that are none": _put("param_groups", [1]),
    "a deep state": lambda body: json.loads('{"format": "deepspeedlite"}'),
    "claimed often": lambda body: body["parameters"].extend(
        [{**body["parameters"][0], "name": f"again.{number}"} for number in range(100)]
    ),
}


@distributed(world_size=[1, 2])
def test_forged_manifests_are_refused_at_once(tmp_path):
    on_first(lambda: shutil.copytree(EARLIER / "best", tmp_path / "good"))
    engine = engine_of()
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    with within(60):
        for what, change in FORGED.items():
            on_first(lambda: shutil.rmtree(tmp_path / "bad", ignore_errors=True))
            on_first(lambda: shutil.copytree(tmp_path / "good", tmp_path / "bad"))
            on_first(lambda change=change: rewritten(tmp_path / "bad", change))
            assert "loading checkpoint" in raised(lambda: engine.load_checkpoint(tmp_path, tag="bad")), what
            if dist.get_rank() == 0:
                for words in (["verify"], ["inspect"], ["to_fp32", str(tmp_path / "out")]):
                    with redirect_stderr(StringIO()):
                        assert command([words[0], str(tmp_path / "bad"), *words[1:]]) == 1, (what, words)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())


def test_a_manifest_of_too_many_values_takes_no_memory_for_them(tmp_path):
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    rest = b'"format":"deepspeedlite","version":1,"files":{},"parameters":[' + b"[]," * (1 << 25) + b"[]]}"
    (tmp_path / "best" / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(rest) + rest)
    with within(20), pytest.raises(CheckpointError, match=r"67,108,8\d\d values, which no checkpoint has"):
        Reader(tmp_path / "best")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _socket(path: Path) -> None:
    path.unlink()
    at = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(at)


def _link(to: str):
    return lambda path: (path.unlink(), path.symlink_to(to))


NO_FILES = (_fifo, _folder, _socket, _link("/dev/zero"), _link("manifest.json"), _link("nowhere"))


@distributed(world_size=[1, 2])
def test_what_is_no_file_is_not_opened(tmp_path):
    engine = engine_of()
    with within(60):
        for number, make in enumerate(
            (_fifo, _folder, _socket, _link("/dev/zero"), _link("manifest.json"), _link("x"))
        ):
            for name in ("best/manifest.json", f"best/{FILE}", "latest"):
                folder = tmp_path / f"{number}{name.replace('/', '_')}"
                on_first(lambda folder=folder: shutil.copytree(EARLIER, folder))
                on_first(lambda folder=folder, make=make, name=name: make(folder / name))
                if name == "latest" and make not in (_fifo, _folder, _socket):
                    continue
                assert str(folder) in raised(lambda folder=folder: engine.load_checkpoint(folder)), (number, name)
                if dist.get_rank() == 0:
                    with redirect_stderr(StringIO()):
                        assert command(["inspect", str(folder)]) == 1
                        if name == f"best/{FILE}":
                            assert command(["verify", str(folder)]) == 1
                dist.barrier()
    assert read_latest(tmp_path) is None


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_tensor_of_a_users_state_is_refused_with_its_key(layout):
    client_state = {"step": 3, "of": [torch.eye(2), {"rows": torch.eye(2).to_sparse(layout=layout)}]}
    with pytest.raises(
        CheckpointError, match=rf"client_state\['of'\]\[1\]\['rows'\] is a .* of layout {layout}.*to_dense"
    ):
        encode(client_state, "client_state", lambda tensor: ["file", "tensor"])
