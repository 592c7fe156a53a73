"""Whether an installation of deepspeedlite works: imports, every op that its wheel brings, a short training on 2 ranks.

    python selftest.py [--json]

Ops run on the CPU, wherever they were compiled for, and are compared with plain torch. Exit status: 0, or 1 if a check
failed. It needs no network, no compiler and nothing beside it but train20.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

TRAINING_LIMIT_S = 120


def main() -> int:
    """Run all checks; prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    as_json = parser.parse_args().json
    rows = [tried("imports", imports)]
    if rows[0]["ok"]:
        rows += [tried(f"op {name}", partial(op, name)) for name in wheel_ops()]
        rows.append(tried("training", training))
    if as_json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"{'ok' if row['ok'] else 'FAILED':<7}{row['check']:<20}{row['seconds']:6.1f} s  {row['detail']}")
    return int(not all(row["ok"] for row in rows))


def tried(check: str, work: Callable[[], str]) -> dict:
    """One row: what `work` says of itself, or how it failed."""
    start_s = time.perf_counter()
    try:
        ok, detail = True, work()
    except (Exception, SystemExit) as error:  # whatever it is, the other checks go on
        ok, detail = False, f"{type(error).__name__}: {error}"
    return {"check": check, "ok": ok, "detail": detail, "seconds": round(time.perf_counter() - start_s, 2)}


def imports() -> str:
    """Every public name."""
    import torch

    import deepspeedlite

    for name in deepspeedlite.__all__:
        getattr(deepspeedlite, name)
    return f"deepspeedlite {deepspeedlite.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def wheel_ops() -> list[str]:
    """The libraries that the installed wheel brings."""
    from deepspeedlite.ops.op_builder import installed_libraries

    return sorted(installed_libraries())


def op(name: str) -> str:
    """Run it and compare. A library that this file has no check for is an error: checks are added with ops."""
    from deepspeedlite.ops.op_builder import OPS, installed_libraries, load_ops

    load_ops(OPS[name])
    if name not in CHECKS:
        raise LookupError(f"{Path(__file__).name} has no check of {name}: add one to CHECKS")
    said = CHECKS[name]()
    return f"{said} ({installed_libraries()[name].stat().st_size / 1e6:.2f} MB)"


def same_steps(make: Callable, reference: Callable) -> str:
    """Three steps of an optimizer beside another's, from the same start with the same gradients."""
    import torch

    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(1000))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = make([ours]), reference([theirs])
    for _ in range(3):
        ours.grad = torch.randn(1000)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    return f"3 steps equal {type(optimizers[1]).__name__} in torch"


def adam(name: str) -> str:
    """CPU or fused, beside torch's."""
    import torch

    from deepspeedlite.ops import adam

    def torchs(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)

    return same_steps(lambda p: getattr(adam, name)(p, lr=0.01, weight_decay=0.1), torchs)


def adagrad() -> str:
    """Beside torch's."""
    import torch

    from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad

    def torchs(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(parameters, lr=0.01, eps=1e-10)

    return same_steps(lambda p: DeepSpeedCPUAdagrad(p, lr=0.01, eps=1e-10), torchs)


def transformer_layer(stochastic: bool) -> str:
    """A layer beside itself in float64, which plain torch does."""
    import torch

    from deepspeedlite.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

    torch.manual_seed(0)
    config = DeepSpeedTransformerConfig(
        batch_size=2,
        hidden_size=32,
        intermediate_size=64,
        heads=4,
        attn_dropout_ratio=0.0,
        hidden_dropout_ratio=0.0,
        num_hidden_layers=1,
        initializer_range=0.02,
        stochastic_mode=stochastic,
    )
    layer = DeepSpeedTransformerLayer(config)
    x = torch.randn(2, 8, 32)
    found = layer(x)
    again = layer.double()(x.double())
    torch.testing.assert_close(found.double(), again, rtol=1e-3, atol=1e-3)
    return "a layer equal to its like in float64"


def sparse_attention() -> str:
    """Beside dense attention with the same blocks hidden."""
    import torch

    from deepspeedlite.ops.sparse_attention import sparse_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
    layout = torch.eye(4, dtype=torch.int64).expand(2, 4, 4)
    seen = layout.bool().repeat_interleave(16, 1).repeat_interleave(16, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(sparse_attention(q, k, v, layout, 16), dense, rtol=1e-4, atol=1e-4)
    return "equal to dense attention"


def lion(name: str) -> str:
    """Beside the formula of Chen et al. 2023, written out: a step of lr against the sign of the blended moment."""
    import torch

    from deepspeedlite.ops import lion

    class Written(torch.optim.Optimizer):
        def __init__(self, parameters: list) -> None:
            super().__init__(parameters, {})
            self.moment = torch.zeros(1000)

        def step(self) -> None:  # type: ignore[override]
            [parameter] = self.param_groups[0]["params"]
            with torch.no_grad():
                parameter -= 0.01 * (0.9 * self.moment + 0.1 * parameter.grad).sign()
            self.moment = 0.99 * self.moment + 0.01 * parameter.grad

    return same_steps(lambda p: getattr(lion, name)(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0), Written)


def lamb() -> str:
    """One step of You et al. 2020 without bias correction and decay, from a moment of zero: all by hand."""
    import torch

    from deepspeedlite.ops.lamb import FusedLamb

    torch.manual_seed(0)
    weight = torch.randn(1000)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = torch.randn(1000)
    FusedLamb([parameter], lr=0.01, bias_correction=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()
    update = 0.1 * parameter.grad / ((0.001 * parameter.grad**2).sqrt() + 1e-8)
    ratio = (weight.norm() / update.norm()).clamp(0.01, 10.0)
    torch.testing.assert_close(parameter.detach(), weight - 0.01 * ratio * update, rtol=1e-4, atol=1e-5)
    return "a step equals the formula"


def utils() -> str:
    """Norm and scaling of lists of tensors."""
    import torch

    from deepspeedlite.ops import load

    load("multi_tensor_l2norm"), load("multi_tensor_scale")
    from deepspeedlite.ops.multi_tensor import multi_tensor_l2norm

    tensors = [torch.randn(100), torch.randn(7, 3)]
    torch.testing.assert_close(multi_tensor_l2norm(tensors), torch.cat([t.flatten() for t in tensors]).norm())
    return "a norm of two tensors equals torch's"


def async_io() -> str:
    """A file there and back."""
    import torch

    from deepspeedlite.ops.aio import aio_handle

    handle = aio_handle()
    data, back = torch.randint(0, 256, (100_001,), dtype=torch.uint8), torch.empty(100_001, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "data"))
        handle.sync_pwrite(data, path)
        handle.sync_pread(back, path)
    engine = handle.get_engine()
    handle.close()
    torch.testing.assert_close(data, back)
    return f"a file written and read by {engine}"


def transformer_inference() -> str:
    """A product with packed weights, and a norm."""
    import torch

    from deepspeedlite.ops import load
    from deepspeedlite.ops.transformer_inference import PackedLinear, add_norm

    load("few_row_product"), load("add_norm")
    x, weight = torch.randn(3, 96), torch.randn(40, 96)
    torch.testing.assert_close(PackedLinear.pack(weight)(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    normed, _ = add_norm(x, None, None, 1e-5, kind="layer")
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x, (96,)), rtol=1e-4, atol=1e-5)
    return "a product and a norm equal torch's"


def quantizer() -> str:
    """Numbers to 8 bits and back."""
    import torch

    from deepspeedlite.ops import load
    from deepspeedlite.ops.group_quantize import dequantize, quantize

    load("quantize_groups"), load("dequantize_groups")
    x = torch.randn(3, 96)
    back = dequantize(quantize(x))
    torch.testing.assert_close(back, x, rtol=0, atol=float(x.abs().max()) / 250)
    return "numbers come back from 8 bits"


CHECKS: dict[str, Callable[[], str]] = {
    "cpu_adam": lambda: adam("DeepSpeedCPUAdam"),
    "fused_adam": lambda: adam("FusedAdam"),
    "cpu_adagrad": adagrad,
    "cpu_lion": lambda: lion("DeepSpeedCPULion"),
    "fused_lion": lambda: lion("FusedLion"),
    "fused_lamb": lamb,
    "utils": utils,
    "async_io": async_io,
    "transformer_inference": transformer_inference,
    "quantizer": quantizer,
    "transformer": partial(transformer_layer, False),
    "stochastic_transformer": partial(transformer_layer, True),
    "sparse_attn": sparse_attention,
}


def training() -> str:
    """train20.py on 2 ranks by the launcher."""
    script = Path(__file__).resolve().with_name("train20.py")
    command = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", "2", "--master_port", "0", str(script)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TRAINING_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stderr[-2000:]}")
    return next(line for line in done.stdout.splitlines() if "steps on" in line).split("] ")[-1]


if __name__ == "__main__":
    sys.exit(main())
