"""The builder classes under which DeepSpeed's users know the ops: `CPUAdamBuilder().load().cpu_adam(...)` is
`torch.ops.deepspeedlite.cpu_adam(...)`, and `AsyncIOBuilder().load()` the module `deepspeedlite.ops.aio`.

There is a class for each row of the ops' table, and one for memory that is locked without an op. Only `load` imports
torch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from deepspeedlite.ops.op_builder import OPS, OpSpec, load_ops, why_not
from deepspeedlite.runtime.errors import AbsentError
from deepspeedlite.runtime.log import logger


class OpBuilder:
    """Builds and loads one library of ops. Its subclasses have the table's names."""

    spec: ClassVar[OpSpec]
    NAME: ClassVar[str]
    BUILD_VAR: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "spec" in vars(cls):
            cls.NAME, cls.BUILD_VAR = cls.spec.name, cls.spec.flag

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def absolute_name(self) -> str:
        """The name of the library with its package, as DeepSpeed writes it."""
        return f"deepspeedlite.ops.{self.name}_op"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the op can be had here; `verbose` logs why not. Nothing is compiled."""
        reason = why_not(self.spec)
        if reason and verbose:
            logger.warning("%s: %s", self.spec.name, reason)
        return reason is None

    def sources(self) -> list[str]:
        """Its files, relative to the folder of the sources."""
        return [*self.spec.bindings, *self.spec.kernels, *self.spec.plain, *self.spec.gpu]

    def load(self, verbose: bool = True) -> Any:
        """The ops by name, compiled if they were not before.

        Raises:
            OpBuildError: they cannot be compiled or loaded here; the message says why.
        """
        return load_ops(self.spec)


class AsyncIOBuilder(OpBuilder):
    """Reading and writing files beside the program."""

    spec = OPS["async_io"]

    def load(self, verbose: bool = True) -> Any:
        """The module with `aio_handle`, `aio_read` and `aio_write`.

        Raises:
            OpBuildError: the op cannot be compiled or loaded here; the message says why.
        """
        load_ops(self.spec)
        from deepspeedlite.ops import aio

        return aio


class PinMemoryBuilder:
    """Memory that is locked into place, by `load().pin_handle()`. Nothing is compiled for it."""

    NAME, BUILD_VAR = "pin_memory", "DS_BUILD_PIN_MEMORY"

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def is_compatible(self, verbose: bool = False) -> bool:
        """True."""
        return True

    def load(self, verbose: bool = True) -> SimpleNamespace:
        """What has `pin_handle`."""
        from deepspeedlite.ops.aio import pin_handle

        return SimpleNamespace(pin_handle=pin_handle)


class AbsentBuilder:
    """Of an op that is not here: compatible with nothing, as scripts ask before they use one."""

    NAME, BUILD_VAR = "deepspeed_not_implemented", "DS_BUILD_NOT_IMPLEMENTED"
    why: ClassVar[str]

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def is_compatible(self, verbose: bool = False) -> bool:
        """False; `verbose` logs why."""
        if verbose:
            logger.warning("%s: %s", type(self).__name__, self.why)
        return False

    def load(self, verbose: bool = True) -> Any:
        """Nothing.

        Raises:
            AbsentError: always.
        """
        raise AbsentError(f"{type(self).__name__}: {self.why}")


_ABSENT = {
    "kernels of inference are not in this release": (
        "InferenceCoreBuilder InferenceCutlassBuilder RaggedOpsBuilder RaggedUtilsBuilder SpatialInferenceBuilder"
    ),
    "kernels of transformers are not in this release": "FlashAttentionBuilder EvoformerAttnBuilder",
    "floating-point formats of 6 and 12 bits are not in this release": "FPQuantizerBuilder",
    "DeepCompile is not in this release; engine.compile uses torch.compile": "DeepCompileBuilder",
    "random layer dropping is not part of this library": "RandomLTDBuilder",
    "GPUDirect Storage is not in this release; ops.aio goes past the page cache": "GDSBuilder",
    "ranks of a machine share memory without an op": "ShareMemCommBuilder CCLCommBuilder",
}
BUILDERS: dict[str, type[OpBuilder]] = {
    spec.builder: type(spec.builder, (OpBuilder,), {"spec": spec}) for spec in OPS.values()
} | {"AsyncIOBuilder": AsyncIOBuilder}
ABSENT_BUILDERS: dict[str, type[AbsentBuilder]] = {
    name: type(name, (AbsentBuilder,), {"why": why}) for why, names in _ABSENT.items() for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name in BUILDERS or name in ABSENT_BUILDERS:
        return BUILDERS.get(name) or ABSENT_BUILDERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the builders are {', '.join(BUILDERS)}")
