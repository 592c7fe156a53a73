// The op deepspeedlite::cpu_adam on libtorch's stable ABI: checks its arguments and gives the kernel raw pointers.
#include "cpu_optim/adam.h"

#include <torch/csrc/stable/library.h>

#include "common/binding.h"
#include "common/isa.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;

void cpu_adam(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
              Tensors copies, double step, double lr, double beta1, double beta2, double eps, double weight_decay,
              double grad_scale, bool decoupled, bool bias_correction) {
    const dsl::Table table("cpu_adam", {{"params", params},
                                        {"grads", grads},
                                        {"exp_avgs", exp_avgs},
                                        {"exp_avg_sqs", exp_avg_sqs},
                                        {"max_exp_avg_sqs", max_exp_avg_sqs, dsl::Kind::optional},
                                        {"copies", copies, dsl::Kind::optional}});
    const auto* const runs = reinterpret_cast<const dsl_adam_run*>(table.tensors.data());
    const dsl::Adam adam{lr, beta1, beta2, eps, weight_decay, grad_scale, decoupled, bias_correction};
    const dsl_adam_step how = adam.at(step);
    dsl_adam_kernel* const update = DSL_BEST(dsl_adam);
    dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) { update(&runs[i], &how, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "cpu_adam(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, float step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, float grad_scale, bool decoupled, bool bias_correction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { m.impl("cpu_adam", TORCH_BOX(&cpu_adam)); }
