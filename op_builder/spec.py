"""The table of ops. To add one: its sources under csrc/, a line here, its Python side in deepspeedlite/ops/."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpSpec:
    """What an op is made of; paths are relative to csrc/.

    Attributes:
        name: of the library and of the op in `torch.ops.deepspeedlite`.
        bindings: files that see torch's stable ABI, compiled once.
        kernels: plain files, compiled once for each instruction set that the processor's family has.
    """

    name: str
    bindings: tuple[str, ...]
    kernels: tuple[str, ...]


OPS = {
    spec.name: spec
    for spec in (OpSpec("cpu_adam", bindings=("cpu_optim/adam.cpp",), kernels=("cpu_optim/adam_kernel.cpp",)),)
}
