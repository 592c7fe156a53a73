"""`make release-check`: build what a release consists of, and see that each piece works where it is installed.

    python tools/release_check.py [--image IMAGE] [--keep DIR]

The source distribution, a wheel without compiled ops, made from it, and one with every op for the CPU. Of each the
contents and the metadata (twine) are checked; each is installed into an environment of its own, where no compiler is on
PATH, and there env_report must find nothing broken and the self-test of images must pass: imports, every op that it
brings, 20 steps of training on 2 ranks. Each is also installed in a container of IMAGE (deepspeedlite:cpu), which has
no compiler.
Exit status: 0, or 1 if something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SELFTEST = ROOT / "env" / "image" / "selftest.py"
SDIST_FILES = ("LICENSE", "README.md", "pyproject.toml", "setup.py", "deepspeedlite/ops/op_builder/spec.py")
STRAY = (".so", ".o", ".pyc", ".whl", ".log", "~")


class CheckError(Exception):
    """A check's last words."""


def main() -> int:
    """Run every check; a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", default="deepspeedlite:cpu", help="a built CPU image, to install each in")
    parser.add_argument("--keep", type=Path, help="put what was built there, if all is well")
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dsl-release-") as folder:
        scratch = Path(folder)
        for name, check in checks(scratch, chosen.image):
            start_s = time.monotonic()
            try:
                verdict, said = "ok", check()
            except CheckError as error:
                verdict, said, failed = "FAILED", str(error), failed + 1
            print(f"{verdict:<7}{name:<48}{time.monotonic() - start_s:6.1f} s  {said}", flush=True)
        if chosen.keep and not failed:
            shutil.copytree(scratch / "out", chosen.keep, dirs_exist_ok=True)
    return int(failed > 0)


def checks(scratch: Path, image: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and work of every check, in order; what a failed build did not make is not checked."""
    out = scratch / "out"
    yield "build the source distribution", lambda: build_sdist(scratch, out)
    yield "build a wheel from it, without ops", lambda: build_plain_wheel(scratch, out)
    yield "build a wheel with every op for the CPU", lambda: build_cpu_wheel(out)
    pieces = sorted(out.glob("*")) if out.exists() else []
    yield "metadata (twine)", partial(metadata, pieces)
    for piece in pieces:
        kind = "sdist" if piece.suffix == ".gz" else "wheel with ops" if "-abi3-" in piece.name else "plain wheel"
        yield f"{kind}: contents", partial(contents, piece)
        python = scratch / piece.name / "bin" / "python"
        yield f"{kind}: installs in a fresh environment", partial(install, piece, python)
        yield f"{kind}: env_report", partial(report, python)
        yield (
            f"{kind}: self-test without a compiler",
            partial(selftest, [str(python), str(SELFTEST)], python.parent.parent),
        )
        yield f"{kind}: in a container", partial(in_container, piece, image, scratch / "tools")


def run(command: list[str], wanted: str = "", **options: object) -> str:
    """Run to the end; the last line that has `wanted`. Raises CheckError with the last lines."""
    options = {"cwd": ROOT, **options}
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode or not (found := [line for line in lines if wanted in line] or ([""] if not wanted else [])):
        raise CheckError(f"exit status {done.returncode}\n" + "\n".join(lines[-15:]))
    return found[-1].strip() if wanted else ""


# --- building ---------------------------------------------------------------------------------------------------------


def build_sdist(scratch: Path, out: Path) -> str:
    """By setup.py, with its metadata outside of the checkout."""
    scratch.joinpath("info").mkdir()
    metadata = ["egg_info", "--egg-base", str(scratch / "info")]
    run([sys.executable, "-W", "ignore", "setup.py", "--quiet", *metadata, "sdist", "--dist-dir", str(out)])
    [made] = out.glob("*.tar.gz")
    return f"{made.name}, {made.stat().st_size / 1e3:.0f} kB"


def build_plain_wheel(scratch: Path, out: Path) -> str:
    """From the unpacked sdist, by pip in an isolated environment, as whoever has no wheel would."""
    [sdist] = out.glob("*.tar.gz")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(sdist)]
    run(pip, env={**environment, "DS_BUILD_OPS": "0"})
    [made] = out.glob("*-none-any.whl")
    return f"{made.name}, {made.stat().st_size / 1e3:.0f} kB"


def build_cpu_wheel(out: Path) -> str:
    """By `make wheel`'s script, with its manylinux tag."""
    run([sys.executable, "tools/make_wheel.py", "--accel", "cpu", "--out", str(out)])
    [made] = out.glob("*-abi3-manylinux*.whl")
    return f"{made.name}, {made.stat().st_size / 1e3:.0f} kB"


# --- checking ---------------------------------------------------------------------------------------------------------


def metadata(pieces: list[Path]) -> str:
    """What PyPI would refuse, warnings included."""
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, pieces)], env={**os.environ, "NO_COLOR": "1"})
    return f"{len(pieces)} files"


def contents(piece: Path) -> str:
    """No stray files; the licence and the sources of ops are there."""
    if piece.suffix == ".whl":
        return run([sys.executable, "env/image/check_wheel.py", str(piece)], piece.name)
    with tarfile.open(piece) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    sources = [f"deepspeedlite/ops/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*")]
    faults = [f"{name} is missing" for name in (*SDIST_FILES, *sources) if name not in names]
    faults += [f"{name} does not belong there" for name in names if name.endswith(STRAY) or "__pycache__" in name]
    if faults:
        raise CheckError("; ".join(faults))
    return f"{len(names)} files and folders"


def install(piece: Path, python: Path) -> str:
    """Into a new environment, by pip. torch and what else it needs are found in this one, whose checkout is not."""
    home = python.parent.parent
    run([sys.executable, "-m", "venv", "--without-pip", str(home)])
    [site] = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # a .pth there, the editable one, is not read
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        str(site),
        str(piece),
    ]
    run(pip, env=environment)
    where = "import deepspeedlite; print(deepspeedlite.__version__, 'in', deepspeedlite.__file__)"
    said = run([str(python), "-c", where], " in ", cwd=home, env=without_compiler(home))
    if str(home) not in said:
        raise CheckError(f"it imports {said}")
    return said.partition(" in ")[0]


def report(python: Path) -> str:
    """`env_report --json` must find nothing broken."""
    command = [str(python), "-m", "deepspeedlite.env_report", "--json"]
    home = python.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=without_compiler(home))
    found = json.loads(done.stdout or '{"rows": [], "verdict": "it said nothing"}')
    bad = [f"{row['section']}, {row['name']}: {row['value']}" for row in found["rows"] if row["status"] == "bad"]
    if done.returncode or bad:
        raise CheckError("; ".join(bad) or done.stderr)
    return str(found["verdict"])


def selftest(command: list[str], home: Path | None = None) -> str:
    """All rows of it must be well; in `home`, without a compiler, or wherever the command itself goes."""
    options = {"cwd": home, "env": without_compiler(home)} if home else {}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    lines = done.stdout.strip().splitlines()
    rows = json.loads(lines[-1]) if lines else []
    if done.returncode or not rows:
        raise CheckError(
            "; ".join(f"{row['check']}: {row['detail']}" for row in rows if not row["ok"]) or done.stderr[-1000:]
        )
    ops = sum(row["check"].startswith("op ") for row in rows)
    return f"{ops} ops; {rows[-1]['detail']}"


def without_compiler(home: Path) -> dict[str, str]:
    """An environment with nothing on PATH, and a cache of ops of its own."""
    return {"PATH": "", "HOME": str(home), "TORCH_EXTENSIONS_DIR": str(home / "ops"), "PYTHONDONTWRITEBYTECODE": "1"}


def in_container(piece: Path, image: str, tools: Path) -> str:
    """In place of the image's own: there is no compiler in it, and no network. `tools` is a folder for setuptools."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode
    ):
        return f"left out: there is no image {image}; make image-cpu makes it"
    if not tools.exists():  # what the source distribution is built with
        tools.mkdir()
        for part in Path(sysconfig.get_path("purelib")).glob("setuptools*"):
            shutil.copytree(part, tools / part.name)
        shutil.copytree(Path(sysconfig.get_path("purelib"), "_distutils_hack"), tools / "_distutils_hack")
    site = "/tmp/released"
    options = f"--no-deps --no-index --no-compile --no-build-isolation --target {site}"
    pip = f"PYTHONPATH=/tools DS_BUILD_OPS=0 pip install --quiet {options} /release/{piece.name}"
    there = f"{pip} && PYTHONPATH={site} python /opt/deepspeedlite/image/selftest.py --json"
    mounted = ["--network=none", "--volume", f"{piece.parent}:/release:ro", "--volume", f"{tools}:/tools:ro"]
    tools.parent.chmod(0o755)
    piece.parent.chmod(0o755)
    script = f'! command -v cc && ! command -v g++ && {there} "$@"'
    return selftest(["docker", "run", "--rm", *mounted, "--entrypoint", "sh", image, "-c", script, "sh"])


if __name__ == "__main__":
    sys.exit(main())
