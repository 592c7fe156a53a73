"""The table of ops. To add one: its sources under csrc/, a row here, its Python side in deepspeedlite/ops/.

Names, builder classes and flags are DeepSpeed's, so that its build commands work here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpSpec:
    """What a library of ops is made of; paths are relative to csrc/.

    Attributes:
        name: of the library.
        builder: the class that builds and loads it, under DeepSpeed's name.
        flag: the environment variable that has setup.py compile it (1) or leave it out (0).
        ops: the names that it defines in `torch.ops.deepspeedlite`; its own where none are given.
        bindings: files that see torch's stable ABI, compiled once. With GPU kernels they get DSL_CUDA or DSL_HIP, and
            without those they have CPU implementations alone.
        kernels: plain C++, compiled once for each instruction set that the processor's family has.
        plain: plain C++ that is compiled once, without torch.
        gpu: kernels of plain C ABI for nvcc or hipcc, left out where torch has no GPU.
        defines: macros that its bindings are compiled with, for libraries of the same kernels.
    """

    name: str
    builder: str
    flag: str
    ops: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ops:
            object.__setattr__(self, "ops", (self.name,))


_TRANSFORMER_OPS = tuple(
    f"{name}{way}" for name in ("drop_norm", "bias_gelu", "masked_softmax") for way in ("", "_backward")
)
_TRANSFORMER_BINDINGS = ("transformer/transformer.cpp",)
_TRANSFORMER_KERNELS = tuple(f"transformer/{name}_kernel.cpp" for name in ("drop_norm", "bias_gelu", "softmax"))
_ROWS = (
    OpSpec(
        "cpu_adam",
        "CPUAdamBuilder",
        "DS_BUILD_CPU_ADAM",
        bindings=("cpu_optim/adam.cpp",),
        kernels=("cpu_optim/adam_kernel.cpp",),
    ),
    OpSpec(
        "cpu_adagrad",
        "CPUAdagradBuilder",
        "DS_BUILD_CPU_ADAGRAD",
        bindings=("cpu_optim/adagrad.cpp",),
        kernels=("cpu_optim/adagrad_kernel.cpp",),
    ),
    OpSpec(
        "cpu_lion",
        "CPULionBuilder",
        "DS_BUILD_CPU_LION",
        bindings=("cpu_optim/lion.cpp",),
        kernels=("cpu_optim/lion_kernel.cpp",),
    ),
    OpSpec(
        "fused_adam",
        "FusedAdamBuilder",
        "DS_BUILD_FUSED_ADAM",
        bindings=("gpu_optim/fused_adam.cpp",),
        kernels=("cpu_optim/adam_kernel.cpp",),
        gpu=("gpu_optim/adam.cu",),
    ),
    OpSpec(
        "fused_lamb",
        "FusedLambBuilder",
        "DS_BUILD_FUSED_LAMB",
        ops=("fused_lamb_moments", "fused_lamb_apply"),
        bindings=("gpu_optim/fused_lamb.cpp",),
        kernels=("cpu_optim/lamb_kernel.cpp",),
        gpu=("gpu_optim/lamb.cu",),
    ),
    OpSpec(
        "fused_lion",
        "FusedLionBuilder",
        "DS_BUILD_FUSED_LION",
        bindings=("gpu_optim/fused_lion.cpp",),
        kernels=("cpu_optim/lion_kernel.cpp",),
        gpu=("gpu_optim/lion.cu",),
    ),
    OpSpec(
        "utils",
        "UtilsBuilder",
        "DS_BUILD_UTILS",
        ops=("multi_tensor_scale", "multi_tensor_l2norm"),
        bindings=("gpu_optim/utils.cpp",),
        kernels=("cpu_optim/multi_tensor_kernel.cpp",),
        gpu=("gpu_optim/scale.cu", "gpu_optim/l2norm.cu"),
    ),
    OpSpec(
        "async_io",
        "AsyncIOBuilder",
        "DS_BUILD_AIO",
        ops=(
            "aio_open",
            "aio_engine",
            "aio_refused",
            "aio_counts",
            "aio_read",
            "aio_write",
            "aio_wait",
            "aio_close",
        ),
        bindings=("aio/async_io.cpp",),
        plain=("aio/engine.cpp", "aio/request.cpp", "aio/uring.cpp", "aio/native.cpp", "aio/threads.cpp"),
    ),
    OpSpec(
        "transformer",
        "TransformerBuilder",
        "DS_BUILD_TRANSFORMER",
        ops=_TRANSFORMER_OPS,
        bindings=_TRANSFORMER_BINDINGS,
        kernels=_TRANSFORMER_KERNELS,
        gpu=("transformer/transformer.cu",),
    ),
    OpSpec(
        "stochastic_transformer",
        "StochasticTransformerBuilder",
        "DS_BUILD_STOCHASTIC_TRANSFORMER",
        ops=tuple(f"stochastic_{name}" for name in _TRANSFORMER_OPS),
        bindings=_TRANSFORMER_BINDINGS,
        kernels=_TRANSFORMER_KERNELS,
        gpu=("transformer/transformer.cu",),
        defines=("DSL_STOCHASTIC",),
    ),
    OpSpec(
        "transformer_inference",
        "InferenceBuilder",
        "DS_BUILD_TRANSFORMER_INFERENCE",
        ops=(
            "few_row_product",
            "unpack_weight",
            "multiplies_bytes",
            "add_norm",
            "rotary_to_cache",
            "decode_attention",
            "gated_activation",
        ),
        bindings=("transformer_inference/product.cpp", "transformer_inference/between.cpp"),
        kernels=(
            "transformer_inference/product_kernel.cpp",
            "transformer_inference/attention_kernel.cpp",
            "transformer_inference/norm_kernel.cpp",
            "transformer_inference/gate_kernel.cpp",
        ),
        gpu=(
            "transformer_inference/product.cu",
            "transformer_inference/attention.cu",
            "transformer_inference/between.cu",
        ),
    ),
    OpSpec(
        "quantizer",
        "QuantizerBuilder",
        "DS_BUILD_QUANTIZER",
        ops=("quantize_groups", "dequantize_groups"),
        bindings=("quantizer/quantizer.cpp",),
        kernels=("quantizer/quantizer_kernel.cpp",),
        gpu=("quantizer/quantizer.cu",),
    ),
    OpSpec(
        "sparse_attn",
        "SparseAttnBuilder",
        "DS_BUILD_SPARSE_ATTN",
        ops=("sparse_attention_forward", "sparse_attention_backward"),
        bindings=("sparse_attn/sparse_attn.cpp",),
        kernels=("sparse_attn/backward_kernel.cpp", "sparse_attn/forward_kernel.cpp"),
        gpu=("sparse_attn/sparse_attn.cu",),
    ),
)
OPS = {spec.name: spec for spec in _ROWS}
