// The ops deepspeedlite::few_row_product and unpack_weight, on GPUs and on the CPU, and multiplies_bytes, which says
// whether the first is quick with more than eight rows of packed weights.
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

// For all of `rows`, on torch's threads where there are many.
template <class Work>
void for_rows(int64_t rows, const Work& work) {
    rows <= DSL_FEW_ROWS ? work(0, rows) : dsl::parallel_for(rows, work);
}

// The product on the CPU, once x is as the kernels want it: in memory that this thread keeps.
void multiply(dsl_product& p) {
    const int32_t extensions = DSL_BEST(dsl_extensions)();
    dsl_product_kernel* const kernel = DSL_BEST(dsl_product);
    const auto panels = [&](int64_t begin, int64_t end) { kernel(&p, begin, end); };
    const int64_t all = (p.out + DSL_PANEL - 1) / DSL_PANEL;
    const bool pairs = (extensions & DSL_BF16_PAIRS) != 0 && p.bits == 0;
    if (pairs && p.weight.dtype == DSL_BF16 && p.input.dtype == DSL_BF16) return dsl::parallel_for(all, panels);
    const int64_t eights = (p.rows + DSL_FEW_ROWS - 1) / DSL_FEW_ROWS * DSL_FEW_ROWS;
    const int64_t rows = p.rows <= 2 ? p.rows : p.rows <= 4 ? 4 : eights;
    const int64_t numel = rows * p.width, groups = p.bits == 0 ? 0 : rows * (p.width / p.group);
    float* const wide = dsl::scratch_of_thread(numel + numel / 2 + 2 * groups);
    p.x_stride = p.width;
    p.x = static_cast<const float*>(p.input.data);
    if (p.input.dtype != DSL_FP32 || p.width != p.columns || rows != p.rows) {
        p.x = wide;
        dsl_spread_rows_kernel* const spread = DSL_BEST(dsl_spread_rows);
        for_rows(rows, [&](int64_t begin, int64_t end) {
            spread(&p.input, p.rows, p.columns, wide, p.x_stride, begin, end);
        });
    }
    if (p.bits != 0 && p.group <= DSL_INTEGER_GROUP && (extensions & DSL_BYTES) != 0) {
        auto* const high = reinterpret_cast<int8_t*>(wide + numel);
        auto* const sums = reinterpret_cast<int32_t*>(high + 2 * numel);
        p.integers = {high, high + numel, sums, reinterpret_cast<float*>(sums + groups)};
        dsl_integers_kernel* const make_integers = DSL_BEST(dsl_integers);
        for_rows(rows,
                 [&](int64_t begin, int64_t end) { make_integers(p.x, p.width, p.group, &p.integers, begin, end); });
    }
    dsl::parallel_for(all, panels);
}

void few_row_product(Tensor x, Tensor weight, MaybeTensor scales, MaybeTensor bias, Tensor y, int64_t bits,
                     int64_t group) {
    const dsl::Arguments arguments("few_row_product", x);
    const int64_t width = x.dim() == 0 ? 0 : x.size(-1), out = y.dim() == 0 ? 0 : y.size(-1);
    const int64_t rows = width == 0 ? 0 : x.numel() / width;
    arguments.check(rows >= 1, "x must have rows that are not empty");
    arguments.check(rows <= DSL_FEW_ROWS || (bits != 0 && arguments.on_cpu), "x must have at most eight rows");
    dsl_product p = describe(arguments, weight, scales, width, out, bits, group);
    p.input = arguments.floats("x", x, rows * width);
    p.bias = arguments.floats("bias", bias, out);
    p.y = arguments.floats("y", y, rows * out);
    p.rows = rows;
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("few_row_product", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_product(&p, stream); });
    }
#endif
    multiply(p);
}

bool multiplies_bytes() { return (DSL_BEST(dsl_extensions)() & DSL_BYTES) != 0; }

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
    m.def("multiplies_bytes() -> bool");
    m.def("unpack_weight(Tensor weight, Tensor scales, Tensor(a!) out, int bits, int group) -> ()");
}

DSL_IMPLEMENT(implement)

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CompositeExplicitAutograd, m) {
    m.impl("multiplies_bytes", TORCH_BOX(&multiplies_bytes));
}
