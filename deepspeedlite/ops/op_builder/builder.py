"""Loading libraries of ops into torch. The builder classes that DeepSpeed's users know are compat/op_builders.py."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.jit import built
from deepspeedlite.ops.op_builder.library_file import load_error, loaders_words
from deepspeedlite.ops.op_builder.prebuilt import lib, misfit, read_record
from deepspeedlite.ops.op_builder.spec import OpSpec


@cache
def load_ops(spec: OpSpec) -> SimpleNamespace:
    """The library's ops by name, loaded from the wheel or compiled.

    Raises:
        OpBuildError: they cannot be compiled or loaded here; the message says why.
    """
    import torch

    library = built(spec)
    if library.parent == lib() and spec.gpu and (reason := _misfit_here()):
        raise OpBuildError(reason)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise load_error(library, loaders_words(error), library.parent == lib()) from error
    ops = {name: getattr(torch.ops.deepspeedlite, name) for name in spec.ops}
    for name, op in ops.items():
        # One that only writes into its arguments has nothing to do with fake ones; another's module registers its own.
        if not op.default._schema.returns:
            torch.library.register_fake(f"deepspeedlite::{name}", lambda *args, **kwargs: None)
    return SimpleNamespace(**ops)


def _misfit_here() -> str | None:
    import torch

    record, arch = read_record(), None
    if record is None:
        return None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        arch = getattr(device, "gcnArchName", "") if torch.version.hip else f"{device.major}.{device.minor}"
    return misfit(record, torch.version.cuda, arch)
