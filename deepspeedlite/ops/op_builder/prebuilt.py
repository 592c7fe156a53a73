"""The libraries that came compiled with the package, and the record of what they were compiled with.

They lie in `lib/` beside this folder, with `record.json`. One is used if it was made of the sources that are here and
for the accelerator that torch has; whether it goes with this CUDA and this GPU is checked when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepspeedlite.ops.op_builder.gpu import SKIP_CHECK, cuda_mismatch
from deepspeedlite.ops.op_builder.spec import OpSpec


class Record(NamedTuple):
    """What a wheel's libraries were compiled with; `ops` has a hash of each library's sources."""

    accelerator: str
    torch: str
    cuda: str | None
    rocm: str | None
    archs: tuple[str, ...]
    git: str
    ops: dict[str, str]


def csrc() -> Path:
    """The folder of the sources, which lies beside this one in a checkout and in an installed package alike."""
    return Path(__file__).parent.parent / "csrc"


def lib() -> Path:
    """The folder of libraries that came compiled."""
    return Path(__file__).parent.parent / "lib"


def installed_libraries() -> dict[str, Path]:
    """Libraries of the wheel that this package was installed from, by the op's name in the table."""
    return {path.stem: path for path in lib().glob("*.so")}


def read_record() -> Record | None:
    """The record of the installed libraries; None where there are none, or none of this version's form."""
    try:
        fields: dict[str, Any] = json.loads((lib() / "record.json").read_text())
        return Record(**{**fields, "archs": tuple(fields["archs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(record: Record, folder: Path) -> None:
    """Put the record beside the libraries."""
    (folder / "record.json").write_text(json.dumps(record._asdict(), indent=1) + "\n")


def prebuilt(spec: OpSpec, accelerator: str) -> Path | None:
    """The op's installed library if it is of these sources and has kernels for `accelerator`, if the op has any."""
    library, record = lib() / f"{spec.name}.so", read_record()
    if record is None or not os.path.exists(library) or record.ops.get(spec.name) != sources_hash(spec):
        return None
    fits = not spec.gpu or accelerator in ("cpu", record.accelerator)
    return library if fits else None


def sources_hash(spec: OpSpec, root: Path | None = None) -> str:
    """A hash of the op's sources and of all headers, which they may include."""
    root = root or csrc()
    sources = [root / name for name in (*spec.bindings, *spec.kernels, *spec.plain, *spec.gpu)]
    headers = sorted([*root.rglob("*.h"), *root.rglob("*.cuh")])
    digest = hashlib.sha256()
    for file in (*sources, *headers):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def misfit(record: Record, torch_cuda: str | None, device_arch: str | None) -> str | None:
    """Why the wheel's kernels cannot run here, or None.

    `torch_cuda` is the CUDA that torch was built with, `device_arch` the GPU's (such as "9.0" or "gfx90a"); None where
    there is none: the CPU's implementations always can.
    """
    if reason := cuda_mismatch("this deepspeedlite wheel", record.cuda, torch_cuda):
        return f"{reason}; {SKIP_CHECK}, or rebuild: {_rebuild(record, ())}"
    if device_arch is None or not record.archs or supports(record.archs, device_arch):
        return None
    return (
        f"this GPU is {device_arch}, but the deepspeedlite wheel has kernels for {', '.join(record.archs)} alone. "
        f"Rebuild it for this one too: {_rebuild(record, (device_arch,))}"
    )


def supports(archs: Sequence[str], device_arch: str) -> bool:
    """Whether code for `archs` runs on the GPU.

    A cubin runs on later minors of its major, PTX on everything later, code that is specific to a GPU ("9.0a") on it
    alone, and to a family ("10.0f") as a cubin does.
    (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".) AMD's code runs on its arch alone.
    """
    if device_arch.startswith("gfx"):
        return device_arch.split(":")[0] in {arch.split(":")[0] for arch in archs}
    return any(_runs_on(arch, device_arch) for arch in archs)


def _runs_on(arch: str, device_arch: str) -> bool:
    number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
    code, device = ([int(part) for part in text.rstrip("af").split(".")] for text in (number, device_arch))
    if number.endswith("a"):
        return code == device
    return code <= device and (code[0] == device[0] or (ptx and number[-1].isdigit()))


def _rebuild(record: Record, more: tuple[str, ...]) -> str:
    archs = ";".join((*record.archs, *more))
    return f'make wheel ACCEL={record.accelerator} ARCHS="{archs}" && pip install --force-reinstall dist/*.whl'
