// LAMB on the CPU, as the C ABI between the kernel (lamb_kernel.cpp) and its binding.
#pragma once

#include "common/tensor.h"

struct dsl_lamb_step {
    float grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    bool eps_inside_sqrt;
};

// Phase one for elements [begin, end): the moments move on, and the sums of squares of parameters and updates are added
// to squares[0] and squares[1]. Tensors: param, grad, exp_avg, exp_avg_sq.
typedef void dsl_lamb_moments_kernel(const dsl_tensor* tensors, const dsl_lamb_step* step, int64_t begin, int64_t end,
                                     double* squares);

// Phase two: the parameter moves by `rate` times its update. Tensors: param, exp_avg, exp_avg_sq, [copy].
typedef void dsl_lamb_apply_kernel(const dsl_tensor* tensors, const dsl_lamb_step* step, int64_t begin, int64_t end,
                                   float rate);

extern "C" dsl_lamb_moments_kernel dsl_lamb_moments_baseline, dsl_lamb_moments_avx2, dsl_lamb_moments_avx512;
extern "C" dsl_lamb_apply_kernel dsl_lamb_apply_baseline, dsl_lamb_apply_avx2, dsl_lamb_apply_avx512;
