"""What is done, in order of worth: the table that the runner goes through. Each phase is a module of this folder."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """One phase.

    Attributes:
        name: of its module, and of `--only`.
        says: what it does, for people.
        usual_s: what it took to be expected; what `--help` and a dry run say.
        limit_s: when it is ended, if the budget did not end it before.
        every_rank: one process for each GPU, rather than one.
        compiles: it needs nvcc or hipcc, and an accelerator that they compile for.
    """

    name: str
    says: str
    usual_s: int
    limit_s: int
    every_rank: bool = False
    compiles: bool = False


PHASES = (
    Phase("here", "what is here: GPUs, driver, torch, compilers, peers", 10, 60),
    Phase("build", "compile every op for this GPU's architecture", 90, 240),
    Phase("parity", "training by NCCL or RCCL beside an unsharded loop of torch's", 45, 150, every_rank=True),
    Phase("kernels", "the kernels on the device beside their float64 references", 60, 180, compiles=True),
    Phase(
        "training", "step time and peak memory of a GPT at each stage, beside installed peers", 70, 150, every_rank=True
    ),
    Phase("overlap", "a profiler's trace: gathers during compute, reductions during backward", 15, 60, every_rank=True),
    Phase("optimizers", "Adam, LAMB and Lion as a share of a copy's bandwidth", 15, 60),
    Phase("inference", "rates of a prompt and of decoding, beside the module itself", 30, 90),
    Phase("largest", "the largest model of `estimate --fit` beside what trains", 40, 90, every_rank=True),
    Phase("sanitizer", "some kernels again under compute-sanitizer", 30, 90, compiles=True),
)
