"""Gives an environment the name `deepspeed`, and takes it away again.

`install` writes a `.pth` into site-packages, which Python reads at every start (also with -I, which ignores
PYTHONPATH), and DeepSpeed's commands beside the environment's Python. Nothing that is not ours is ever overwritten.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from deepspeedlite.compat.drop_in import VERSION
from deepspeedlite.launcher.stand_in import folder
from deepspeedlite.runtime.errors import LaunchError

PTH_NAME = "deepspeed_is_deepspeedlite.pth"
# DeepSpeed's commands -> the module of ours that has their `main`, or the function itself.
COMMANDS = {
    "deepspeed": "launcher.cli:main",
    "deepspeed.pt": "launcher.cli:main",
    "ds": "launcher.cli:main",
    "ds_ssh": "launcher.ssh:main",
    "ds_bench": "tools.bench:main",
    "ds_report": "compat.commands:report",
    "dsr": "compat.commands:report",
    "ds_io": "compat.commands:io",
    "ds_nvme_tune": "compat.commands:nvme_tune",
}
_MARK = "# written by deepspeedlite.drop_in install"


def install(site: Path | None = None, scripts: Path | None = None, force: bool = False) -> list[Path]:
    """Write the files, and return them.

    Args:
        site: the environment's site-packages; this Python's own by default.
        scripts: where its commands are.
        force: also where a real DeepSpeed is installed, which is then hidden until `uninstall`.

    Raises:
        LaunchError: a real DeepSpeed is installed, or a file cannot be written.
    """
    site, scripts = site or Path(sysconfig.get_path("purelib")), scripts or Path(sysconfig.get_path("scripts"))
    real = real_deepspeed(site)
    if real and not force:
        raise LaunchError(
            f"DeepSpeed {real} is installed in {site}: `pip uninstall deepspeed` first, or pass --force to hide it "
            "until `python -m deepspeedlite.drop_in uninstall`"
        )
    pth = f"import sys; sys.path.insert(0, {str(folder())!r})  {_MARK}\n"
    files = [(site / PTH_NAME, pth, 0o644)]
    for name, where in COMMANDS.items():
        module, _, function = where.partition(":")
        imported = f"from deepspeedlite.{module} import {function}"
        files.append(
            (scripts / name, f"#!{sys.executable}\n{_MARK}\nimport sys\n{imported}\nsys.exit({function}())\n", 0o755)
        )
    written = []
    for path, text, mode in files:
        if _is_theirs(path):
            continue
        _write(path, text, mode)
        written.append(path)
    return written


def uninstall(site: Path | None = None, scripts: Path | None = None) -> list[Path]:
    """Remove what `install` wrote, and return it. Raises `LaunchError` for a file that cannot be removed."""
    site, scripts = site or Path(sysconfig.get_path("purelib")), scripts or Path(sysconfig.get_path("scripts"))
    ours = [site / PTH_NAME, *(scripts / name for name in COMMANDS)]
    found = [path for path in ours if path.is_file() and not _is_theirs(path)]
    for path in found:
        _try(path.unlink, f"{path} cannot be removed")
    return found


def real_deepspeed(site: Path) -> str:
    """The version of a real DeepSpeed in a site-packages folder; "" where there is none."""
    for found in importlib.metadata.distributions(name="deepspeed", path=[str(site)]):
        if found.version != VERSION:
            return found.version
    return ""


def _is_theirs(path: Path) -> bool:
    return path.is_file() and _MARK not in path.read_text(errors="replace")


def _write(path: Path, text: str, mode: int) -> None:
    def write() -> None:
        half = path.with_name(f".{path.name}.{os.getpid()}")
        half.write_text(text)
        half.chmod(mode)
        half.replace(path)

    _try(write, f"{path} cannot be written")


def _try(action: Callable[[], object], complaint: str) -> None:
    try:
        action()
    except OSError as error:
        raise LaunchError(f"{complaint}: {error.strerror}") from error
