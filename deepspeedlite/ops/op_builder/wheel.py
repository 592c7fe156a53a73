"""Compiling ops into a wheel: what setup.py's commands do. Only setup.py imports this.

Which ops: those of DS_BUILD_OPS=1, and each by its own variable, which overrides that one. Of the former those are
compiled that can be, and the reason is printed for the rest; what its own variable demands must be, or the build stops.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.jit import why_not_compile
from deepspeedlite.ops.op_builder.prebuilt import Record, csrc, sources_hash, write_record
from deepspeedlite.ops.op_builder.spec import OPS
from deepspeedlite.ops.op_builder.toolchain import Build, Toolchain, build
from deepspeedlite.ops.op_builder.torch_build import find_torch

_FOLDER = Path("deepspeedlite", "ops", "lib")
# What PEP 440 lets follow a release: pre, post, dev, local.
_LOCAL = r"\+[a-z0-9]+([._-][a-z0-9]+)*"
_AFTER_VERSION = re.compile(rf"((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?({_LOCAL})?", re.IGNORECASE)
_NO_OPS = ("DS_BUILD_OPS", "DS_BUILD_STRING", "DS_BUILD_HOSTNAME")


def asked_for(environ: Mapping[str, str]) -> dict[str, bool]:
    """The libraries to compile, and of each whether its own variable demands it.

    Raises:
        OpBuildError: a variable is neither 0 nor 1, or demands an op that there is not.
    """
    flags = {spec.flag: spec for spec in OPS.values()}
    values = {}
    for name, text in environ.items():
        if name in flags or name == "DS_BUILD_OPS":
            if text not in ("", "0", "1"):
                raise OpBuildError(f"{name}={text}: set it to 0 or 1")
            values[name] = text
        elif name.startswith("DS_BUILD_") and name not in _NO_OPS and text == "1":
            raise OpBuildError(f"{name}=1 asks for an op that deepspeedlite does not have; its are {', '.join(flags)}")
    everything = values.get("DS_BUILD_OPS") == "1"
    return {
        spec.name: values.get(flag) == "1"
        for flag, spec in flags.items()
        if values.get(flag) == "1" or (everything and values.get(flag) != "0")
    }


def version(base: str, environ: Mapping[str, str]) -> str:
    """The package's version with `$DS_BUILD_STRING` after it, such as ".dev20260101" or "+cu130".

    Raises:
        OpBuildError: nothing of the kind may follow a version (PEP 440).
    """
    text = environ.get("DS_BUILD_STRING", "").strip()
    if not _AFTER_VERSION.fullmatch(text):
        raise OpBuildError(
            f"DS_BUILD_STRING={text}: {base}{text} is no version",
            "write + and letters, digits, single dots (+mine, +cu130.2), or .dev or .post and a number (.dev20260101)",
        )
    return base + text


class BuildOps(build_ext):
    """`build_ext`: all that was asked for, in parallel (`-jN`, or MAX_JOBS), with a record of how."""

    def run(self) -> None:
        """Compile, once however many commands ask for it, and print what was compiled and why not the rest."""
        if getattr(self.distribution, "ops_are_built", False):
            return
        self.distribution.ops_are_built = True
        self.announce_ops(self.build_ops())

    def build_ops(self) -> dict[str, str]:
        """Compile; returns what to say of each row of the table."""
        asked, said, wanted = asked_for(os.environ), {}, []
        folder = self.lib_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for spec in OPS.values():
            reason = str(why_not_compile(spec) or "") if spec.name in asked else ""
            if spec.name not in asked:
                reason = f"not asked for ({spec.flag}=1 does)"
            if reason and asked.get(spec.name):
                raise OpBuildError(f"{spec.flag}=1, but {spec.name} cannot be compiled: {reason}")
            said[spec.name] = reason or "compiled"
            if not reason:
                wanted.append(Build(spec, Toolchain.find(spec), folder / f"{spec.name}.so"))
        for old in set(folder.glob("*.so")) - {one.library for one in wanted}:
            old.unlink()
        objects = Path(self.build_temp).absolute() / "ops"
        objects.mkdir(parents=True, exist_ok=True)
        build(wanted, csrc(), objects, int(self.parallel) if self.parallel else None)
        write_record(_record(wanted), folder)
        return said

    def announce_ops(self, said: dict[str, str]) -> None:
        """Print the table."""
        torch = find_torch()
        print(f"ops, for {torch.accelerator}, against torch {torch.version}:")
        for name, text in said.items():
            print(f"  {name:<24}{text}")
        sys.stdout.flush()

    def lib_folder(self) -> Path:
        """Where the libraries go: the package itself where it is edited in place."""
        return (Path() if self.inplace else Path(self.build_lib)).absolute() / _FOLDER

    def get_outputs(self) -> list[str]:
        """The files that are made."""
        return [str(path) for path in self.lib_folder().glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        """None: an editable install finds the files where they are made."""
        return {}

    def get_source_files(self) -> list[str]:
        """None that the package's data does not have already."""
        return []


class OpsWheel(bdist_wheel):
    """`bdist_wheel`: one file for every Python from 3.10 on, as the libraries use torch's stable ABI, not Python's."""

    def finalize_options(self) -> None:
        """Tag it."""
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


def extensions(environ: Mapping[str, str]) -> list[Extension]:
    """One for each op that is asked for, so that setuptools makes a wheel for this platform. BuildOps compiles them."""
    return [Extension(f"deepspeedlite.ops.lib.{name}", sources=[]) for name in asked_for(environ)]


def _record(wanted: list[Build]) -> Record:
    torch, gpu = find_torch(), next((one.toolchain.gpu for one in wanted if one.toolchain.gpu), None)
    versions = {gpu.kind: gpu.version} if gpu else {}
    return Record(
        accelerator=gpu.kind if gpu else "cpu",
        torch=torch.version,
        cuda=versions.get("cuda"),
        rocm=versions.get("rocm"),
        archs=gpu.archs if gpu else (),
        git=_git_hash(),
        ops={one.spec.name: sources_hash(one.spec) for one in wanted},
    )


def _git_hash() -> str:
    """The commit, with -dirty where files differ from it; $DSL_GIT_HASH where an image is built, which has no .git."""
    if named := os.environ.get("DSL_GIT_HASH"):
        return named
    root = csrc().resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():  # an sdist, perhaps inside another repository
        return "unknown"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
