"""Whether an optimizer may step the engine's flat runs: whether its update treats every element alike."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from deepspeedlite.config.recipes import WHOLE_TENSOR
from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeedlite.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import DeepSpeedCPULion
from deepspeedlite.ops.uncorrected_adam import UncorrectedAdam
from deepspeedlite.optim.registry import OURS, TORCH_CLASSES, built_like
from deepspeedlite.runtime.device import accelerators, on_accelerator
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.runtime.log import log_once

_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {cls for name, cls in {**TORCH_CLASSES, **OURS}.items() if name not in WHOLE_TENSOR}
    | {FusedAdam, UncorrectedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion}
)


def check_flat_compatible(optimizer: Optimizer, allow_untested: bool = False) -> None:
    """Raise `UnsupportedError` if the optimizer would be wrong on flat runs.

    The engine gives optimizers 1-D fp32 runs, each a concatenation of parameters. That changes nothing for an update
    that treats every element alike, and breaks one that looks at matrices or at a parameter's norm. Known classes are
    looked up; an unknown one is tried out on two small matrices and on their concatenation, and refused if the results
    differ. `allow_untested` (the key `zero_allow_untested_optimizer`) accepts unknown classes untried.
    """
    cls = type(optimizer)
    if cls in _ELEMENTWISE or isinstance(optimizer, FusedLamb):
        return
    for base in cls.__mro__:
        reason = WHOLE_TENSOR.get(base.__name__.lower())
        if reason is not None:
            raise UnsupportedError(
                f"optimizer {cls.__name__} cannot run on flat parameter runs: it {reason}, or ZeRO stage 0"
            )
    if allow_untested:
        log_once(f"optimizer {cls.__name__} is taken untested (zero_allow_untested_optimizer): it will see flat runs")
        return
    try:
        elementwise = _is_elementwise(optimizer)
    except Exception as error:  # unknown code, on tensors it did not choose: any failure only means "not known"
        log_once(
            f"optimizer {cls.__name__} could not be tried out on flat runs ({error.__class__.__name__}: {error}); it "
            "is used as it is, and is right only if its update treats every element alike"
        )
        return
    if not elementwise:
        raise UnsupportedError(
            f"optimizer {cls.__name__} gives other results on flat parameter runs than on whole tensors, so its update "
            'is not elementwise (or is random): use AdamW, Lion or Lamb, or set "zero_allow_untested_optimizer": true '
            "if you know better"
        )
    log_once(f"optimizer {cls.__name__} is not known here; tried out, it treats every element alike")


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a fresh optimizer of the same class moves two matrices exactly as it moves their concatenation."""
    first = optimizer.param_groups[0]
    device = first["params"][0].device
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 6), (5, 7))
    whole = [torch.randn(shape, generator=generator).to(device) * (i + 1) for i, shape in enumerate(shapes)]
    flat = torch.cat([tensor.flatten() for tensor in whole])
    start = flat.clone()
    layouts = [[torch.nn.Parameter(t.clone()) for t in whole], [torch.nn.Parameter(flat)]]
    for tensors in layouts:
        noise = torch.Generator().manual_seed(2)
        trial = built_like(optimizer, first, tensors)
        with torch.random.fork_rng(devices=[device] if on_accelerator(device) else [], device_type=accelerators().type):
            for _ in range(3):
                grads = [torch.randn(shape, generator=noise).to(device) * 10.0**i for i, shape in enumerate(shapes)]
                grads = grads if len(tensors) > 1 else [torch.cat([g.flatten() for g in grads])]
                for tensor, grad in zip(tensors, grads):
                    tensor.grad = grad
                trial.step()
    moved = [torch.cat([t.detach().flatten() for t in tensors]) - start for tensors in layouts]
    return torch.allclose(moved[0], moved[1], rtol=1e-3, atol=1e-6 * float(moved[0].abs().max()))
