// The op deepspeedlite::cpu_adagrad on libtorch's stable ABI: checks its arguments and gives the kernel raw pointers.
#include "cpu_optim/adagrad.h"

#include <torch/csrc/stable/library.h>

#include "common/binding.h"
#include "common/isa.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;

void cpu_adagrad(Tensors params, Tensors grads, Tensors sums, Tensors copies, double lr, double eps,
                 double weight_decay, double grad_scale) {
    const dsl::Table table(
        "cpu_adagrad", {{"params", params}, {"grads", grads}, {"sums", sums}, {"copies", copies, dsl::Kind::optional}});
    const auto* const runs = reinterpret_cast<const dsl_adagrad_run*>(table.tensors.data());
    const dsl_adagrad_step how{static_cast<float>(grad_scale), static_cast<float>(weight_decay), static_cast<float>(lr),
                               static_cast<float>(eps)};
    dsl_adagrad_kernel* const update = DSL_BEST(dsl_adagrad);
    dsl::parallel_over(table.numels, [&](size_t i, int64_t begin, int64_t end) { update(&runs[i], &how, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "cpu_adagrad(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, Tensor(c!)[] copies, float lr, "
        "float eps, float weight_decay, float grad_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { m.impl("cpu_adagrad", TORCH_BOX(&cpu_adagrad)); }
