"""A compiled library as a file: whether it is as it was written, and what the loader's complaint about it means.

Beside a library of the cache lies its size and checksum, and it is believed only with them: one that was cut off by a
full disk or a crash kills the process that loads it (SIGBUS). Libraries of a wheel are looked at for what is cut off.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import struct
from pathlib import Path
from typing import NamedTuple

from deepspeedlite.ops.op_builder.errors import OpBuildError

NO_SUM = "has no checksum beside it, as earlier versions left it"
_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine, of the ELF specification
_AGAIN = "delete {library}: it is compiled again when it is needed"
_REINSTALL = "install a wheel that was made for this torch and this system: pip install --force-reinstall deepspeedlite"


class _Complaint(NamedTuple):
    """What the loader says, what that means, and what helps; `{library}` is the file, `{needs}` what it asks for."""

    pattern: str
    meaning: str
    remedy: str = _AGAIN
    remedy_in_wheel: str = _REINSTALL


_COMPLAINTS = (
    _Complaint(
        r"failed to map segment(?!.*memory)",
        "as where the file system is mounted noexec",
        "set TORCH_EXTENSIONS_DIR to a folder from which programs may run",
        "install Python's environment on a file system from which programs may run",
    ),
    _Complaint(r"undefined symbol", "it was compiled for another torch than the one that is here"),
    _Complaint(
        r"version `[\w.]+' not found",
        "it was compiled on a system with a newer C or C++ library",
        "set TORCH_EXTENSIONS_DIR to a folder that this system does not share with newer ones",
    ),
    _Complaint(
        r"wrong ELF class|invalid ELF header|file too short|cannot open shared object file: Exec format",
        "it is damaged, or made for another kind of processor",
    ),
    _Complaint(
        r"(?P<needs>[\w.+-]+): cannot open shared object file: No such file",
        "it needs {needs}, which is not found here",
        "install what {needs} belongs to, or name its folder in LD_LIBRARY_PATH",
        "install what {needs} belongs to, or name its folder in LD_LIBRARY_PATH",
    ),
    _Complaint(
        r"Permission denied",
        "this user may not read it",
        "set TORCH_EXTENSIONS_DIR to a folder of your own",
        "have who installed it give you the right to read it",
    ),
    _Complaint("", ""),
)


def write_sum(library: Path) -> None:
    """Put the library's size and checksum beside it."""
    size_bytes, digest = _summed(library)
    _sum_file(library).write_text(f"{size_bytes} {digest}\n")


def damage(library: Path) -> str:
    """How the file differs from what was written, such as "has 4096 of 203232 bytes"; "" where it does not.

    Reads all of it, in less than a millisecond.
    """
    try:
        size_text, _, digest = _sum_file(library).read_text().strip().partition(" ")
        wanted_bytes = int(size_text)
    except (OSError, ValueError):
        return NO_SUM
    try:
        found_bytes, found = _summed(library)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found_bytes != wanted_bytes:
        return f"has {found_bytes} of {wanted_bytes} bytes"
    return "" if found == digest else "has another content than was written"


def cut_off(library: Path) -> str:
    """How a file is no whole library for this processor, by its own headers; "" where it is one."""
    size_bytes = os.path.getsize(library)
    with library.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # 64 bits, little-endian
            return "is no library"
        machine = struct.unpack_from("<H", head, 18)[0]
        programs, sections = struct.unpack_from("<QQ", head, 32)
        program_bytes, program_count, section_bytes, section_count = struct.unpack_from("<4H", head, 54)
        file.seek(programs)
        table = file.read(program_bytes * program_count)
    if machine != _MACHINES.get(platform.machine(), machine):
        return f"is not made for {platform.machine()}"
    ends = [sections + section_bytes * section_count, programs + program_bytes * program_count]
    for start in range(0, len(table) - 55, program_bytes or 56):
        offset, _, _, in_file_bytes = struct.unpack_from("<4Q", table, start + 8)
        ends.append(offset + in_file_bytes)
    return f"is cut off: {size_bytes} of {max(ends)} bytes are there" if size_bytes < max(ends) else ""


def loaders_words(error: BaseException) -> str:
    """The loader's own reason, which torch wraps into an error that only names the file."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_error(library: Path, complaint: str, from_wheel: bool) -> OpBuildError:
    """What to say of a library that the loader refuses: its own reason, what that means, and the remedy."""
    one, found = next((one, found) for one in _COMPLAINTS if (found := re.search(one.pattern, complaint)))
    words = {"library": library, **found.groupdict()}
    meaning = f" ({one.meaning.format(**words)})" if one.meaning else ""
    remedy = one.remedy_in_wheel if from_wheel else one.remedy
    return OpBuildError(f"{library} does not load: {complaint}{meaning}", remedy.format(**words))


def _sum_file(library: Path) -> Path:
    return library.with_suffix(".sum")


def _summed(library: Path) -> tuple[int, str]:
    content = library.read_bytes()
    return len(content), hashlib.blake2b(content, digest_size=16).hexdigest()
