// Products of a few rows with a weight matrix: the C ABI between kernels, on the CPU and on GPUs, and bindings.
#pragma once

#include "common/tensor.h"

constexpr int64_t DSL_PANEL = 16;           // outputs that a thread takes at a time, and that a packed panel holds
constexpr int64_t DSL_FEW_ROWS = 8;         // that are multiplied at once
constexpr float DSL_INTEGER_STEPS = 32639;  // 127 * 257: the largest whole number that x is made
constexpr int64_t DSL_INTEGER_GROUP = 256;  // more products of such could overflow 32 bits

// x as integers of 16 bits (256 * high + low), by the weight's groups: rows of dsl_product's width without gaps.
struct dsl_integers {
    int8_t *high, *low;
    int32_t* sums;  // (rows, groups), as are the scales
    float* scales;
};

struct dsl_product {
    const float*
        x;  // null: pairs of `input` are multiplied; else rows x_stride apart; those that `rows` lacks to 1, 2, 4 or whole eights are 0
    int64_t x_stride, rows;  // rows: of y
    int64_t width, out;      // width: of the weight as it lies, whole groups where it is packed
    int32_t bits;            // 0: weight is (out, width); 8 or 4: packed, as ops/packed_linear.py says
    dsl_tensor weight;
    const uint16_t* scales;  // bfloat16 (panels, width / group, 16); null without bits
    int64_t group;           // inputs that share a scale
    dsl_tensor bias;         // (out), or absent
    dsl_tensor y;            // (rows, out)
    dsl_integers integers;   // of x, or null
    dsl_tensor input;        // x as it was given, (rows, columns)
    int64_t columns;         // of x, and of a packed weight without what was added
};

// Panels [begin, end) of the outputs.
typedef void dsl_product_kernel(const dsl_product* product, int64_t begin, int64_t end);

// Rows [begin, end) of x (rows, width) as float32, `to_stride` apart; 0 behind each row, and in rows that x lacks.
typedef void dsl_spread_rows_kernel(const dsl_tensor* x, int64_t rows, int64_t width, float* to, int64_t to_stride,
                                    int64_t begin, int64_t end);

// What the processor multiplies beside floats: bytes, so that rows for packed weights are better made integers, and
// pairs of bfloat16, so that rows of it are better left as they are.
enum : int32_t { DSL_BYTES = 1, DSL_BF16_PAIRS = 2 };
typedef int32_t dsl_extensions_kernel();

// Rows [begin, end) of x, as wide as `width`, as integers.
typedef void dsl_integers_kernel(const float* x, int64_t width, int64_t group, const dsl_integers* to, int64_t begin,
                                 int64_t end);

// The weight of panels [begin, end), times its scales, into `to` (out, columns).
typedef void dsl_unpack_kernel(const dsl_product* product, const dsl_tensor* to, int64_t begin, int64_t end);

extern "C" {
dsl_product_kernel dsl_product_baseline, dsl_product_avx2, dsl_product_avx512;
dsl_spread_rows_kernel dsl_spread_rows_baseline, dsl_spread_rows_avx2, dsl_spread_rows_avx512;
dsl_extensions_kernel dsl_extensions_baseline, dsl_extensions_avx2, dsl_extensions_avx512;
dsl_integers_kernel dsl_integers_baseline, dsl_integers_avx2, dsl_integers_avx512;
dsl_unpack_kernel dsl_unpack_baseline, dsl_unpack_avx2, dsl_unpack_avx512;

// On a GPU; 0, or the error code of the runtime.
int dsl_gpu_product(const dsl_product* product, void* stream);
int dsl_gpu_unpack(const dsl_product* product, const dsl_tensor* to, void* stream);
}
