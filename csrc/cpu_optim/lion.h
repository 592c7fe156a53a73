// Lion on the CPU, as the C ABI between the kernel (lion_kernel.cpp) and bindings.
#pragma once

#include "common/tensor.h"

struct dsl_lion_step {
    float lr, decay;   // decay: of the parameter, 1 - lr * weight_decay
    float grad_scale;  // of every gradient first: 1 / loss scale, times the clip factor
    float one_minus_beta1, one_minus_beta2;
};

// Elements [begin, end) of one tensor's param, grad, exp_avg and [copy], which gets the new values too.
typedef void dsl_lion_kernel(const dsl_tensor* tensors, const dsl_lion_step* step, int64_t begin, int64_t end);

extern "C" dsl_lion_kernel dsl_lion_baseline, dsl_lion_avx2, dsl_lion_avx512;
