// The op deepspeedlite::fused_lion on GPUs and on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/isa.h"
#include "cpu_optim/lion.h"
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/launch.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;
using Number = std::optional<torch::stable::Tensor>;

void fused_lion(Tensors params, Tensors grads, Tensors exp_avgs, Tensors copies, Number lr_tensor, Number grad_factor,
                Number found_inf, double lr, double beta1, double beta2, double weight_decay, double grad_scale) {
    const char* const op = "fused_lion";
    const dsl::Table table(
        op, {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"copies", copies, dsl::Kind::optional}});
    if (table.numels.empty()) return;
    const dsl_on_device numbers{table.number(op, "lr_tensor", lr_tensor), table.number(op, "grad_factor", grad_factor),
                                table.number(op, "found_inf", found_inf)};
    const auto rest1 = static_cast<float>(1 - beta1), rest2 = static_cast<float>(1 - beta2);
    if (table.on_cpu) {
        if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
        const double rate = numbers.lr != nullptr ? *numbers.lr : lr;
        const double factor = numbers.grad_factor != nullptr ? *numbers.grad_factor : 1;
        const dsl_lion_step step{static_cast<float>(rate), static_cast<float>(1 - rate * weight_decay),
                                 static_cast<float>(grad_scale * factor), rest1, rest2};
        dsl_lion_kernel* const update = DSL_BEST(dsl_lion);
        dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
            update(&table.tensors[i * 4], &step, begin, end);
        });
        return;
    }
#if defined(DSL_GPU)
    const dsl_gpu_lion how{numbers, static_cast<float>(lr),          static_cast<float>(grad_scale), rest1,
                           rest2,   static_cast<float>(weight_decay)};
    dsl::on_gpu(op, table, [&](void* stream) {
        return dsl_gpu_lion_update(table.tensors.data(), table.numels.data(), table.numels.size(), &how, stream);
    });
#endif
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("fused_lion", TORCH_BOX(&fused_lion)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "fused_lion(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] copies, "
        "Tensor? lr_tensor, Tensor? grad_factor, Tensor? found_inf, float lr, float beta1, float beta2, "
        "float weight_decay, float grad_scale) -> ()");
}

DSL_IMPLEMENT(implement)
