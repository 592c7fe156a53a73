// Scaling, casting, checking and norms on the CPU: the C ABI between multi_tensor_kernel.cpp and its binding.
#pragma once

#include "common/tensor.h"

// out = in * factor in out's dtype, for elements [begin, end); whether all results are finite. Tensors: in, [out].
typedef bool dsl_scale_kernel(const dsl_tensor* tensors, int64_t begin, int64_t end, float factor);

// The sum of squares of elements [begin, end).
typedef double dsl_squares_kernel(const dsl_tensor* tensor, int64_t begin, int64_t end);

extern "C" dsl_scale_kernel dsl_scale_baseline, dsl_scale_avx2, dsl_scale_avx512;
extern "C" dsl_squares_kernel dsl_squares_baseline, dsl_squares_avx2, dsl_squares_avx512;
