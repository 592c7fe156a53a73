// The op deepspeedlite::fused_adam: Adam on GPUs, and on the CPU with cpu_adam's kernel.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/isa.h"
#include "cpu_optim/adam.h"
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/launch.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;
using Number = std::optional<torch::stable::Tensor>;
constexpr size_t ROLES = 7;

void on_cpu(const dsl::Table& table, const dsl::Adam& adam) {
    std::vector<dsl_adam_step> steps;
    for (size_t i = 0; i < table.numels.size(); ++i) {
        steps.push_back(adam.at(*static_cast<const float*>(table.tensors[i * ROLES + ROLES - 1].data)));
    }
    dsl_adam_kernel* const update = DSL_BEST(dsl_adam);
    dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
        update(reinterpret_cast<const dsl_adam_run*>(&table.tensors[i * ROLES]), &steps[i], begin, end);
    });
}

void fused_adam(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                Tensors copies, Tensors steps, Number lr_tensor, Number grad_factor, Number found_inf, double lr,
                double beta1, double beta2, double eps, double weight_decay, double grad_scale, bool decoupled,
                bool bias_correction) {
    const char* const op = "fused_adam";
    const dsl::Table table(op, {{"params", params},
                                {"grads", grads},
                                {"exp_avgs", exp_avgs},
                                {"exp_avg_sqs", exp_avg_sqs},
                                {"max_exp_avg_sqs", max_exp_avg_sqs, dsl::Kind::optional},
                                {"copies", copies, dsl::Kind::optional},
                                {"steps", steps, dsl::Kind::single}});
    const dsl_on_device numbers{table.number(op, "lr_tensor", lr_tensor), table.number(op, "grad_factor", grad_factor),
                                table.number(op, "found_inf", found_inf)};
    if (table.on_cpu) {
        if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
        const double factor = numbers.grad_factor != nullptr ? *numbers.grad_factor : 1;
        on_cpu(table, {numbers.lr != nullptr ? *numbers.lr : lr, beta1, beta2, eps, weight_decay, grad_scale * factor,
                       decoupled, bias_correction});
        return;
    }
#if defined(DSL_GPU)
    dsl_gpu_adam how{};
    how.on_device = numbers;
    how.lr = static_cast<float>(lr);
    how.grad_scale = static_cast<float>(grad_scale);
    how.beta2 = static_cast<float>(beta2);
    how.one_minus_beta1 = static_cast<float>(1 - beta1);
    how.one_minus_beta2 = static_cast<float>(1 - beta2);
    how.log_beta1 = static_cast<float>(std::log(beta1));
    how.log_beta2 = static_cast<float>(std::log(beta2));
    how.eps = static_cast<float>(eps);
    how.weight_decay = static_cast<float>(weight_decay);
    how.decoupled = decoupled;
    how.bias_correction = bias_correction;
    dsl::on_gpu(op, table, [&](void* stream) {
        return dsl_gpu_adam_update(table.tensors.data(), table.numels.data(), table.numels.size(), &how, stream);
    });
#endif
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("fused_adam", TORCH_BOX(&fused_adam)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "fused_adam(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, Tensor[] steps, Tensor? lr_tensor, Tensor? grad_factor, "
        "Tensor? found_inf, float lr, float beta1, float beta2, float eps, float weight_decay, float grad_scale, "
        "bool decoupled, bool bias_correction) -> ()");
}

DSL_IMPLEMENT(implement)
