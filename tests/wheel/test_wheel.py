"""Wheels: what is in them, that they run where no compiler is, and every way of asking for one.

One wheel for CUDA is made for the whole session, by nvcc and a torch that may be for the CPU, and one for ROCm: this is
also where every kernel is compiled for GPUs, with warnings as errors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT
from programs import needs, program

from deepspeedlite.compat.drop_in import VERSION as STAND_IN_VERSION
from deepspeedlite.ops.op_builder import OPS, OpBuildError, wheel

HERE = list(OPS.values())
ON_GPU = [spec for spec in HERE if spec.gpu]
# The wheel of all ops for two GPUs takes some minutes beside other tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs("c++")]


def environment(**variables: str) -> dict[str, str]:
    """This one, without anything that says what to compile."""
    ours = ("DS_", "TORCH_CUDA", "PYTORCH_ROCM", "MAX_JOBS")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **variables}


def run(*command: str | Path, cwd: Path = ROOT, fails: bool = False, **variables: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True)
    assert bool(done.returncode) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_wheel(out: Path, *arguments: str, **variables: str) -> Path:
    run(sys.executable, "tools/make_wheel.py", "--out", out, *arguments, **variables)
    [made] = out.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def cuda_wheel(tmp_path_factory) -> Path:
    program("nvcc")
    before = {path.name for folder in (ROOT, ROOT / "deepspeedlite" / "ops") for path in folder.iterdir()}
    strict = {"NVCC_APPEND_FLAGS": "-Werror all-warnings"}
    made = make_wheel(tmp_path_factory.mktemp("cuda"), "--accel", "cuda", "--archs", "8.0;9.0", **strict)
    after = {path.name for folder in (ROOT, ROOT / "deepspeedlite" / "ops") for path in folder.iterdir()}
    assert after <= before | {"__pycache__"}, "nothing is left in the checkout"
    return made


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Callable[[Path], Path]:
    """A new environment that has a wheel, and of this one all but the checkout."""

    def install(made: Path) -> Path:
        home = tmp_path_factory.mktemp("env")
        run(sys.executable, "-m", "venv", "--without-pip", home)
        [site] = home.glob("lib/python*/site-packages")
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # a .pth there, the editable one, is not read
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, made)
        return home / "bin" / "python"

    return install


@pytest.fixture(scope="session")
def cuda_python(cuda_wheel, fresh) -> Path:
    return fresh(cuda_wheel)


def package_of(python: Path) -> Path:
    [package] = python.parent.parent.glob("lib/python*/site-packages/deepspeedlite")
    return package


def test_one_small_wheel_for_every_python(cuda_wheel):
    assert re.fullmatch(r"deepspeedlite-[\d.]+\+cu\d+-cp310-abi3-manylinux_2_\d+_\w+\.whl", cuda_wheel.name)
    assert cuda_wheel.stat().st_size < 5 << 20
    with zipfile.ZipFile(cuda_wheel) as made:
        names = {name.removeprefix("deepspeedlite/ops/") for name in made.namelist()}
        record = json.loads(made.read("deepspeedlite/ops/lib/record.json"))
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {f"lib/{spec.name}.so" for spec in HERE}
    sources = {f"csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"op_builder/spec.py"} <= names
    assert "deepspeedlite/compat/drop_in/deepspeed_names.json" in names
    stand_in = "deepspeedlite/drop_in/stand_in/deepspeed"
    assert {f"{stand_in}/__init__.py", f"{stand_in}-{STAND_IN_VERSION}.dist-info/METADATA"} <= names
    commit = run("git", "rev-parse", "HEAD").strip() if (ROOT / ".git").exists() else "unknown"
    assert (record["accelerator"], record["archs"]) == ("cuda", ["8.0", "9.0"])
    assert record["git"].removesuffix("-dirty") == commit
    assert set(record["ops"]) == {spec.name for spec in HERE}


def test_it_has_code_for_every_gpu_asked_for(cuda_python, cuobjdump):
    for spec in ON_GPU:
        assert cuobjdump(package_of(cuda_python) / "ops" / "lib" / f"{spec.name}.so") == {"sm_80", "sm_90"}


def test_libraries_are_stripped(cuda_python):
    elffile = pytest.importorskip("elftools.elf.elffile")
    for spec in HERE:
        with (package_of(cuda_python) / "ops" / "lib" / f"{spec.name}.so").open("rb") as file:
            assert elffile.ELFFile(file).get_section_by_name(".symtab") is None


CALL_EVERYTHING = """
import os, sys, torch
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode
from deepspeedlite.ops import load, op_builder
from deepspeedlite.ops.adam import DeepSpeedCPUAdam, FusedAdam

VALUES = {"List[Tensor]": lambda: [torch.empty(4)], "Optional[Tensor]": lambda: None, "Tensor": lambda: torch.empty(4),
          "float": lambda: 1.0, "int": lambda: 1, "bool": lambda: True}
faked = 0
for spec in op_builder.OPS.values():
    assert op_builder.built(spec) == op_builder.installed_libraries()[spec.name]
    for name in spec.ops:
        op = load(name)
        types = [str(argument.type) for argument in op.default._schema.arguments]
        if not op.default._schema.returns and set(types) <= set(VALUES):
            with FakeTensorMode():
                assert op(*[VALUES[type]() for type in types]) is None
            faked += 1
for kind in (DeepSpeedCPUAdam, FusedAdam):
    ours, theirs = (torch.nn.Parameter(torch.arange(5.0)) for _ in range(2))
    ours.grad = theirs.grad = torch.ones(5)
    kind([ours], lr=0.1).step()
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0).step()
    torch.testing.assert_close(ours, theirs)
assert not Path(os.environ["TORCH_EXTENSIONS_DIR"]).exists()
print(faked, "called, of", op_builder.read_record().accelerator)
"""


def check_without_compiler(python: Path, folder: Path) -> str:
    variables = {"PATH": "", "TORCH_EXTENSIONS_DIR": str(folder / "cache"), "HOME": str(folder)}
    if prefix := os.environ.get("PYTHONPYCACHEPREFIX"):  # else all of torch's bytecode is made anew
        variables["PYTHONPYCACHEPREFIX"] = prefix
    done = subprocess.run([python, "-c", CALL_EVERYTHING], env=variables, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_where_there_is_no_compiler(cuda_python, tmp_path):
    called, accelerator = re.findall(r"(\d+) called, of (\w+)", check_without_compiler(cuda_python, tmp_path))[0]
    assert int(called) >= 6 and accelerator == "cuda"


ANOTHER_CUDA = """
import torch
from deepspeedlite.runtime.errors import OpError
from deepspeedlite.ops import load
{patch}
load("cpu_adam")  # has nothing for GPUs
try:
    load("fused_adam")
except OpError as error:
    print(error)
"""
OTHER_GPU = """
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda.get_device_properties = lambda device: __import__("types").SimpleNamespace(major=12, minor=0)
"""


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        (
            'torch.version.cuda = "12.8"',
            r"wheel has CUDA 1[3-9]\.\d, but torch was built with CUDA 12\.8.*DS_SKIP_CUDA",
        ),
        (OTHER_GPU, r"this GPU is 12\.0, but the deepspeedlite wheel has kernels for 8\.0, 9\.0 alone.*make wheel"),
    ],
)
def test_a_torch_or_a_gpu_that_it_is_not_for_is_told_so(patch, expected, cuda_python, tmp_path):
    """The GPU and the CUDA torch are made up: what is tested is that loading asks them."""
    code = ANOTHER_CUDA.format(patch=patch)
    assert re.search(expected, run(cuda_python, "-c", code, cwd=tmp_path))


def test_an_installed_package_compiles_what_it_did_not_bring(cuda_python, tmp_path):
    code = (
        "import sys; from deepspeedlite.ops import op_builder as b, load; b.jit.prebuilt = lambda *_: None\n"
        "load('cpu_adam'); print(b.built(b.OPS['cpu_adam']))"
    )
    said = run(cuda_python, "-c", code, cwd=tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert re.search(rf"{tmp_path}/cache/deepspeedlite/cpu_adam-\w+\.so", said)


@needs("hipcc")
def test_a_wheel_for_rocm_links_and_loads_into_a_cpu_torch(fresh, tmp_path):
    strict = {"HIPCC_COMPILE_FLAGS_APPEND": "-Werror"}
    made = make_wheel(tmp_path / "out", "--accel", "rocm", "--archs", "gfx90a", **strict)
    assert "+rocm" in made.name
    python = fresh(made)
    for spec in ON_GPU:
        assert b"amdgcn-amd-amdhsa--gfx90a" in (package_of(python) / "ops" / "lib" / f"{spec.name}.so").read_bytes()
    assert "called, of rocm" in check_without_compiler(python, tmp_path)


# --- the ways of building -------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy, since builds by pip and setup.py leave files beside the sources."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "lib", ".*cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


PIP = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", "out"]
WAYS = {
    "pip, isolated from torch": [*PIP, "-v"],
    "setup.py": [sys.executable, "setup.py", "build_ext", "-j8", "bdist_wheel", "--dist-dir", "out"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_building_compiles_once(way, checkout):
    said = run(*WAYS[way], cwd=checkout, DS_BUILD_CPU_ADAM="1", DS_BUILD_STRING="+mine")
    assert len(re.findall(r"^\s*cpu_adam +compiled$", said, re.MULTILINE)) == 1, said
    assert re.search(r"fused_adam +not asked for \(DS_BUILD_FUSED_ADAM=1 does\)", said)
    assert re.search(r"sparse_attn +not asked for \(DS_BUILD_SPARSE_ATTN=1 does\)", said)
    [made] = (checkout / "out").glob("*.whl")
    assert re.fullmatch(r"deepspeedlite-[\d.]+\+mine-cp310-abi3-linux_\w+\.whl", made.name)
    with zipfile.ZipFile(made) as opened:
        assert [Path(name).name for name in opened.namelist() if name.endswith(".so")] == ["cpu_adam.so"]


@pytest.fixture
def own_environment(tmp_path) -> Path:
    """An environment as a user has one: with pip, and with torch and what else is here, but not this package."""
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", home)
    [site] = home.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = ("deepspeedlite", "_deepspeedlite", "__editable__", "pip", "setuptools", "pkg_resources", "_distutils")
        if not entry.name.startswith((*ours, "distutils-")) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return home


DOCUMENTED = {
    "--global-option": 'DS_BUILD_OPS=1 pip install . --global-option="build_ext" --global-option="-j8"',
    "-C--build-option": "DS_BUILD_OPS=1 pip install . -C--build-option=build_ext -C--build-option=-j8",
}


@pytest.mark.parametrize("option", DOCUMENTED)
def test_the_documented_command_compiles_and_installs(option, checkout, own_environment, tmp_path):
    """Verbatim: the first by a pip that has the option, the second by the newest that there is to be had.

    Of the ops one, to be quick: the others' own variables say 0.
    """
    command = DOCUMENTED[option]
    assert command in (ROOT / "docs" / "ops.md").read_text()
    pip = own_environment / "bin" / "pip"
    if option == "--global-option" and option not in run(pip, "install", "--help"):
        pytest.skip("this Python's pip has no --global-option")
    if option != "--global-option":
        newest = [pip, "install", "--upgrade", "--quiet", "pip"]
        if subprocess.run(newest, env=environment(), capture_output=True).returncode:
            pytest.skip("needs a package index, for a new pip")
    path = f"{own_environment / 'bin'}:{os.environ['PATH']}"
    without = {spec.flag: "0" for spec in HERE if spec.name != "cpu_adam"}
    run("bash", "-c", command, cwd=checkout, PATH=path, PYTHONPATH="", **without)
    libraries = package_of(own_environment / "bin" / "python") / "ops" / "lib"
    assert {library.stem for library in libraries.glob("*.so")} == {"cpu_adam"}
    code = "from deepspeedlite.ops import load; print(load('cpu_adam'))"
    said = run(own_environment / "bin" / "python", "-c", code, cwd=tmp_path, PATH="", PYTHONPATH="")
    assert "deepspeedlite.cpu_adam" in said


def test_a_version_that_is_none_is_refused_before_anything_is_compiled(checkout):
    setup = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "out"]
    said = run(*setup, cwd=checkout, fails=True, DS_BUILD_OPS="1", DS_BUILD_STRING="my build")
    assert "error: DS_BUILD_STRING=my build: " in said and "Traceback" not in said
    assert not (checkout / "build").exists()


def test_an_editable_install_has_its_libraries_in_place(checkout, tmp_path):
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    [site] = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps"]
    run(*pip, "--no-build-isolation", "--editable", checkout, DS_BUILD_CPU_ADAM="1", PYTHONPATH=str(site))
    code = "from deepspeedlite.ops import load, op_builder as b; load('cpu_adam'); print(b.built(b.OPS['cpu_adam']))"
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    library = checkout / "deepspeedlite" / "ops" / "lib" / "cpu_adam.so"
    assert run(home / "bin" / "python", "-c", code, cwd=tmp_path, **cache).strip().endswith(str(library))
    header = checkout / "csrc" / "common" / "tile.h"
    header.write_text(header.read_text() + "\n// edited\n")
    assert str(tmp_path / "cache") in run(home / "bin" / "python", "-c", code, cwd=tmp_path, **cache)


def test_the_sdist_has_all_that_a_build_needs(checkout, tmp_path):
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    [made] = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    [source] = (tmp_path / "unpacked").iterdir()
    ops = ROOT / "deepspeedlite" / "ops"
    for path in [*(ROOT / "csrc").rglob("*.*"), *(ops / "op_builder").glob("*.py")]:
        inside = path.relative_to(ops if ops in path.parents else ROOT)
        assert (source / "deepspeedlite" / "ops" / inside).is_file(), path
    said = run(*PIP, "-v", "--no-build-isolation", cwd=source, DS_BUILD_CPU_ADAM="1")
    assert re.search(r"cpu_adam +compiled", said)


# --- what may be asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {}),
        ({"DS_BUILD_OPS": "0"}, {}),
        ({"DS_BUILD_CPU_ADAM": "1"}, {"cpu_adam": True}),
        ({"DS_BUILD_OPS": "0", "DS_BUILD_AIO": "1"}, {"async_io": True}),
        ({"DS_BUILD_OPS": "1"}, dict.fromkeys(OPS, False)),
        (
            {"DS_BUILD_OPS": "1", "DS_BUILD_AIO": "0", "DS_BUILD_UTILS": "1", "DS_BUILD_STRING": "1"},
            {name: name == "utils" for name in OPS if name != "async_io"},
        ),
        ({"DS_BUILD_EVOFORMER_ATTN": "0"}, {}),
    ],
)
def test_an_ops_own_variable_overrides(variables, expected):
    assert wheel.asked_for(variables) == expected


@pytest.mark.parametrize("flag", [spec.flag for spec in OPS.values()])
def test_each_op_has_a_variable(flag):
    [(name, demanded)] = wheel.asked_for({flag: "1"}).items()
    assert OPS[name].flag == flag and demanded
    with pytest.raises(OpBuildError, match=f"{flag}=yes: set it to 0 or 1"):
        wheel.asked_for({flag: "yes"})


def test_what_cannot_be_had_stops_the_build_with_the_reason(checkout):
    setup = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "out"]
    said = run(*setup, cwd=checkout, fails=True, DS_BUILD_EVOFORMER_ATTN="1")
    assert "DS_BUILD_EVOFORMER_ATTN=1 asks for an op that deepspeedlite does not have" in said
    said = run(*setup, cwd=checkout, fails=True, DS_BUILD_OPS="1", MAX_JOBS="many")
    assert "error: MAX_JOBS=many is no number" in said and "Traceback" not in said
    said = run(*setup, cwd=checkout, DS_BUILD_OPS="1", CXX="/no/such/compiler")
    assert re.search(r"cpu_adam +CXX=/no/such/compiler is not a program", said), "all that can be had, here nothing"
    slow = {spec.flag: "0" for spec in HERE if not spec.gpu and spec.name != "cpu_adam"}
    said = run(*setup, cwd=checkout, DS_BUILD_OPS="1", DS_ACCELERATOR="cuda", CUDA_HOME="/no/such/cuda", **slow)
    assert re.search(r"fused_adam +CUDA_HOME=/no/such/cuda has no bin/nvcc", said)
    assert re.search(r"cpu_adam +compiled", said)
