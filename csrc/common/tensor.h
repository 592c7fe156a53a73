// A tensor as kernels get it: where it lies and what it is made of.
#pragma once

#include <cstdint>

enum dsl_dtype : int32_t { DSL_FP32, DSL_BF16, DSL_FP16 };

struct dsl_tensor {
    void* data;  // null: the tensor is not there
    dsl_dtype dtype;
};
