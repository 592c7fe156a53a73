"""Files of `torch.save`: those of others read without executing anything, and written so that DeepSpeed reads them.

torch's unpickler for weights makes tensors and plain data, and refuses every other name. DeepSpeed's files name four
classes of its own besides. Stand-ins for them, which hold attributes and do nothing, are allowed in addition; so
DeepSpeed need not be there, and none of its code, or of anybody's, runs.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deepspeedlite.checkpoint.files import open_regular
from deepspeedlite.runtime.errors import CheckpointError


class Inert:
    """Stands for an object of a class that is not there: its attributes, none of what it does."""


class LossScaler(Inert):
    """A constant loss scale: `cur_scale`."""


class DynamicLossScaler(Inert):
    """A loss scale that overflows change: `cur_scale`, `cur_iter`, `last_overflow_iter`, `cur_hysteresis`, ..."""


class FragmentAddress(Inert):
    """Where a parameter lies in a rank's partition: `start`, `numel`."""


CLASSES: dict[str, type] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}
_NAMES = {cls: name for name, cls in CLASSES.items() if cls is not int}


def load_inert(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Tensors are mapped from the file, and read when they are used.

    (A file in torch's format of before 1.6, which `checkpoint.checkpoint_serialization: false` has DeepSpeed write,
    cannot be mapped, and is read whole.)

    Raises:
        CheckpointError: the file is not there, is cut short, or names a class or function that is not allowed.
    """
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link, which leads outside the checkpoint")
        with open(open_regular(path), "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise CheckpointError(f"{path} is compressed, which torch.save never does")
        with torch.serialization.safe_globals([(cls, name) for name, cls in CLASSES.items()]):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _check_tensors(value)
        return value
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; the checkpoint is not whole") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from None
    except Exception as error:  # a pickle may be wrong in as many ways as there are errors
        first_line = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {first_line}") from error


def _check_tensors(value: Any) -> None:
    """Raise `ValueError` for tensors that have not all of their elements in the file."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, torch.Tensor):
            if part.device.type != "cpu" or part.layout is not torch.strided or part.is_quantized:
                raise ValueError(f"a tensor of shape {tuple(part.shape)} is not a dense one")
            if part.nbytes > part.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(part.shape)} has fewer elements in the file")
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part


def _refusal(message: str) -> str:
    name = re.search(r"GLOBAL (\S+)", message)
    if name is None:
        line = next((line for line in message.splitlines() if "WeightsUnpickler error" in line), message)
        return f"its pickle does what data need not do, and is refused: {line.strip()[:200]}"
    return (
        f"it names {name[1]}, and a pickle that names anything but tensors, plain data and DeepSpeed's own classes is "
        "not read, since reading it could run any program; nothing was run. If it is your own client_state, save the "
        "checkpoint with plain values in it"
    )


def verify_zip(path: Path) -> str | None:
    """What is wrong with the checksums in a file of `torch.save`; None where nothing is, or it has none."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            has_some = any(record.CRC for record in archive.infolist())  # torch.serialization.set_crc32_options
            wrong = archive.testzip() if has_some else None
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return f"{path} is damaged: {error}"
    return None if wrong is None else f"{path} is damaged: the checksum of {wrong} in it does not match"


class _Pickler(pickle._Pickler):
    """Writes the names of DeepSpeed's classes where there are stand-ins. (The one in C looks every name up.)"""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write a class or function as its name."""
        if isinstance(obj, type) and obj in _NAMES:
            module, _, short = _NAMES[obj].rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{short}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


def save_for_deepspeed(value: Any, path: Path, fsync: bool = True) -> None:
    """`torch.save` into a new file, flushed to the disk if `fsync`.

    Stand-ins get the names of the classes they stand for.
    """
    with path.open("xb") as file:
        try:
            torch.save(value, file, pickle_module=SimpleNamespace(__name__=__name__, Pickler=_Pickler))
        except RuntimeError as error:  # of closing the archive, which follows that of writing it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        if fsync:
            os.fsync(file.fileno())
