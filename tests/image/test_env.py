"""The environments of images and the tool around them, as far as that goes without a Docker engine."""

from __future__ import annotations

import base64
import difflib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT
from programs import program

yaml = pytest.importorskip("yaml", reason="needs pyyaml (make venv-dev)")

from env import buildkit  # noqa: E402
from env.build import check_space  # noqa: E402
from env.environment import check_constraints, load, names, read  # noqa: E402
from env.errors import ImageError  # noqa: E402
from env.images import Choice, arguments  # noqa: E402
from env.steps import follow  # noqa: E402

CPU = (ROOT / "env" / "cpu.yaml").read_text()
CUDA = (ROOT / "env" / "cuda-13.0.yaml").read_text()


def env(*words: str, fails: bool = False, **variables: str) -> str:
    command = [sys.executable, "-m", "env", *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert bool(done.returncode) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_environment_is_well_formed(name):
    found = load(name)
    assert name.startswith(found.accelerator)
    assert not found.version or name.endswith(found.version)
    assert (ROOT / found.dockerfile).is_file()


@pytest.mark.parametrize("name", names())
def test_every_argument_is_one_of_its_dockerfile(name):
    """Docker only warns of a build argument that no ARG declares: a typing error would be silent."""
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / load(name).dockerfile).read_text(), re.MULTILINE))
    given = set(arguments(load(name), Choice(torch_spec="torch==2.13.0+cpu", max_jobs="2")))
    assert given <= declared
    assert declared - given <= {"DS_BUILD_OPS", "PIP_NO_CACHE_DIR"}


FAULTS = [
    (CPU.replace("python:", "pyhton:"), r":6: pyhton: there is no such key; did you mean python\?"),
    (CPU.replace("  run:", "  runs:"), r":5: base.runs: there is no such key; did you mean run\?"),
    (CPU.replace("  run:", "  runs:"), r":3: base.run: is missing"),
    (CPU.replace('"3.11"', "3.11"), r':6: python: must be text; put it in quotes: "3.11"'),
    (CPU.replace("debian:bookworm-slim\n  run", "debian\n  run"), r":4: base.build: 'debian' names no version"),
    (CPU.replace("bookworm-slim", "latest"), r":4: base.build: .* names no version.*\n.*:5: base.run"),
    (CPU.replace("torch==2.13.0+cpu", "torch>=2.10"), r":8: torch.spec: 'torch>=2.10' is no exact version"),
    (CPU.replace("torch==2.13.0+cpu", "torch==2.9.1"), r":8: torch.spec: .* too old: deepspeedlite needs torch 2.10"),
    (CPU.replace("https", "htps"), r":9: torch.index: "),
    (CPU + "ops: [cpu_adm]\n", r":10: ops.0: 'cpu_adm' is no op; did you mean cpu_adam\?"),
    (CPU + "python: '3.12'\n", r":10: python: is on line 6 already"),
    (CPU + "archs: ['9.0']\n", r":1: archs and version are for GPUs"),
    (CPU + "labels: {org.opencontainers.image.version: '1'}\n", r":1: labels: .* is set by the build itself"),
    (CUDA.replace("12.0+PTX", "gfx90a"), r":1: archs: gfx90a is none of cuda; write 9.0"),
    (CUDA.replace('version: "13.0"\n', ""), r":1: accelerator cuda needs version and archs"),
    (CPU.replace("accelerator: cpu", "accelerator: tpu"), r":2: accelerator: Input should be 'cpu', 'cuda' or 'rocm'"),
    (CPU.replace("base:", "base: ["), r":\d+: not valid YAML"),
    ("", r":1: not an environment"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_told_with_file_line_and_key(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ImageError) as raised:
        read(path)
    assert re.search(str(path) + message, str(raised.value)), raised.value


def test_check_names_every_fault_of_every_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CPU.replace("python:", "pyhton:").replace("  run:", "  runs:"))
    said = env("check", str(path), "no-such", fails=True)
    assert len(re.findall(rf"^{path}:\d+: ", said, re.MULTILINE)) == 4
    assert "there is no environment no-such" in said and "well formed" not in said
    assert re.search("^cpu, cuda-12.9, cuda-13.0, .* and constraints/python.txt are well formed", env("check"))


def test_list_and_show():
    assert re.search(r"^cuda-13.0 +cuda 13.0 +3.12 +torch==", env("list"), re.MULTILINE)
    shown = json.loads(env("show", "rocm-7.1", "--archs", "gfx90a"))
    assert (shown["dockerfile"], shown["PYTORCH_ROCM_ARCH"]) == ("Dockerfile.rocm", "gfx90a")
    assert "did you mean cuda-13.0?" in env("show", "cuda-13", fails=True)


def test_a_python_without_what_the_tool_needs_is_told_where_to_get_it():
    command = [sys.executable, "-S", "-m", "env", "list"]  # -S: without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"has no (yaml|pydantic): make venv-dev, then \. \.venv", done.stderr)


@pytest.mark.slow
def test_what_the_matrix_is_told_of_one_environment_names_it():
    for option in ("--base", "--run-base", "--archs"):
        for wrong in ("8.0", "cpu=", "no-such=9.0"):
            said = env("matrix", option, wrong, fails=True)
            assert f"{wrong}: write it as NAME=VALUE; the names are cpu, cuda-12.9" in said


def test_a_base_of_ones_own_brings_its_own_python():
    given = arguments(load("cuda-13.0"), Choice(base="mine:1"))
    assert (given["BASE_IMAGE"], given["RUNTIME_IMAGE"], given["PYTHON_VERSION"]) == ("mine:1", "mine:1", "")
    given = arguments(load("cuda-13.0"), Choice(with_jit=True))
    assert given["RUNTIME_IMAGE"] == given["BASE_IMAGE"], "nvcc is in the one that builds"
    given = arguments(load("cpu"), Choice(with_jit=True))
    assert (given["PYTHON_VERSION"], given["WITH_JIT"]) == ("3.11", "1")


CONSTRAINT_FAULTS = [
    ("numpy==2.4.6", "numpy>=2", r":\d+: numpy>=2: pins no version"),
    ("numpy==2.4.6", "numpy==1.22", r"numpy==1.22 is not the numpy>=1.23"),
    ("numpy==2.4.6\n", "", r"pyproject.toml needs numpy, and no line pins it"),
    ("numpy==2.4.6", "torch==2.13.0\nnumpy==2.4.6", r":\d+: torch is pinned by each environment's torch.spec"),
    ("numpy==2.4.6", "numpy==2.4.6\nnumpy==2.4.6", r":\d+: numpy is pinned already"),
]


@pytest.mark.parametrize(("old", "new", "message"), CONSTRAINT_FAULTS)
def test_constraints_are_compared_with_what_the_package_needs(old, new, message, tmp_path):
    text = (ROOT / "env" / "constraints" / "python.txt").read_text()
    assert old in text and not check_constraints()
    path = tmp_path / "python.txt"
    path.write_text(text.replace(old, new))
    assert re.search(message, "\n".join(check_constraints(path)))


# --- Dockerfiles and contexts -----------------------------------------------------------------------------------------


def test_both_dockerfiles_have_one_shape():
    """Lines that differ say so: they name an accelerator, its bases, archs, tools or torch."""
    both = [(ROOT / f"Dockerfile.{kind}").read_text().splitlines() for kind in ("cuda", "rocm")]
    differing = [line[1:] for line in difflib.unified_diff(*both, n=0, lineterm="") if line[0] in "+-"][2:]
    named = re.compile(r"cuda|nvidia|rocm|amd|RUNTIME_IMAGE=ubuntu|TORCH_SPEC|TORCH_INDEX|ACCELERATOR|setuptools", re.I)
    assert differing and not [line for line in differing if not named.search(line)]


@pytest.mark.parametrize("name", ["Dockerfile.cuda", "Dockerfile.rocm"])
def test_the_step_that_compiles_has_all_modules_that_it_imports(name, tmp_path):
    """It is copied few files, so that it comes from the cache while other Python code changes."""
    before, compiles, _ = (ROOT / name).read_text().partition("--compile-only")
    assert compiles
    for sources, target in re.findall(
        r"^COPY (deepspeedlite/.*|csrc|tools/.*|setup.py .*) (\S+)$", before, re.MULTILINE
    ):
        for source in map(ROOT.joinpath, sources.split()):
            folder = tmp_path / target
            if source.is_dir():
                shutil.copytree(source, folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder)
    code = "import sys; sys.path.insert(0, '.'); import deepspeedlite.ops.op_builder, deepspeedlite.ops.op_builder.jit"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_context_is_the_same_whatever_the_checkouts_times_and_permissions(tmp_path, monkeypatch):
    pytest.importorskip("docker", reason="needs the docker SDK (make venv-dev)")
    from image_bed import copy_of_checkout

    from env import context

    packed = []
    for number, (mode, time_s) in enumerate([(0o600, 1e9), (0o664, 1.5e9)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkout = copy_of_checkout(folder)
        (checkout / "deepspeedlite" / "engine.py").chmod(mode)
        os.utime(checkout / "deepspeedlite" / "engine.py", (time_s, time_s))
        (checkout / "deepspeedlite" / "left.so").write_text("of an earlier build")
        (checkout / "secret").write_text("which no Dockerfile copies")
        monkeypatch.setattr(context, "ROOT", checkout)
        with context.pack("Dockerfile.cuda", None) as file:
            packed.append(file.read())
    assert packed[0] == packed[1]
    with tarfile.open(fileobj=io.BytesIO(packed[0])) as tar:
        sent = tar.getnames()
    assert {"deepspeedlite/left.so", "secret"}.isdisjoint(sent) and "deepspeedlite/engine.py" in sent


# --- the engine's stream, and errors ----------------------------------------------------------------------------------


def stream(*texts: str) -> list[dict[str, str]]:
    return [{"stream": text} for text in texts]


def test_steps_are_lines_with_what_they_took():
    said: list[str] = []
    messages = stream(
        "Step 1/3 : ARG A", " ---> 1", "Step 2/3 : FROM base", "Step 3/3 : RUN  make \\\n   it", " ---> Using cache\n"
    )
    image, steps = follow([*messages, {"aux": {"ID": "sha256:1"}}], said.append)
    assert image == "sha256:1" and [step.cached for step in steps] == [False, False, True]
    assert [re.sub(r" +", " ", line) for line in said] == ["[ 2/3] 0.0 s FROM base", "[ 3/3] cached RUN make it"]


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("write /x: no space left on device", "docker system prune -a frees it"),
        ("manifest for nvidia/cuda:99 not found: manifest unknown", "not in its registry.*--base"),
        ("Get https://registry-1.docker.io/v2/: dial tcp: lookup x: no such host", "cannot be reached.*local_base.sh"),
    ],
)
def test_a_failing_step_is_shown_with_its_last_lines_and_the_remedy(problem, remedy):
    messages = [*stream("Step 1/2 : FROM a", "Step 2/2 : RUN x", *map(str, range(100))), {"error": problem}]
    with pytest.raises(ImageError) as raised:
        follow(messages, lambda line: None)
    lines = str(raised.value).splitlines()
    assert lines[0] == "step 2 of 2 failed: RUN x" and lines[-2] == problem
    assert [line.strip() for line in lines[1:-2]] == [str(n) for n in range(80, 100)]
    assert re.search(remedy, lines[-1])


def test_no_engine_and_no_permission_are_told_with_the_remedy(tmp_path):
    pytest.importorskip("docker", reason="needs the docker SDK (make venv-dev)")
    nowhere = f"unix://{tmp_path}/none.sock"
    said = env("build", "cpu", fails=True, DOCKER_HOST=nowhere)
    assert (
        f"no Docker engine answers at {nowhere}; see whether DOCKER_HOST is right" in said and "Traceback" not in said
    )


def test_too_little_space_is_told_before_anything_is_built(tmp_path, monkeypatch):
    class Engine:
        def info(self) -> dict[str, str]:
            return {"DockerRootDir": str(tmp_path)}

    wanted = {"ACCELERATOR": "cuda", "TORCH_SPEC": "torch==2.13.0"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 30))
    check_space(Engine(), wanted, bases_here=True)
    with pytest.raises(ImageError, match=r"has 21.5 GB left, and .* takes up to 27 GB: docker system prune"):
        check_space(Engine(), wanted, bases_here=False)
    check_space(Engine(), {**wanted, "TORCH_SPEC": "torch==2.13.0+cpu"}, bases_here=False)


# --- BuildKit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_the_classic_builder_sees_no_mounts_and_buildkit_all_of_them(kind):
    text = (ROOT / f"Dockerfile.{kind}").read_text()
    assert "--mount" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    sent = buildkit.with_mounts(text)
    mount = "--mount=type=cache,target=/root/.cache/pip"
    assert len(re.findall(rf"^RUN {mount} .*pip", sent.replace("\\\n", ""), re.MULTILINE)) == text.count(mount) == 3
    assert "# buildkit:" not in re.sub(r"^# .*`# buildkit:`.*$", "", sent, flags=re.MULTILINE), "none was left"


def trace(*parts: tuple[int, dict[int, object]]) -> dict[str, str]:
    """A message of BuildKit's, encoded as its protocol has it; all of it is shorter than 128 bytes."""

    def encoded(number: int, value: object) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        data = value.encode() if isinstance(value, str) else b"".join(encoded(*item) for item in value.items())
        return bytes([number << 3 | 2, len(data)]) + data

    packed = b"".join(encoded(number, value) for number, value in parts)
    return {"id": "moby.buildkit.trace", "aux": base64.b64encode(packed).decode()}


def vertex(digest: str, name: str, **more: object) -> tuple[int, dict[int, object]]:
    numbers = {"cached": 4, "started": 5, "completed": 6, "error": 7}
    return 1, {1: digest, 3: name, **{numbers[key]: value for key, value in more.items()}}


TIME: dict[int, object] = {1: 100, 2: 7}


def test_buildkits_steps_are_lines_that_come_when_each_ends():
    said: list[str] = []
    make, copy = "[wheel  1/12] RUN --mount=type=cache,target=/c make", "[run 2/9] COPY a b"
    messages = [
        trace(vertex("i", "[internal] load metadata", started=TIME, completed=TIME)),
        trace(vertex("a", make), vertex("b", copy)),
        trace(vertex("a", make, started=TIME), vertex("b", copy, cached=1, started=TIME, completed=TIME)),
        trace((3, {1: "a", 2: TIME, 3: 1, 4: "\x1b[1mhello\n"})),
        *[trace(vertex("a", make, started=TIME, completed=TIME))] * 2,
        {"id": "moby.image.id", "aux": {"ID": "sha256:1"}},
    ]
    image, steps = buildkit.follow(messages, said.append, verbose=True)
    assert image == "sha256:1" and sorted(step.cached for step in steps) == [False, True]
    lines = ["[run 2/9] cached COPY a b", " hello", "[wheel 1/12] 0.0 s RUN make"]
    assert [re.sub(r" +", " ", line) for line in said] == lines


def test_of_buildkits_steps_the_one_that_failed_is_told_and_not_those_that_were_stopped():
    problem = "process x did not complete successfully: exit code: 7"
    messages = [
        trace(vertex("a", "[x 1/2] RUN y", started=TIME), vertex("b", "[z 1/2] RUN w", started=TIME)),
        trace((3, {1: "a", 4: "the reason"})),
        trace(vertex("a", "[x 1/2] RUN y", started=TIME, completed=TIME, error=problem)),
        trace(vertex("b", "[z 1/2] RUN w", started=TIME, completed=TIME, error="context canceled")),
        {"error": problem},
    ]
    with pytest.raises(ImageError, match=r"^step 1 of 2 of stage x failed: RUN y\n    the reason\nexit status 7$"):
        buildkit.follow(messages, lambda line: None)
    with pytest.raises(ImageError, match="DOCKER_BUILDKIT=0"):
        buildkit.follow([{"error": "failed to solve: no active sessions"}], lambda line: None)


@pytest.mark.parametrize(
    ("asked", "engine", "by_buildkit"), [("", "2", True), ("", "1", False), ("0", "2", False), ("1", "1", True)]
)
def test_which_builder_it_is_follows_dockers_own_rule(asked, engine, by_buildkit, monkeypatch):
    monkeypatch.setenv("DOCKER_BUILDKIT", asked)
    answer = SimpleNamespace(headers={"Builder-Version": engine})
    api = SimpleNamespace(base_url="http://engine", get=lambda url: answer if url == "http://engine/_ping" else None)
    assert buildkit.wanted(SimpleNamespace(api=api)) is by_buildkit


# --- what the build stage checks --------------------------------------------------------------------------------------


def wheel_with(path: Path, *names: str) -> Path:
    made = path / "deepspeedlite-0.1.0-py3-none-any.whl"
    usual = (
        "deepspeedlite/ops/op_builder/spec.py",
        "deepspeedlite/ops/csrc/common/isa.h",
        "deepspeedlite-0.1.0.dist-info/licenses/LICENSE",
    )
    with zipfile.ZipFile(made, "w") as wheel:
        for name in (*usual, *names):
            wheel.writestr(name, "")
    return made


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tests/test_x.py"], "tests/test_x.py does not belong in a wheel"),
        (["deepspeedlite/notes.txt"], "deepspeedlite/notes.txt is no file of a package"),
        ([], None),
    ],
)
def test_stray_files_stop_the_build(names, message, tmp_path):
    check = [sys.executable, ROOT / "env" / "image" / "check_wheel.py", wheel_with(tmp_path, *names)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert (done.returncode, message in done.stderr if message else True) == (int(message is not None), True), (
        done.stderr
    )


@pytest.mark.slow
def test_a_wheel_without_a_gpu_that_was_asked_for_stops_the_build(cuobjdump, tmp_path):
    """One op, compiled by nvcc for one GPU."""
    make = [sys.executable, ROOT / "tools" / "make_wheel.py", "--accel", "cuda", "--ops", "utils", "--archs", "9.0"]
    subprocess.run([*make, "--untagged", "--out", tmp_path], check=True, capture_output=True)
    [made] = tmp_path.glob("*.whl")
    check = [sys.executable, ROOT / "env" / "image" / "check_wheel.py", made, "--accel", "cuda"]
    for archs, missing in (
        ("9.0", ""),
        ("8.0;9.0+PTX", r"utils.so has no code for ptx_90\n.*utils.so has no code for sm_80"),
    ):
        done = subprocess.run([*check, "--archs", archs], capture_output=True, text=True)
        assert done.returncode == int(bool(missing)), done.stderr
        assert re.search(missing, done.stderr)


@pytest.mark.slow
def test_the_same_sources_make_the_same_wheel_to_the_byte(tmp_path):
    """Whatever the folder of compiled objects and the time of day: what images promise by SOURCE_DATE_EPOCH."""
    program("c++")
    make = [sys.executable, ROOT / "tools" / "make_wheel.py", "--ops", "cpu_adam", "--untagged"]
    made = []
    for number in range(2):
        out = tmp_path / f"out{number}"
        options = ["--keep", tmp_path / f"objects{number}", "--out", out]
        variables = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "DS_BUILD_OPS": "1"}  # as in the Dockerfiles
        variables["CCACHE_DISABLE"] = "1"  # else the second one's objects might be the first one's
        subprocess.run([*make, *options], check=True, capture_output=True, env=variables)
        [wheel] = out.glob("*.whl")
        made.append(wheel.read_bytes())
    assert made[0] == made[1]
    libraries = [name for name in zipfile.ZipFile(io.BytesIO(made[0])).namelist() if name.endswith(".so")]
    assert libraries == ["deepspeedlite/ops/lib/cpu_adam.so"], "no other than was asked for"
