// The op deepspeedlite::cpu_lion on libtorch's stable ABI: checks its arguments and gives the kernel raw pointers.
#include "cpu_optim/lion.h"

#include <torch/csrc/stable/library.h>

#include "common/binding.h"
#include "common/isa.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;

void cpu_lion(Tensors params, Tensors grads, Tensors exp_avgs, Tensors copies, double lr, double beta1, double beta2,
              double weight_decay, double grad_scale) {
    const dsl::Table table(
        "cpu_lion",
        {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"copies", copies, dsl::Kind::optional}});
    dsl_lion_step how{};
    how.lr = static_cast<float>(lr);
    how.decay = static_cast<float>(1 - lr * weight_decay);
    how.grad_scale = static_cast<float>(grad_scale);
    how.one_minus_beta1 = static_cast<float>(1 - beta1);
    how.one_minus_beta2 = static_cast<float>(1 - beta2);
    dsl_lion_kernel* const update = DSL_BEST(dsl_lion);
    dsl::parallel_over(table.numels,
                       [&](size_t i, int64_t begin, int64_t end) { update(&table.tensors[4 * i], &how, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "cpu_lion(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] copies, float lr, "
        "float beta1, float beta2, float weight_decay, float grad_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { m.impl("cpu_lion", TORCH_BOX(&cpu_lion)); }
