// LAMB's two ops, deepspeedlite::fused_lamb_moments and fused_lamb_apply, on GPUs and on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/isa.h"
#include "cpu_optim/lamb.h"
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/launch.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;
using Number = std::optional<torch::stable::Tensor>;

#if defined(DSL_GPU)
dsl_gpu_lamb gpu_numbers(const dsl_on_device& on_device, double beta1, double beta2, double eps, double weight_decay,
                         bool eps_inside_sqrt) {
    dsl_gpu_lamb how{};
    how.on_device = on_device;
    how.beta2 = static_cast<float>(beta2);
    how.one_minus_beta1 = static_cast<float>(1 - beta1);
    how.one_minus_beta2 = static_cast<float>(1 - beta2);
    how.log_beta1 = static_cast<float>(std::log(beta1));
    how.log_beta2 = static_cast<float>(std::log(beta2));
    how.eps = static_cast<float>(eps);
    how.weight_decay = static_cast<float>(weight_decay);
    how.eps_inside_sqrt = eps_inside_sqrt;
    return how;
}
#endif

// The norms' tensor, (2, count) and fp32 on the tensors' device.
float* norms_of(const char* op, const dsl::Table& table, const torch::stable::Tensor& norms) {
    STD_TORCH_CHECK(norms.is_cpu() == table.on_cpu && norms.get_device_index() == table.device_index, op,
                    ": norms is on another device than the first tensor");
    const dsl_tensor found = dsl::checked(norms, 2 * table.numels.size(), op, "norms", 0);
    STD_TORCH_CHECK(found.dtype == DSL_FP32, op, ": norms must be float32");
    return static_cast<float*>(found.data);
}

void moments_on_cpu(const dsl::Table& table, const dsl_lamb_step& step, float* norms) {
    const size_t count = table.numels.size();
    std::vector<std::vector<double>> squares(count);  // two for each of a tensor's blocks, so that no thread waits
    for (size_t i = 0; i < count; ++i) squares[i].resize(2 * (table.numels[i] / dsl::BLOCK + 1));
    dsl_lamb_moments_kernel* const advance = DSL_BEST(dsl_lamb_moments);
    dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
        advance(&table.tensors[i * 4], &step, begin, end, &squares[i][2 * (begin / dsl::BLOCK)]);
    });
    for (size_t i = 0; i < count; ++i) {
        double sums[2] = {0, 0};
        for (size_t k = 0; k < squares[i].size(); ++k) sums[k % 2] += squares[i][k];
        norms[i] = static_cast<float>(std::sqrt(sums[0]));
        norms[i + count] = static_cast<float>(std::sqrt(sums[1]));
    }
}

void fused_lamb_moments(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                        torch::stable::Tensor norms, Number grad_factor, Number found_inf, double beta1, double beta2,
                        double eps, double weight_decay, double grad_scale, bool eps_inside_sqrt) {
    const char* const op = "fused_lamb_moments";
    const dsl::Table table(
        op, {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
    const dsl_on_device numbers{nullptr, table.number(op, "grad_factor", grad_factor),
                                table.number(op, "found_inf", found_inf)};
    if (table.numels.empty()) return;
    float* const found_norms = norms_of(op, table, norms);
    if (table.on_cpu) {
        if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
        const double factor = numbers.grad_factor != nullptr ? *numbers.grad_factor : 1;
        const dsl_lamb_step step{static_cast<float>(grad_scale * factor),
                                 static_cast<float>(1 - beta1),
                                 static_cast<float>(beta2),
                                 static_cast<float>(1 - beta2),
                                 static_cast<float>(eps),
                                 static_cast<float>(weight_decay),
                                 eps_inside_sqrt};
        return moments_on_cpu(table, step, found_norms);
    }
#if defined(DSL_GPU)
    dsl_gpu_lamb how = gpu_numbers(numbers, beta1, beta2, eps, weight_decay, eps_inside_sqrt);
    how.grad_scale = static_cast<float>(grad_scale);
    dsl::on_gpu(op, table, [&](void* stream) {
        const torch::stable::Tensor partials = dsl::scratch_per_block(table, 2);
        return dsl_gpu_lamb_moments(table.tensors.data(), table.numels.data(), table.numels.size(), &how,
                                    static_cast<float*>(partials.data_ptr()), found_norms, stream);
    });
#endif
}

void fused_lamb_apply(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors copies, Tensors steps,
                      torch::stable::Tensor norms, Number lr_tensor, Number found_inf, double lr, double beta1,
                      double beta2, double eps, double weight_decay, double min_coeff, double max_coeff,
                      bool eps_inside_sqrt, bool bias_correction) {
    const char* const op = "fused_lamb_apply";
    const dsl::Table table(op, {{"params", params},
                                {"exp_avgs", exp_avgs},
                                {"exp_avg_sqs", exp_avg_sqs},
                                {"copies", copies, dsl::Kind::optional},
                                {"steps", steps, dsl::Kind::single}});
    const dsl_on_device numbers{table.number(op, "lr_tensor", lr_tensor), nullptr,
                                table.number(op, "found_inf", found_inf)};
    if (table.numels.empty()) return;
    const float* const of_tensors = norms_of(op, table, norms);
    if (table.on_cpu) {
        if (numbers.found_inf != nullptr && *numbers.found_inf != 0) return;
        const size_t count = table.numels.size();
        const dsl_lamb_step how{1, 0, 0, 0, static_cast<float>(eps), static_cast<float>(weight_decay), eps_inside_sqrt};
        std::vector<float> rates;
        for (size_t i = 0; i < count; ++i) {
            const double step = *static_cast<const float*>(table.tensors[i * 5 + 4].data);
            double rate = numbers.lr != nullptr ? *numbers.lr : lr;
            if (bias_correction) rate *= std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
            const double param_norm = of_tensors[i], update_norm = of_tensors[i + count];
            if (param_norm > 0 && update_norm > 0) {
                rate *= std::min(std::max(param_norm / update_norm, min_coeff), max_coeff);
            }
            rates.push_back(static_cast<float>(rate));
        }
        dsl_lamb_apply_kernel* const apply = DSL_BEST(dsl_lamb_apply);
        dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) {
            apply(&table.tensors[i * 5], &how, begin, end, rates[i]);
        });
        return;
    }
#if defined(DSL_GPU)
    dsl_gpu_lamb how = gpu_numbers(numbers, beta1, beta2, eps, weight_decay, eps_inside_sqrt);
    how.lr = static_cast<float>(lr);
    how.min_coeff = static_cast<float>(min_coeff);
    how.max_coeff = static_cast<float>(max_coeff);
    how.bias_correction = bias_correction;
    dsl::on_gpu(op, table, [&](void* stream) {
        return dsl_gpu_lamb_apply(table.tensors.data(), table.numels.data(), table.numels.size(), &how, of_tensors,
                                  stream);
    });
#endif
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("fused_lamb_moments", TORCH_BOX(&fused_lamb_moments));
    m.impl("fused_lamb_apply", TORCH_BOX(&fused_lamb_apply));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "fused_lamb_moments(Tensor[] params, Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, "
        "Tensor(c!) norms, Tensor? grad_factor, Tensor? found_inf, float beta1, float beta2, float eps, "
        "float weight_decay, float grad_scale, bool eps_inside_sqrt) -> ()");
    m.def(
        "fused_lamb_apply(Tensor(a!)[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor(b!)[] copies, "
        "Tensor[] steps, Tensor norms, Tensor? lr_tensor, Tensor? found_inf, float lr, float beta1, float beta2, "
        "float eps, float weight_decay, float min_coeff, float max_coeff, bool eps_inside_sqrt, bool bias_correction) "
        "-> ()");
}

DSL_IMPLEMENT(implement)
