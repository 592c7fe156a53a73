// The op deepspeedlite::cpu_adam on libtorch's stable ABI: checks its arguments and gives the kernel raw pointers.
#include "cpu_optim/adam.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/binding.h"
#include "common/isa.h"

namespace {

using torch::stable::Tensor;

dsl_tensor argument(const std::vector<Tensor>& list, size_t index, int64_t numel, const char* name) {
    return list.empty() ? dsl_tensor{nullptr, DSL_FP32} : dsl::checked(list[index], numel, "cpu_adam", name, index);
}

// Elements that one thread takes at a time: whole tiles, so that the number of threads changes no result.
constexpr int64_t BLOCK = 1 << 15;

void check_length(const std::vector<Tensor>& list, size_t params, const char* name, bool optional = false) {
    STD_TORCH_CHECK(list.size() == params || (optional && list.empty()), "cpu_adam: ", params, " params, but ",
                    list.size(), " ", name);
}

dsl_adam_kernel* kernel() {
#if defined(__x86_64__)
    static dsl_adam_kernel* const chosen = dsl::best_isa() == dsl::Isa::avx512 ? dsl_adam_avx512
                                           : dsl::best_isa() == dsl::Isa::avx2 ? dsl_adam_avx2
                                                                               : dsl_adam_baseline;
    return chosen;
#else
    return dsl_adam_baseline;
#endif
}

void cpu_adam(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> copies,
              double step, double lr, double beta1, double beta2, double eps, double weight_decay, double grad_scale,
              bool decoupled, bool bias_correction) {
    check_length(grads, params.size(), "grads");
    check_length(exp_avgs, params.size(), "exp_avgs");
    check_length(exp_avg_sqs, params.size(), "exp_avg_sqs");
    check_length(max_exp_avg_sqs, params.size(), "max_exp_avg_sqs", true);
    check_length(copies, params.size(), "copies", true);

    std::vector<dsl_adam_run> runs;
    std::vector<int64_t> first_block{0};
    for (size_t i = 0; i < params.size(); ++i) {
        const int64_t numel = params[i].numel();
        runs.push_back({argument(params, i, numel, "params"), argument(grads, i, numel, "grads"),
                        argument(exp_avgs, i, numel, "exp_avgs"), argument(exp_avg_sqs, i, numel, "exp_avg_sqs"),
                        argument(max_exp_avg_sqs, i, numel, "max_exp_avg_sqs"), argument(copies, i, numel, "copies"),
                        numel});
        first_block.push_back(first_block.back() + (numel + BLOCK - 1) / BLOCK);
    }
    dsl_adam_step how{};
    how.grad_scale = static_cast<float>(grad_scale);
    how.decay = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
    how.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
    how.one_minus_beta1 = static_cast<float>(1 - beta1);
    how.beta2 = static_cast<float>(beta2);
    how.one_minus_beta2 = static_cast<float>(1 - beta2);
    how.step_size = static_cast<float>(bias_correction ? lr / (1 - std::pow(beta1, step)) : lr);
    how.inverse_sqrt_correction = static_cast<float>(bias_correction ? 1 / std::sqrt(1 - std::pow(beta2, step)) : 1.0);
    how.eps = static_cast<float>(eps);

    dsl_adam_kernel* const update = kernel();
    dsl::parallel_for(first_block.back(), [&](int64_t begin, int64_t end) {
        size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
        for (int64_t block = begin; block < end; ++block) {
            while (block >= first_block[i + 1]) ++i;
            const int64_t start = (block - first_block[i]) * BLOCK;
            update(&runs[i], &how, start, std::min(start + BLOCK, runs[i].numel));
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "cpu_adam(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, float step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, float grad_scale, bool decoupled, bool bias_correction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { m.impl("cpu_adam", TORCH_BOX(&cpu_adam)); }
