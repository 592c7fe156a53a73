// The ops deepspeedlite::quantize_groups and dequantize_groups, on GPUs and on the CPU.
#include "quantizer/quantizer.h"

#include <torch/csrc/stable/library.h>

#include "common/arguments.h"
#include "common/isa.h"
#include "common/on_gpu.h"

namespace {

using dsl::MaybeTensor;
using dsl::Tensor;
using torch::headeronly::ScalarType;

dsl_groups describe(const dsl::Arguments& arguments, const Tensor& x, const Tensor& values, const Tensor& scales,
                    const MaybeTensor& minima, int64_t bits, int64_t group) {
    arguments.check(bits == 8 || bits == 4, "bits must be 8 or 4");
    arguments.check(group > 0 && (bits == 8 || group % 2 == 0), "a group must not be empty, and even with 4 bits");
    dsl_groups how{};
    how.width = x.dim() == 0 ? 0 : x.size(-1);
    how.rows = how.width == 0 ? 0 : x.numel() / how.width;
    how.group = group;
    how.groups = (how.width + group - 1) / group;
    how.value_bytes = bits == 8 ? how.width : (how.width + 1) / 2;
    how.bits = static_cast<int32_t>(bits);
    how.x = arguments.floats("x", x, how.rows * how.width);
    const ScalarType integer = bits == 8 && !minima.has_value() ? ScalarType::Char : ScalarType::Byte;
    how.values = arguments.data<uint8_t>("values", values, integer, how.rows * how.value_bytes);
    how.scales = arguments.floats("scales", scales, how.rows * how.groups);
    how.minima = arguments.floats("minima", minima, how.rows * how.groups);
    return how;
}

using Gpu = int(const dsl_groups*, void*);

void run(const dsl::Arguments& arguments, const char* op, const dsl_groups& how, dsl_groups_kernel* cpu, Gpu* gpu) {
    if (how.rows == 0) return;
    if (arguments.on_cpu) {
        const int64_t numel = how.rows * how.width, groups = how.rows * how.groups;
        if (numel <= dsl::BLOCK) return cpu(&how, 0, groups);
        return dsl::parallel_for(groups, [&](int64_t begin, int64_t end) { cpu(&how, begin, end); });
    }
#if defined(DSL_GPU)
    dsl::on_gpu(op, arguments.device_index, [&](void* stream) { return gpu(&how, stream); });
#else
    (void)op, (void)gpu;
#endif
}

#if !defined(DSL_GPU)
constexpr Gpu *dsl_gpu_quantize = nullptr, *dsl_gpu_dequantize = nullptr;
#endif

void quantize_groups(Tensor x, Tensor values, Tensor scales, MaybeTensor minima, int64_t bits, int64_t group) {
    const dsl::Arguments arguments("quantize_groups", x);
    const dsl_groups how = describe(arguments, x, values, scales, minima, bits, group);
    run(arguments, "quantize_groups", how, DSL_BEST(dsl_quantize), dsl_gpu_quantize);
}

void dequantize_groups(Tensor values, Tensor scales, MaybeTensor minima, Tensor out, int64_t bits, int64_t group) {
    const dsl::Arguments arguments("dequantize_groups", values);
    const dsl_groups how = describe(arguments, out, values, scales, minima, bits, group);
    run(arguments, "dequantize_groups", how, DSL_BEST(dsl_dequantize), dsl_gpu_dequantize);
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_groups", TORCH_BOX(&quantize_groups));
    m.impl("dequantize_groups", TORCH_BOX(&dequantize_groups));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "quantize_groups(Tensor x, Tensor(a!) values, Tensor(b!) scales, Tensor(c!)? minima, int bits, int group) -> "
        "()");
    m.def("dequantize_groups(Tensor values, Tensor scales, Tensor? minima, Tensor(a!) out, int bits, int group) -> ()");
}

DSL_IMPLEMENT(implement)
