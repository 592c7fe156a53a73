// Adagrad on the CPU, as the C ABI between the kernel (adagrad_kernel.cpp) and bindings.
#pragma once

#include "common/tensor.h"

// One tensor's part in a step; all of the same number of elements, contiguous. An absent one has no data.
struct dsl_adagrad_run {
    dsl_tensor param, grad, sum;
    dsl_tensor copy;  // gets the new values too: the model's 16-bit weights beside an fp32 master
};

struct dsl_adagrad_step {
    float grad_scale;  // of every gradient first: 1 / loss scale, times the clip factor
    float l2;          // weight decay, added to the gradient
    float lr, eps;
};

// Elements [begin, end) of a run.
typedef void dsl_adagrad_kernel(const dsl_adagrad_run* run, const dsl_adagrad_step* step, int64_t begin, int64_t end);

extern "C" dsl_adagrad_kernel dsl_adagrad_baseline, dsl_adagrad_avx2, dsl_adagrad_avx512;
