// Numbers as integers by groups, as ops/group_quantize.py says: the C ABI of the kernels, on the CPU and on GPUs.
#pragma once

#include "common/tensor.h"

struct dsl_groups {
    dsl_tensor x;               // (rows, width): what is made integers, or made of them
    uint8_t* values;            // (rows, value_bytes)
    dsl_tensor scales, minima;  // (rows, groups); minima absent where symmetric
    int64_t rows, width, group, groups, value_bytes;
    int32_t bits;  // 8, or 4 with an even group
};

// Groups [begin, end) of all rows.
typedef void dsl_groups_kernel(const dsl_groups* groups, int64_t begin, int64_t end);

extern "C" {
dsl_groups_kernel dsl_quantize_baseline, dsl_quantize_avx2, dsl_quantize_avx512;
dsl_groups_kernel dsl_dequantize_baseline, dsl_dequantize_avx2, dsl_dequantize_avx512;

// The same on a GPU, all groups; 0, or the error code of the runtime.
int dsl_gpu_quantize(const dsl_groups* groups, void* stream);
int dsl_gpu_dequantize(const dsl_groups* groups, void* stream);
}
