// The ops deepspeedlite::few_row_product and unpack_weight, on GPUs and on the CPU.
#include "transformer_inference/product.h"

#include <torch/csrc/stable/library.h>

#include "common/arguments.h"
#include "common/isa.h"
#include "common/on_gpu.h"

namespace {

using dsl::MaybeTensor;
using dsl::Tensor;
using torch::headeronly::ScalarType;

// What is said of the weight; `width` of inputs it must have.
dsl_product describe(const dsl::Arguments& arguments, const Tensor& weight, const MaybeTensor& scales, int64_t width,
                     int64_t out, int64_t bits, int64_t group) {
    dsl_product p{};
    p.bits = static_cast<int32_t>(bits);
    p.out = out;
    p.width = p.columns = width;
    if (bits == 0) {
        p.weight = arguments.floats("weight", weight, out * width);
        return p;
    }
    arguments.check(bits == 8 || bits == 4, "bits must be 0, 8 or 4");
    arguments.check(group > 0 && group % 8 == 0, "a group must have whole multiples of 8");
    arguments.check(scales.has_value(), "a packed weight needs scales");
    p.group = group;
    p.width = (width + group - 1) / group * group;
    const int64_t panels = (out + DSL_PANEL - 1) / DSL_PANEL;
    p.weight.data = arguments.data<void>("weight", weight, ScalarType::Byte, panels * DSL_PANEL * p.width * bits / 8);
    p.scales = arguments.data<uint16_t>("scales", *scales, ScalarType::BFloat16, panels * DSL_PANEL * p.width / group);
    return p;
}

void few_row_product(Tensor x, Tensor weight, MaybeTensor scales, MaybeTensor bias, Tensor y, int64_t bits,
                     int64_t group) {
    const dsl::Arguments arguments("few_row_product", x);
    const int64_t width = x.size(-1), out = y.size(-1), rows = width == 0 ? 0 : x.numel() / width;
    arguments.check(rows >= 1 && rows <= DSL_FEW_ROWS, "x must have one to eight rows that are not empty");
    dsl_product p = describe(arguments, weight, scales, width, out, bits, group);
    const dsl_tensor from = arguments.floats("x", x, rows * width);
    p.bias = arguments.floats("bias", bias, out);
    p.y = arguments.floats("y", y, rows * out);
    p.rows = rows;
    p.input = from;
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("few_row_product", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_product(&p, stream); });
    }
#endif
    p.padded_rows = rows <= 2 ? rows : rows <= 4 ? 4 : 8;
    p.x_stride = p.width;
    const int64_t numel = p.padded_rows * p.x_stride, groups = bits == 0 ? 0 : p.padded_rows * (p.width / group);
    float* const wide = dsl::scratch_of_thread(numel + numel / 2 + 2 * groups);
    if (from.dtype == DSL_FP32 && p.width == width && p.padded_rows == rows) {
        p.x = static_cast<const float*>(from.data);
    } else {
        DSL_BEST(dsl_spread_rows)(&from, rows, width, wide, p.padded_rows, p.x_stride);
        p.x = wide;
    }
    if (bits != 0) {
        auto* const high = reinterpret_cast<int8_t*>(wide + numel);
        dsl_integers whole{high, high + numel, reinterpret_cast<int32_t*>(high + 2 * numel), nullptr};
        whole.scales = reinterpret_cast<float*>(whole.sums + groups);
        if (DSL_BEST(dsl_integers)(p.x, p.padded_rows, p.width, group, &whole)) p.integers = whole;
    }
    dsl_product_kernel* const multiply = DSL_BEST(dsl_product);
    dsl::parallel_for((out + DSL_PANEL - 1) / DSL_PANEL, [&](int64_t begin, int64_t end) { multiply(&p, begin, end); });
}

void unpack_weight(Tensor weight, Tensor scales, Tensor out, int64_t bits, int64_t group) {
    const dsl::Arguments arguments("unpack_weight", weight);
    arguments.check(out.dim() == 2, "out must be a matrix");
    const dsl_product p = describe(arguments, weight, scales, out.size(1), out.size(0), bits, group);
    const dsl_tensor to = arguments.floats("out", out, out.numel());
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("unpack_weight", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_unpack(&p, &to, stream); });
    }
#endif
    dsl_unpack_kernel* const unpack = DSL_BEST(dsl_unpack);
    dsl::parallel_for((p.out + DSL_PANEL - 1) / DSL_PANEL,
                      [&](int64_t begin, int64_t end) { unpack(&p, &to, begin, end); });
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("few_row_product", TORCH_BOX(&few_row_product));
    m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "few_row_product(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor(a!) y, int bits, int group) -> "
        "()");
    m.def("unpack_weight(Tensor weight, Tensor scales, Tensor(a!) out, int bits, int group) -> ()");
}

DSL_IMPLEMENT(implement)
