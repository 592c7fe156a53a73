"""Faults, planted for real, and whether the environment report names them.

    python tests/helpers/planted.py             # plants each and prints the table of docs/env-report.md (as root)
    python tests/helpers/planted.py "own name"  # those whose name has these words

Each is planted in namespaces of the report's own: small file systems, other users, another /etc/hosts. Nothing of the
machine changes. What a plant needs and the machine lacks is said in its row.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from other_user import as_user
from paths import ROOT

from deepspeedlite.env_report import BAD, WARN, Row

USER = 4242
_FULL = "mount -t tmpfs -o size=64m tmpfs {folder} && { dd if=/dev/zero of={folder}/fill bs=1M 2>/dev/null || true; }"


@dataclass(frozen=True, kw_only=True)
class Plant:
    """A fault and what is to be said of it.

    Attributes:
        fault: in words, for the table.
        section: of the report that names it.
        said: what the row's name and value are to hold, a pattern; it must be `warn` or `bad`.
        remedy: what its remedy is to hold.
        prepare: makes files in the plant's folder; returns what is lacking here, if anything.
        shell: run before the report, in a mount and a host name namespace; `{folder}` is the plant's.
        variables: of the report; None unsets one.
        uid: the user whose report it is.
        arguments: of the report.
        before: what is written before the report's command.
    """

    fault: str
    section: str
    said: str
    remedy: str
    prepare: Callable[[Path], str] = lambda folder: ""
    shell: str = ":"
    variables: dict[str, str | None] = field(default_factory=dict)
    uid: int | None = None
    arguments: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What the report said of a plant: the rows that name it, how long it took, and of that the processor."""

    rows: list[Row]
    took_s: float
    cpu_s: float
    lacking: str = ""


def _truncated(folder: Path) -> str:
    from deepspeedlite.ops.op_builder import OPS, built

    library = built(OPS["cpu_adam"])
    (folder / "deepspeedlite").mkdir()
    for file in (library, library.with_suffix(".sum")):
        shutil.copy(file, folder / "deepspeedlite")
    os.truncate(folder / "deepspeedlite" / library.name, 5000)
    return ""


def _torch_for_cuda_12(folder: Path) -> str:
    """A torch that was built for another CUDA than the nvcc that is here."""
    if not shutil.which("nvcc"):
        return "needs nvcc"
    (folder / "torch" / "distributed").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("class _C: pass\n")
    (folder / "torch" / "version.py").write_text("__version__ = '2.13.0+cu118'\ncuda = '11.8'\nhip = None\n")
    (folder / "torch" / "distributed" / "__init__.py").write_text("def is_available(): return False\n")
    return ""


def _old_compiler(folder: Path) -> str:
    """What GCC 4.8 says to C++17: no distribution of today has one."""
    script = '#!/bin/sh\ncase "$*" in *--version*) echo "g++ (GCC) 4.8.5";; *c++17*)\n'
    script += "echo \"g++: error: unrecognized command line option '-std=c++17'\" >&2; exit 1;; esac\n"
    (folder / "g++").write_text(script)
    (folder / "g++").chmod(0o755)
    return ""


def _wheel_of_another_torch(folder: Path) -> str:
    """An installed package whose op wants a function that this torch does not have."""
    from deepspeedlite.ops.op_builder import OPS, prebuilt

    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "deepspeedlite", folder / "deepspeedlite", ignore=ignored)
    lib = folder / "deepspeedlite" / "ops" / "lib"
    lib.mkdir()
    code = 'extern "C" int aoti_torch_of_tomorrow(); static int at_start = aoti_torch_of_tomorrow();'
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(lib / "cpu_adam.so")]
    subprocess.run(command, input=code, text=True, check=True)
    ops = {"cpu_adam": prebuilt.sources_hash(OPS["cpu_adam"])}
    prebuilt.write_record(prebuilt.Record("cpu", "2.99.0", None, None, (), "abc", ops), lib)
    return ""


def _names(address: str) -> Callable[[Path], str]:
    def prepare(folder: Path) -> str:
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address}")
        return ""

    return prepare


def _home(folder: Path) -> str:
    for name, mode in (("home", 0o755), ("locked", 0o700), ("tmp", 0o1777)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    return ""


def _unicode(folder: Path) -> str:
    (folder / "Zürich").mkdir()
    return ""


_HOSTNAME = "hostname dsl-planted && mount --bind {folder}/hosts /etc/hosts"
_NO_HOME = {"TMPDIR": "{folder}/tmp", "TORCH_EXTENSIONS_DIR": None}
_OPS_HERE = {"TORCH_EXTENSIONS_DIR": "{folder}"}
# The environment and the checkout may lie below /tmp themselves, and are then what is left there.
_BELOW_TMP = [path for path in (sys.prefix, str(ROOT)) if path.startswith("/tmp/")]
_NEW_TMP = " && ".join(
    [
        *(["mount --bind /tmp /mnt"] if _BELOW_TMP else []),
        "mount -t tmpfs -o size=64m,mode=1777 tmpfs /tmp",
        *(f"mkdir -p {path} && mount --bind /mnt{path[len('/tmp') :]} {path}" for path in _BELOW_TMP),
        "mount -o remount,bind,ro /",
    ]
)
PLANTS = (
    Plant(
        fault="a truncated op in the cache",
        section="cache",
        said=r"cpu_adam-\w+\.so has 5000 of \d+ bytes",
        remedy="it is compiled again when it is needed",
        prepare=_truncated,
        variables=_OPS_HERE,
    ),
    Plant(
        fault="nvcc of another major version than torch's CUDA",
        section="compilers",
        said=r"nvcc .*but torch is built for CUDA 11\.8",
        remedy="set CUDA_HOME to a CUDA 11 toolkit",
        prepare=_torch_for_cuda_12,
        variables={"PYTHONPATH": "{folder}:" + str(ROOT), "CUDA_HOME": None, "CUDA_PATH": None},
    ),
    Plant(
        fault="`/dev/shm` of 64 MB",
        section="machine",
        said="/dev/shm 64 MiB free of 64 MiB",
        remedy="--shm-size",
        shell="mount -t tmpfs -o size=64m tmpfs /dev/shm",
    ),
    Plant(
        fault="a full disk where ops are compiled",
        section="cache",
        said="room .* free in {folder}, and compiling takes 16 MiB",
        remedy="make room there, or set TORCH_EXTENSIONS_DIR",
        shell=_FULL,
        variables=_OPS_HERE,
    ),
    Plant(
        fault="a full disk at the checkpoints' folder (`--path`)",
        section="disk",
        said="{folder} full: .* of 64 MiB, tmpfs",
        remedy="make room in {folder}: checkpoints",
        shell=_FULL,
        arguments=("--path", "{folder}"),
    ),
    Plant(
        fault="a full disk at one of two NVMe paths (`--path` twice)",
        section="disk",
        said="{folder} full: .* of 64 MiB, tmpfs",
        remedy="what is offloaded there may not fit",
        shell=_FULL,
        arguments=("--path", "/", "--path", "{folder}"),
    ),
    Plant(
        fault="no C++ compiler",
        section="compilers",
        said=r"c\+\+ there is no c\+\+, g\+\+ or clang\+\+ on PATH",
        remedy=r"install a C\+\+17 compiler \(Debian: apt-get install g\+\+\) or set CXX",
        variables={"PATH": "/nowhere", "CXX": None},
    ),
    Plant(
        fault="a C++ compiler that is too old",
        section="compilers",
        said="does not compile what ops are made of: .*unrecognized command line option '-std=c..17'",
        remedy=r"install a newer C\+\+17 compiler .* and set CXX",
        prepare=_old_compiler,
        variables={"CXX": "{folder}/g++"},
    ),
    Plant(
        fault="`ulimit -n 64`",
        section="machine",
        said="open files 64",
        remedy="ulimit -n 65536",
        shell="ulimit -n 64",
    ),
    Plant(
        fault="nonsense in `TORCH_CUDA_ARCH_LIST`, with a torch for the CPU",
        section="variables",
        said="TORCH_CUDA_ARCH_LIST 8.0;banana",
        remedy="'banana' is neither a capability such as 8.0.*correct the list, or unset it",
        variables={"TORCH_CUDA_ARCH_LIST": "8.0;banana"},
    ),
    Plant(
        fault="a wheel of another torch",
        section="ops",
        said="cpu_adam installed, but .*cpu_adam.so does not load: .*undefined symbol: aoti_torch_of_tomorrow",
        remedy="install a wheel that was made for this torch",
        prepare=_wheel_of_another_torch,
        variables={"PYTHONPATH": "{folder}"},
    ),
    Plant(
        fault="`HOME` unset, for a user without an entry",
        section="cache",
        said="folder HOME is not set, and user 4242 has no entry .*: {folder}/tmp/deepspeedlite-4242 is used",
        remedy="set TORCH_EXTENSIONS_DIR",
        prepare=_home,
        variables={"HOME": None, **_NO_HOME},
        uid=USER,
    ),
    Plant(
        fault="`HOME` that may not be entered",
        section="cache",
        said="folder {folder}/locked/.*Permission denied.*: {folder}/tmp/deepspeedlite-4242 is used",
        remedy="set TORCH_EXTENSIONS_DIR",
        prepare=_home,
        variables={"HOME": "{folder}/locked", **_NO_HOME},
        uid=USER,
    ),
    Plant(
        fault="`HOME` that is read-only",
        section="cache",
        said="folder {folder}/home/.* cannot be written.*: {folder}/tmp/deepspeedlite-0 is used",
        remedy="set TORCH_EXTENSIONS_DIR",
        prepare=_home,
        shell="mount -t tmpfs -o ro tmpfs {folder}/home",
        variables={"HOME": "{folder}/home", **_NO_HOME},
    ),
    Plant(
        fault="own name that does not resolve",
        section="network",
        said="own name dsl-planted has no address",
        remedy="/etc/hosts",
        prepare=_names(""),
        shell=_HOSTNAME,
    ),
    Plant(
        fault="own name that is 127.0.1.1",
        section="network",
        said="own name dsl-planted is 127.0.1.1, which only this machine reaches",
        remedy="/etc/hosts",
        prepare=_names("127.0.1.1 dsl-planted\n"),
        shell=_HOSTNAME,
    ),
    Plant(
        fault="a user without the right to the cache",
        section="cache",
        said="folder {folder}/home/deepspeedlite cannot be written.*: no op is compiled",
        remedy="set TORCH_EXTENSIONS_DIR to a folder of your own",
        prepare=_home,
        variables={"TORCH_EXTENSIONS_DIR": "{folder}/home"},
        uid=USER,
    ),
    Plant(
        fault="locale C, and a path with letters beyond ASCII",
        section="software",
        said="locale ascii: names of files and text beyond ASCII are not understood",
        remedy="export LC_ALL=C.UTF-8",
        prepare=_unicode,
        variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        arguments=("--path", "{folder}/Zürich"),
    ),
    Plant(
        fault="a seccomp filter that forbids io_uring",
        section="disk",
        said="io_uring blocked: Operation not permitted",
        remedy="let the container's seccomp profile allow io_uring_setup",
        before=(sys.executable, __file__, "--without-io-uring"),
    ),
    Plant(
        fault="no `/sys/fs/cgroup`",
        section="machine",
        said="control groups /sys/fs/cgroup is not there",
        remedy="OMP_NUM_THREADS",
        shell="mount -t tmpfs tmpfs /sys/fs/cgroup",
    ),
    Plant(
        fault="a container with a read-only root and a `/tmp` of 64 MB",
        section="machine",
        said="root the root file system is mounted read-only",
        remedy="mount writable folders",
        shell=_NEW_TMP,
        variables={"TORCH_EXTENSIONS_DIR": None, "TMPDIR": None},
    ),
    Plant(
        fault="a read-only root without any folder that can be written",
        section="machine",
        said="temporary files /tmp and the current folder cannot be written",
        remedy="--tmpfs /tmp",
        shell=f"{_NEW_TMP} && mount -o remount,ro /tmp && mount -t tmpfs -o ro tmpfs /dev/shm",
        variables={"TMPDIR": None},
    ),
)


def report(plant: Plant, folder: Path, whole: bool = False) -> Outcome:
    """Plant it and ask: the section that is to name it, or all of the report."""
    folder.chmod(0o755)
    if lacking := plant.prepare(folder):
        return Outcome([], 0.0, 0.0, lacking)

    def here(text: str) -> str:
        return text.replace("{folder}", str(folder))

    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, value in plant.variables.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = here(value)
    user = as_user(plant.uid) if plant.uid is not None else []
    asked = [] if whole else ["--only", plant.section]
    command = [sys.executable, "-m", "deepspeedlite.env_report", "--json", *asked, *map(here, plant.arguments)]
    search = shutil.which("env") or "env"
    command = [*user, search, f"PATH={variables['PATH']}", *plant.before, *command]
    shell = f'set -e\n{here(plant.shell)}\nexec "$@"'
    started_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [shutil.which("unshare") or "unshare", "-mu", "/bin/sh", "-c", shell, "sh", *command],
        capture_output=True,
        text=True,
        cwd=folder,  # not the checkout, whose package would go before that of PYTHONPATH
        env={**variables, "PATH": os.environ["PATH"]},
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = time.monotonic() - started_s
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    try:
        rows = [Row(**row) for row in json.loads(done.stdout)["rows"]]
    except ValueError:
        raise AssertionError(f"{plant.fault}: no report: {done.stdout}{done.stderr}") from None
    assert "Traceback" not in done.stderr, done.stderr
    named = [
        row
        for row in rows
        if row.section == plant.section
        and row.status in (WARN, BAD)
        and re.search(here(plant.said), f"{row.name} {row.value}")
        and re.search(here(plant.remedy), row.remedy)
    ]
    return Outcome(named, took_s, cpu_s, "" if named else f"not named, of {[*map(str, rows)]}")


def _forbid_io_uring() -> None:
    """A filter of system calls (seccomp(2)) that answers io_uring_setup with EPERM and lets all others pass."""

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))

    load_number, equal, leave = 0x20, 0x15, 0x06
    rules = [(load_number, 0, 0, 0), (equal, 0, 1, 425), (leave, 0, 0, 0x00050001), (leave, 0, 0, 0x7FFF0000)]
    filters = (Instruction * len(rules))(*(Instruction(*rule) for rule in rules))
    program = Program(len(rules), filters)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "prctl")


def main(words: list[str]) -> None:
    """Print the table: each fault, whether it is named, and how long the whole report takes."""
    if words[:1] == ["--without-io-uring"]:
        _forbid_io_uring()
        os.execvp(words[1], words[1:])
    print("| fault | named | seconds | of a processor | what is said |\n|---|---|---|---|---|")
    for plant in PLANTS:
        if not all(word in plant.fault for word in words):
            continue
        with tempfile.TemporaryDirectory(prefix="dsl-") as folder:
            found = report(plant, Path(folder), whole=True)
            said = [f"`{row.name}`: {row.value} → {row.remedy}".replace(folder, "FOLDER") for row in found.rows[:1]]
        verdict = "yes" if found.rows else "**no**"
        text = (said or [found.lacking])[0].replace(str(ROOT), "CHECKOUT").replace("|", "\\|")
        print(f"| {plant.fault} | {verdict} | {found.took_s:.1f} | {found.cpu_s:.1f} | {text} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
