"""What the tests of images stand on: a Docker engine, a base image of Debian packages, torch's wheel, the tool.

`needs_engine()` skips by name where something is missing. All images that a session makes descend from its base, by
which they are found and removed at its end. DSL_TEST_BASE names a base image to use instead of making one (it is kept,
and so is what was built on it, for the next session's cache).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from paths import ROOT
from programs import missing

from env import buildkit


def needs_engine() -> Any:
    """The SDK's client; skips where there is no engine, or nothing to make a base image with."""
    pytest.importorskip("docker", reason="needs the docker SDK (make venv-dev)")
    from env.engine import connect
    from env.errors import ImageError

    try:
        client = connect()
    except ImageError as error:
        pytest.skip(f"needs a Docker engine: {error}")
    if "DSL_TEST_BASE" not in os.environ:
        reason = missing("mmdebstrap", "docker") or ("needs root" if os.geteuid() else None)
        if reason:
            pytest.skip(f"{reason}, to make a base image, or DSL_TEST_BASE=IMAGE")
    return client


def make_base(tag: str, *arguments: str) -> None:
    """tools/local_base.sh; skips where the mirror of packages cannot be reached."""
    done = subprocess.run([ROOT / "tools" / "local_base.sh", tag, *arguments], capture_output=True, text=True)
    if done.returncode and re.search(r"Could not (connect|resolve)|Failed to fetch|Unable to fetch", done.stderr):
        pytest.skip(f"needs a mirror of Debian packages: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def torch_wheel(folder: Path) -> str:
    """Put the wheel of this environment's torch, a build for the CPU, into `folder`; its specifier."""
    version = importlib.metadata.version("torch")
    if "+cpu" not in version:
        pytest.skip(f"needs the CPU build of torch, whose wheel is small; here is {version}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    for index in ([], ["--index-url", "https://download.pytorch.org/whl/cpu"]):
        if subprocess.run([*pip, *index, f"torch=={version}"], capture_output=True).returncode == 0:
            return f"torch=={version}"
    pytest.skip(f"needs the wheel of torch {version}: no index that pip knows has it")


@contextlib.contextmanager
def images_removed_after(client: Any, base: str) -> Iterator[None]:
    """Remove `base` and all images that were made from it, whatever became of the tests."""
    root = client.images.get(base).id
    try:
        yield
    finally:
        for container in client.containers.list(all=True, ignore_removed=True):
            if container.attrs["Image"] in _made_from(client, root):
                container.remove(force=True, v=True)
        # Removing an image removes what it was made from, as far as nothing else needs that.
        while doomed := _made_from(client, root):
            for image in doomed.keys() - set(doomed.values()):
                client.images.remove(image, force=True)


@contextlib.contextmanager
def build_cache_removed_after(client: Any) -> Iterator[None]:
    """Remove what BuildKit has put into its cache meanwhile."""

    def cached() -> set[str]:
        return {entry["ID"] for entry in client.df()["BuildCache"] or ()}

    before = cached()
    try:
        yield
    finally:
        left: set[str] = set()
        while (more := cached() - before) != left:  # only what nothing else stands on can go
            left = more
            for entry in left:
                client.api.prune_builds(filters={"id": entry}, all=True)


def _made_from(client: Any, root: str) -> dict[str, str]:
    """The image and all that were made from it, with what each was made from."""
    parent = {image["Id"]: image["ParentId"] for image in client.api.images(all=True)}
    found = {root: parent[root]} if root in parent else {}
    while more := {image: of for image, of in parent.items() if of in found and image not in found}:
        found |= more
    return found


def env(*arguments: object, cwd: Path = ROOT, fails: bool = False, timeout: float = 600, **variables: str) -> str:
    """`python -m env ...` of a checkout, to its end; what it printed."""
    command = [sys.executable, "-m", "env", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(cwd), **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert bool(done.returncode) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_of_checkout(folder: Path) -> Path:
    """The files that an image is built from, to be changed."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "lib", ".*cache", "*.whl"
    )
    for name in ("env", "csrc", "tools", "deepspeedlite", "examples"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Dockerfile.cuda",
        "Dockerfile.rocm",
        ".dockerignore",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


class Image(NamedTuple):
    """The image of this session, how it was asked for, and what the tool printed."""

    client: Any
    tag: str
    said: str
    options: tuple[str, ...]

    def run(self, *command: str, docker: tuple[str, ...] = (), fails: bool = False) -> str:
        """`docker run --rm`, as users do it; stdout and stderr."""
        whole = ["docker", "run", "--rm", *docker, self.tag, *command]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
        assert bool(done.returncode) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr


@contextlib.contextmanager
def built(name: str, wheels: Path, make_bases: Callable[[str], Sequence[str]], *more: str) -> Iterator[Image]:
    """Build an environment by the tool, and remove everything at the end.

    `make_bases` makes base images in the repository whose name it gets, and returns the tool's options for them.
    """
    client = needs_engine()
    spec = torch_wheel(wheels)
    repository = f"dsl-test-{uuid.uuid4().hex[:8]}"
    bases = make_bases(repository)
    options = (*bases, "--wheels", str(wheels), "--torch-spec", spec, "--repository", repository, *more)
    with contextlib.ExitStack() as stack:
        for base in {base for base in bases[1::2] if base.startswith(repository)}:
            stack.enter_context(images_removed_after(client, base))
        if buildkit.wanted(client) and "DSL_TEST_BASE" not in os.environ:
            stack.enter_context(build_cache_removed_after(client))
        stack.callback(remove_tags, client, repository)
        yield Image(client, f"{repository}:{name}", env("build", name, *options), options)


def remove_tags(client: Any, repository: str) -> None:
    """Those of a repository, but for bases; an image without any goes with its last one."""
    for each in client.images.list(repository):
        for tag in each.tags:
            if tag.startswith(f"{repository}:") and not tag.endswith(("base", "devel")):
                client.images.remove(tag)
