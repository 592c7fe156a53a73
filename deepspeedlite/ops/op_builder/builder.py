"""Loading libraries of ops into torch, and the builder classes under which DeepSpeed's users know them.

`CPUAdamBuilder().load().cpu_adam(...)` is `torch.ops.deepspeedlite.cpu_adam(...)`. There is a class for each row of the
table. Only `load` imports torch.
"""

from __future__ import annotations

import logging
from functools import cache
from types import SimpleNamespace
from typing import ClassVar

from deepspeedlite.ops.op_builder.errors import OpBuildError
from deepspeedlite.ops.op_builder.jit import built, why_not
from deepspeedlite.ops.op_builder.prebuilt import lib, misfit, read_record
from deepspeedlite.ops.op_builder.spec import OPS, OpSpec

_logger = logging.getLogger("deepspeedlite")


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
        raise OpBuildError(f"{library} does not load: {error}") from error
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


class OpBuilder:
    """Builds and loads one library of ops. Its subclasses have the table's names."""

    spec: ClassVar[OpSpec]

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.spec.name

    def absolute_name(self) -> str:
        """The name of the library with its package, as DeepSpeed writes it."""
        return f"deepspeedlite.ops.{self.name}_op"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the op can be had here; `verbose` logs why not. Nothing is compiled."""
        reason = why_not(self.spec)
        if reason and verbose:
            _logger.warning("%s: %s", self.spec.name, reason)
        return reason is None

    def sources(self) -> list[str]:
        """Its files, relative to the folder of the sources."""
        return [*self.spec.bindings, *self.spec.kernels, *self.spec.plain, *self.spec.gpu]

    def load(self, verbose: bool = True) -> SimpleNamespace:
        """The ops by name, compiled if they were not before.

        Raises:
            OpBuildError: they cannot be compiled or loaded here; the message says why.
        """
        return load_ops(self.spec)


BUILDERS = {spec.builder: type(spec.builder, (OpBuilder,), {"spec": spec}) for spec in OPS.values()}
