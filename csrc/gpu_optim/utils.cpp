// The ops deepspeedlite::multi_tensor_scale and multi_tensor_l2norm, on GPUs and on the CPU.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>

#include "common/isa.h"
#include "cpu_optim/multi_tensor.h"
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/launch.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;
using Number = std::optional<torch::stable::Tensor>;

void multi_tensor_scale(Tensors inputs, Tensors outputs, Number found_inf, Number factor_tensor, double factor) {
    const char* const op = "multi_tensor_scale";
    const dsl::Table table(op, {{"inputs", inputs}, {"outputs", outputs, dsl::Kind::optional}});
    float* const found = table.number(op, "found_inf", found_inf);
    const float* const more = table.number(op, "factor_tensor", factor_tensor);
    if (table.on_cpu) {
        const float by = static_cast<float>(factor) * (more != nullptr ? *more : 1);
        std::atomic<bool> finite{true};
        dsl_scale_kernel* const scale = DSL_BEST(dsl_scale);
        dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
            if (!scale(&table.tensors[i * 2], begin, end, by)) finite = false;
        });
        if (!finite && found != nullptr) *found = 1;
        return;
    }
#if defined(DSL_GPU)
    dsl::on_gpu(op, table, [&](void* stream) {
        return dsl_gpu_scale(table.tensors.data(), table.numels.data(), table.numels.size(), static_cast<float>(factor),
                             more, found, stream);
    });
#endif
}

void multi_tensor_l2norm(Tensors tensors, torch::stable::Tensor norms) {
    const char* const op = "multi_tensor_l2norm";
    const dsl::Table table(op, {{"tensors", tensors}});
    const size_t count = table.numels.size();
    if (table.numels.empty()) return;
    STD_TORCH_CHECK(norms.is_cpu() == table.on_cpu, op, ": norms is on another device than the first tensor");
    const dsl_tensor found = dsl::checked(norms, count, op, "norms", 0);
    STD_TORCH_CHECK(found.dtype == DSL_FP32, op, ": norms must be float32");
    float* const to = static_cast<float*>(found.data);
    if (table.on_cpu) {
        std::vector<std::vector<double>> sums(count);  // one for each of a tensor's blocks, so that no thread waits
        for (size_t i = 0; i < count; ++i) sums[i].resize(table.numels[i] / dsl::BLOCK + 1);
        dsl_squares_kernel* const squares = DSL_BEST(dsl_squares);
        dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
            sums[i][begin / dsl::BLOCK] = squares(&table.tensors[i], begin, end);
        });
        for (size_t i = 0; i < count; ++i) {
            double sum = 0;
            for (const double one : sums[i]) sum += one;
            to[i] = static_cast<float>(std::sqrt(sum));
        }
        return;
    }
#if defined(DSL_GPU)
    dsl::on_gpu(op, table, [&](void* stream) {
        const torch::stable::Tensor partials = dsl::scratch_per_block(table, 1);
        return dsl_gpu_l2norm(table.tensors.data(), table.numels.data(), count,
                              static_cast<float*>(partials.data_ptr()), to, stream);
    });
#endif
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("multi_tensor_scale", TORCH_BOX(&multi_tensor_scale));
    m.impl("multi_tensor_l2norm", TORCH_BOX(&multi_tensor_l2norm));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "multi_tensor_scale(Tensor[] inputs, Tensor(a!)[] outputs, Tensor(b!)? found_inf, Tensor? factor_tensor, "
        "float factor) -> ()");
    m.def("multi_tensor_l2norm(Tensor[] tensors, Tensor(a!) norms) -> ()");
}

DSL_IMPLEMENT(implement)
