"""The cache of compiled ops: where it is, what in it is believed, who compiles and who waits.

Most of it with an op of one small file, compiled for real.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_user import as_user
from paths import ROOT
from programs import needs

from deepspeedlite.ops.op_builder import OPS, OpBuildError, build_lock, builder, built, folders, jit, prebuilt
from deepspeedlite.ops.op_builder.library_file import cut_off, damage, load_error
from deepspeedlite.ops.op_builder.spec import OpSpec

pytestmark = needs("c++")
SPEC = OpSpec("small", "SmallBuilder", "DS_BUILD_SMALL", plain=("small.cpp",))
USER = 4242


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """The small op's, and a cache of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "small.cpp").write_text('extern "C" int small() { return 1; }\n')
    for module in (jit, prebuilt):
        monkeypatch.setattr(module, "csrc", lambda: folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the library logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepspeedlite").addHandler(handler)
    monkeypatch.setattr(jit, "_say_detour", jit._say_detour.__wrapped__)
    yield lines
    logging.getLogger("deepspeedlite").removeHandler(handler)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="dsl-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away or to mount")


# --- what is believed -------------------------------------------------------------------------------------------------

WRONGS = {
    "cut off": (lambda lib: os.truncate(lib, 5000), r"has 5000 of \d+ bytes; it is compiled again"),
    "empty": (lambda lib: os.truncate(lib, 0), r"has 0 of \d+ bytes; it is compiled again"),
    "of another content": (
        lambda lib: lib.write_bytes(lib.read_bytes()[:-1] + b"?"),
        "has another content than was written; it is compiled again",
    ),
    "of an earlier version": (
        lambda lib: lib.with_suffix(".sum").unlink(),
        "has no checksum beside it, as earlier versions left it; it is compiled again",
    ),
    "writable by others": (lambda lib: lib.chmod(0o777), r"others may write to .*small-\w+.so \(mode 0777\)"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_library_that_is_wrong_is_compiled_again_once_with_a_line(wrong, sources, said):
    spoil, line = WRONGS[wrong]
    library = built(SPEC)
    content = library.read_bytes()
    assert built(SPEC) == jit.compiled(SPEC) == library and not damage(library)
    spoil(library)
    said.clear()
    assert jit.compiled(SPEC) is None
    assert built(SPEC) == library and library.read_bytes() == content
    assert len([one for one in said if "compiled again" in one]) == 1
    assert re.search(line, "\n".join(said)), said
    said.clear()
    assert built(SPEC) == jit.compiled(SPEC) == library and not said


def test_a_library_of_another_user_is_not_loaded(sources, said):
    root_only()
    library = built(SPEC)
    os.chown(library, USER, USER)
    assert jit.compiled(SPEC) is None
    assert built(SPEC) == library and library.stat().st_uid == 0
    assert f"belongs to uid {USER}" in "\n".join(said)


@pytest.mark.parametrize("wrong", ["another user's", "writable by all", "writable by a group"])
def test_nothing_is_loaded_from_or_put_into_a_folder_that_others_may_write(wrong, sources, tmp_path, said):
    library = built(SPEC)
    if wrong == "another user's":
        root_only()
        os.chown(library.parent, USER, USER)
    else:
        library.parent.chmod(0o1777 if wrong == "writable by all" else 0o775)
    assert jit.compiled(SPEC) is None
    other = built(SPEC)
    assert other.parent == tmp_path / "cache" / f"deepspeedlite-{os.getuid()}"
    assert other.parent.stat().st_mode & 0o777 == 0o700
    assert f"compiled ops are kept in {other.parent}; set TORCH_EXTENSIONS_DIR" in "\n".join(said)


def test_a_library_of_a_wheel_is_looked_at_before_it_is_loaded(sources, tmp_path, monkeypatch):
    whole = built(SPEC)
    assert cut_off(whole) == ""
    installed = tmp_path / "lib"
    installed.mkdir()
    monkeypatch.setattr(prebuilt, "lib", lambda: installed)
    prebuilt.write_record(
        prebuilt.Record("cpu", "2.13", None, None, (), "abc", {SPEC.name: prebuilt.sources_hash(SPEC)}), installed
    )
    for size, reason in ((100, "is cut off: 100 of"), (whole.stat().st_size - 1, "is cut off"), (10, "is no library")):
        (installed / "small.so").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(
            OpBuildError, match=rf"small\.so, which was installed, {reason}.*pip install --force-reinst"
        ):
            built(SPEC)
    content = bytearray(whole.read_bytes())
    content[18] = 243  # RISC-V
    (installed / "small.so").write_bytes(content)
    with pytest.raises(OpBuildError, match=r"is not made for \w+; reinstall it"):
        built(SPEC)
    shutil.copy(whole, installed / "small.so")
    assert built(SPEC) == installed / "small.so"


def test_a_library_of_roots_is_loaded_by_everybody(open_folder):
    root_only()
    (open_folder / "a.so").touch(mode=0o644)
    places = [str(open_folder), str(open_folder / "a.so")]
    code = f"from deepspeedlite.ops.op_builder import folders as f; print([f.distrust(f.Path(p)) for p in {places}])"
    command = [*as_user(USER), sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "['', '']", done.stderr


# --- what the loader says ---------------------------------------------------------------------------------------------


def load(library: Path, monkeypatch: pytest.MonkeyPatch, from_wheel: bool = False) -> str:
    monkeypatch.setattr(builder, "built", lambda spec: library)
    monkeypatch.setattr(builder, "lib", lambda: library.parent if from_wheel else Path("/"))
    with pytest.raises(OpBuildError) as caught:
        builder.load_ops.__wrapped__(SPEC)
    return str(caught.value)


def test_the_loaders_own_reason_is_shown_with_a_remedy_that_fits(sources, tmp_path, monkeypatch):
    (sources / "small.cpp").write_text('extern "C" int nonsense(); extern "C" int small() { return nonsense(); }\n')
    library = built(SPEC)
    reason = load(library, monkeypatch)
    assert "undefined symbol: nonsense (it was compiled for another torch" in reason and f"delete {library}" in reason
    reason = load(library, monkeypatch, from_wheel=True)
    assert "undefined symbol: nonsense" in reason and "force-reinstall" in reason and "delete" not in reason
    (library.parent / "other.so").write_bytes(b"no library at all" * 99)
    assert "invalid ELF header (it is damaged" in load(library.parent / "other.so", monkeypatch)
    needed = tmp_path / "libneeded.so"
    subprocess.run(["c++", "-shared", "-o", needed, "-x", "c++", "-"], input="", text=True, check=True)
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", library, "-x", "c++", "-", "-x", "none", needed],
        input="",
        text=True,
        check=True,
        cwd=tmp_path,
    )
    needed.unlink()
    reason = load(library, monkeypatch)
    assert "it needs" in reason and "libneeded.so" in reason and "LD_LIBRARY_PATH" in reason


NOEXEC = """
import torch
from deepspeedlite.ops.op_builder import OpBuildError, builder
from pathlib import Path
builder.built = lambda spec: Path("{folder}/small.so")
try:
    builder.load_ops(builder.OpSpec("small", "", ""))
except OpBuildError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_library_under_noexec_is_not_to_be_deleted(sources, tmp_path):
    root_only()
    library, place = built(SPEC), tmp_path / "place"
    place.mkdir()
    script = f'mount -t tmpfs -o noexec tmpfs {place} && cp {library} {place}/small.so && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, NOEXEC.format(folder=place)], capture_output=True, text=True, cwd=ROOT
    )
    assert "failed to map segment" in done.stdout and "is mounted noexec" in done.stdout, done
    assert "set TORCH_EXTENSIONS_DIR to a folder from which programs may run" in done.stdout
    assert "delete" not in done.stdout


def test_a_complaint_that_nobody_foresaw_is_shown_all_the_same():
    error = load_error(Path("/x/a.so"), "something odd", False)
    assert error.what == "/x/a.so does not load: something odd" and "delete /x/a.so" in error.remedy


# --- where it is ------------------------------------------------------------------------------------------------------

PLACES = (
    "from deepspeedlite.ops.op_builder import folders as f; print(f.cache_folder(), '|', f.detour(f.cache_folder()))"
)


@pytest.mark.parametrize("home", ["unset", "not to be entered", "read-only", "noexec", "nowhere"])
def test_without_a_usable_home_ops_go_to_a_private_folder(home, open_folder):
    """As a user without an entry in the list of users, in a mount namespace."""
    place, temporary = open_folder / "home", open_folder / "tmp"
    place.mkdir()
    temporary.mkdir()
    temporary.chmod(0o1777)
    place.chmod(0o700 if home == "not to be entered" else 0o777)
    options = {"read-only": "ro", "noexec": "noexec,mode=777"}.get(home)
    mount = f"mount -t tmpfs -o {options} tmpfs {place} && " if options else ""
    where = {"unset": "", "nowhere": "HOME=/"}.get(home, f"HOME={place}")
    code = f"{PLACES}; import os; print(oct(os.stat(f.writable_folder()).st_mode))"
    command = ["env", "-u", "HOME", "-u", "TORCH_EXTENSIONS_DIR", f"TMPDIR={temporary}", *filter(None, [where])]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount}exec "$@"', "sh", *as_user(USER), *command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, mode = done.stdout.splitlines()
    folder, _, reason = first.partition(" | ")
    assert folder == f"{temporary}/deepspeedlite-{USER}" and mode == "0o40700"
    words = {"unset": "HOME is not set", "not to be entered": "Permission denied", "noexec": "mounted noexec"}
    assert words.get(home, "cannot be written") in reason


def test_a_private_folder_that_somebody_else_made_first_is_not_used(tmp_path, monkeypatch):
    root_only()
    own = tmp_path / f"deepspeedlite-{os.getuid()}"
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert folders.cache_folder() == own
    own.mkdir(mode=0o700)
    os.chown(own, USER, USER)
    with pytest.raises(OpBuildError, match=rf"{own} belongs to uid {USER}, who could.*; set TORCH_EXTENSIONS_DIR"):
        folders.writable_folder()
    own.rmdir()
    os.symlink(tmp_path, own)
    os.chown(own, USER, USER, follow_symlinks=False)
    with pytest.raises(OpBuildError, match=f"{own} is neither a folder nor a file"):
        folders.writable_folder()


ADAM = """
import os, torch, deepspeedlite
from deepspeedlite.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)
DeepSpeedCPUAdam([weight], lr=0.5).step()
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(3, 2), config=config)
print(os.getuid(), type(engine.optimizer.optimizer).__name__, weight.tolist())
"""


@needs("c++")
@pytest.mark.slow
def test_a_user_without_a_home_trains_with_the_op(open_folder):
    """Which root has compiled here before, since that takes long; it lies where that user's would."""
    library, own = built(OPS["cpu_adam"]), open_folder / f"deepspeedlite-{USER}"
    own.mkdir(mode=0o700)
    for file in (library, library.with_suffix(".sum")):
        shutil.copy(file, own)
    for path in (own, *own.iterdir()):
        os.chown(path, USER, USER)
    open_folder.chmod(0o1777)
    variables = ["env", "-u", "HOME", "-u", "TORCH_EXTENSIONS_DIR", f"TMPDIR={open_folder}"]
    done = subprocess.run(
        [*as_user(USER), *variables, sys.executable, "-c", ADAM],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == f"{USER} DeepSpeedCPUAdam [0.5, 0.5, 0.5]", done.stderr
    assert done.stderr.count("set TORCH_EXTENSIONS_DIR") == 1 and "compiling" not in done.stderr


BEGIN = """
import sys
from pathlib import Path
from deepspeedlite.ops.op_builder import OpBuildError, built, jit, prebuilt
from deepspeedlite.ops.op_builder.spec import OpSpec
jit.csrc = prebuilt.csrc = lambda: Path(sys.argv[1])
"""
TRY = """
try:
    print(built(OpSpec("small", "SmallBuilder", "DS_BUILD_SMALL", plain=("small.cpp",))))
except OpBuildError as error:
    print(error)
"""


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_is_named_before_compiling_and_after(when, sources, tmp_path):
    root_only()
    place = tmp_path / "place"
    place.mkdir()
    fill = f"open('{place}/fill', 'wb', 0).write(bytes(1 << 26))" if when == "meanwhile" else ""
    code = f"{BEGIN}\nold = jit.build\njit.build = lambda *a: ({fill or None}, old(*a))\n{TRY}"
    script = f'mount -t tmpfs -o size={40 if fill else 1}m tmpfs {place} && exec {sys.executable} -c "$0" {sources}'
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(place)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    wanted = "No space left on device, in" if fill else "KiB free in"
    assert f"{wanted} {place}/deepspeedlite" in done.stdout, done.stdout + done.stderr
    assert "make room there, or set TORCH_EXTENSIONS_DIR" in done.stdout


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stopped", "its compiler hangs"])
def test_a_builder_that_makes_no_progress_is_named_and_not_waited_for(how, sources, tmp_path, monkeypatch, said):
    slow = tmp_path / "slow"
    slow.touch()
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ -e {slow} ] && [ "$*" != "${{*#*small.cpp}}" ] && rm {slow} && sleep 99\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    holder = subprocess.Popen(
        [sys.executable, "-c", BEGIN + TRY, sources],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while slow.exists():  # which the first to compile removes
            assert holder.poll() is None, holder.communicate()
            time.sleep(0.02)
        if how == "stopped":
            holder.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(build_lock, "_SILENCE_S", 1.5)
        started_s = time.monotonic()
        library = built(SPEC)
        assert time.monotonic() - started_s < 20 and library.stem.endswith("-1") and not damage(library)
        text = "\n".join(said)
        state = "stopped" if how == "stopped" else "alive"
        assert f"process {holder.pid} on {os.uname().nodename}, started" in text and f"({state}, compiling for" in text
        assert "has shown no sign of life for" in text
        assert jit.compiled(SPEC) == library, "the next one finds it and waits for nobody"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


@pytest.mark.slow
def test_whoever_waits_for_a_builder_that_works_gets_its_library(sources, tmp_path, monkeypatch, said):
    """One compiler that is at work for longer than is waited for silence."""
    busy = tmp_path / "c++"
    spin = f'{sys.executable} -c "import time; [0 for _ in iter(lambda: time.process_time() < 2, False)]"'
    busy.write_text(f'#!/bin/sh\n[ "$*" != "${{*#*small.cpp}}" ] && {spin}\nexec c++ "$@"\n')
    busy.chmod(0o755)
    monkeypatch.setenv("CXX", str(busy))
    holder = subprocess.Popen([sys.executable, "-c", BEGIN + TRY, sources], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "cache").glob("*/*.tmp")):
        assert holder.poll() is None
        time.sleep(0.02)
    monkeypatch.setattr(build_lock, "_SILENCE_S", 1.5)
    library = built(SPEC)
    assert holder.communicate(timeout=60)[0].strip() == str(library) and library.stem[-2] != "-"
    assert len([line for line in said if line.startswith("waiting for another process")]) == 1
    assert not [line for line in said if line.startswith("compiling")]
