// Adam on the CPU, as the C ABI between the kernel (adam_kernel.cpp) and its binding (adam.cpp).
#pragma once

#include "common/tile.h"

// One tensor's part in a step; all of `numel` elements, contiguous. An absent one has no data.
struct dsl_adam_run {
    dsl_tensor param, grad, exp_avg, exp_avg_sq;
    dsl_tensor max_exp_avg_sq;  // AMSGrad's
    dsl_tensor copy;            // gets the new values too: the model's 16-bit weights beside an fp32 master
    int64_t numel;
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
