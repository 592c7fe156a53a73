// Adam on the CPU, as the C ABI between the kernel (adam_kernel.cpp) and bindings.
#pragma once

#include <cmath>

#include "common/tensor.h"

// One tensor's part in a step; all of the same number of elements, contiguous. An absent one has no data.
struct dsl_adam_run {
    dsl_tensor param, grad, exp_avg, exp_avg_sq;
    dsl_tensor max_exp_avg_sq;  // AMSGrad's
    dsl_tensor copy;            // gets the new values too: the model's 16-bit weights beside an fp32 master
};

struct dsl_adam_step {
    float grad_scale;  // of every gradient first: 1 / loss scale, times the clip factor
    float decay;       // of the parameter: 1 - lr * weight_decay, or 1
    float l2;          // weight decay that is added to the gradient instead, or 0
    float one_minus_beta1, beta2, one_minus_beta2;
    float step_size;                // lr / (1 - beta1^t)
    float inverse_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
    float eps;
};

// Elements [begin, end) of a run.
typedef void dsl_adam_kernel(const dsl_adam_run* run, const dsl_adam_step* step, int64_t begin, int64_t end);

extern "C" dsl_adam_kernel dsl_adam_baseline, dsl_adam_avx2, dsl_adam_avx512;

namespace dsl {

// The numbers of a step as users know them.
struct Adam {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    bool decoupled, bias_correction;

    dsl_adam_step at(double step) const {
        dsl_adam_step how{};
        how.grad_scale = static_cast<float>(grad_scale);
        how.decay = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
        how.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
        how.one_minus_beta1 = static_cast<float>(1 - beta1);
        how.beta2 = static_cast<float>(beta2);
        how.one_minus_beta2 = static_cast<float>(1 - beta2);
        how.step_size = static_cast<float>(bias_correction ? lr / (1 - std::pow(beta1, step)) : lr);
        how.inverse_sqrt_correction =
            static_cast<float>(bias_correction ? 1 / std::sqrt(1 - std::pow(beta2, step)) : 1.0);
        how.eps = static_cast<float>(eps);
        return how;
    }
};

}  // namespace dsl
