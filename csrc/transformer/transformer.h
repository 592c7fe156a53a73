// What stands between a transformer layer's products when it trains: the C ABI between kernels, on the CPU and on GPUs,
// and bindings. Arithmetic is fp32. No dropout mask is kept: it is made of the seed and the stream again.
//
// A tensor that is not there has null data. An output that is not there is not asked for. Gradients may be written over
// the gradients that they are made of: grad_x and grad_residual over grad_normed or grad_summed, grad_scores over
// grad_dropped.
//
// What is summed over rows goes through `parts`: one part for each DSL_PART rows, in the order of rows, so that the
// number of threads changes no bit. Where a call is `stochastic`, a kernel may add in any order and take shorter ways to
// moments and exponentials. That is asked when the op runs, so that both libraries have the same kernels.
#pragma once

#include "common/philox.h"
#include "common/tensor.h"

constexpr int64_t DSL_PART = 32;  // rows

// Forward:  summed = dropout(x + bias) + residual,  normed = (summed - mean) * rstd * weight + shift
// The layer norm of Ba et al. 2016 (arXiv:1607.06450). The element's number in the mask is row * hidden + column.
struct dsl_drop_norm {
    dsl_tensor x, bias, residual;  // (rows, hidden), (hidden) or absent, (rows, hidden) or absent
    dsl_tensor summed, normed;     // (rows, hidden), each may be absent; normed is of the sum as it was rounded to x's
                                   // dtype, be it kept or not
    dsl_tensor weight, shift;      // (hidden), there where normed is
    float *mean, *rstd;            // (rows): 1 / sqrt(variance + eps); null where normed is absent
    int64_t rows, hidden;
    float eps;
    int32_t stochastic;
    dsl_dropout dropout;
};

// Backward. Of the forward pass's tensors it reads `summed`, or, where that is absent, makes the norm's input again from
// `normed` (weights of 0 have nothing to be made from; there the normalized number counts as 0).
//   grad_residual = (the norm's gradient of grad_normed) + grad_summed,   grad_x = grad_residual * what was kept
struct dsl_drop_norm_backward {
    dsl_tensor grad_normed, grad_summed;  // (rows, hidden); one of them may be absent
    dsl_tensor summed, normed;            // (rows, hidden); both absent where grad_normed is
    dsl_tensor weight, shift;             // (hidden)
    const float *mean, *rstd;             // (rows); mean is not read where summed is absent
    dsl_tensor grad_x, grad_residual;     // (rows, hidden), each may be absent
    float *grad_bias, *grad_weight,
        *grad_shift;  // (hidden), each may be null: sums of grad_x, grad_normed * normalized,
                      // grad_normed
    float* parts;     // (rows / DSL_PART, rounded up; 3; hidden): of the three above; on a GPU it is there where
                      // grad_normed is, and after them has room for 2 more numbers a row
    int64_t rows, hidden;
    int32_t stochastic;
    dsl_dropout dropout;
};

// Forward:  out = dropout(gelu(x + bias)). The element's number in the mask is row * width + column.
// GELU of Hendrycks and Gimpel 2016 (arXiv:1606.08415): by erf, or its tanh form.
struct dsl_bias_gelu {
    dsl_tensor x, bias, out;  // (rows, width), (width) or absent, (rows, width)
    int64_t rows, width;
    int32_t tanh_form;
    dsl_dropout dropout;
};

// Backward: grad_x = grad_out * what was kept * gelu'(x + bias), grad_bias its sum over rows.
struct dsl_bias_gelu_backward {
    dsl_tensor grad_out, x, bias, grad_x;  // (rows, width); grad_x may be grad_out
    float* grad_bias;                      // (width), or null
    float* parts;                          // (rows / DSL_PART, rounded up; width)
    dsl_tensor out;                        // (rows, width) or absent: the forward pass's result, made once more
    int64_t rows, width;
    int32_t tanh_form, stochastic;
    dsl_dropout dropout;
};

// Forward:  probs = softmax(scale * scores + mask),  dropped = dropout(probs)
// A row is a query of one head of one sequence: row = (batch * heads + head) * queries + query; the element's number in
// the mask is row * keys + key. Rows that see nothing (all -infinity) are 0; those with a NaN are NaN.
struct dsl_softmax {
    dsl_tensor scores, probs, dropped;  // (batch, heads, queries, keys); probs or dropped may be absent, or be scores
    dsl_tensor mask;                    // is added; (batch, heads, queries, keys) with steps of 0 where it is the same
    const uint8_t* seen;                // the same as bool: what is 0 is not seen; at most one of both is there
    int64_t mask_batch, mask_head, mask_query, mask_key;  // steps in either
    int64_t batch, heads, queries, keys;
    float scale;
    int32_t stochastic;
    dsl_dropout dropout;
};

// Backward:  g = grad_dropped * what was kept,  grad_scores = scale * probs * (g - sum over keys of g * probs)
struct dsl_softmax_backward {
    dsl_tensor grad_dropped, probs, grad_scores;  // (rows, keys)
    int64_t rows, keys;
    float scale;
    dsl_dropout dropout;
};

// Parts that are summed: `count` of them, `step` apart, in order or those that `which` names. The CPU's alone.
struct dsl_parts {
    const float* from;
    int64_t count, step;
    const int64_t* which;
    float* to;
};

// On the CPU [begin, end) are parts of DSL_PART rows, of the softmax rows.
typedef void dsl_drop_norm_kernel(const dsl_drop_norm* how, int64_t begin, int64_t end);
typedef void dsl_drop_norm_backward_kernel(const dsl_drop_norm_backward* how, int64_t begin, int64_t end);
typedef void dsl_bias_gelu_kernel(const dsl_bias_gelu* how, int64_t begin, int64_t end);
typedef void dsl_bias_gelu_backward_kernel(const dsl_bias_gelu_backward* how, int64_t begin, int64_t end);
typedef void dsl_softmax_kernel(const dsl_softmax* how, int64_t begin, int64_t end);
typedef void dsl_softmax_backward_kernel(const dsl_softmax_backward* how, int64_t begin, int64_t end);
// Columns [begin, end).
typedef void dsl_sum_parts_kernel(const dsl_parts* parts, int64_t begin, int64_t end);

extern "C" {
dsl_drop_norm_kernel dsl_drop_norm_baseline, dsl_drop_norm_avx2, dsl_drop_norm_avx512;
dsl_drop_norm_backward_kernel dsl_drop_norm_backward_baseline, dsl_drop_norm_backward_avx2,
    dsl_drop_norm_backward_avx512;
dsl_bias_gelu_kernel dsl_bias_gelu_baseline, dsl_bias_gelu_avx2, dsl_bias_gelu_avx512;
dsl_bias_gelu_backward_kernel dsl_bias_gelu_backward_baseline, dsl_bias_gelu_backward_avx2,
    dsl_bias_gelu_backward_avx512;
dsl_softmax_kernel dsl_softmax_baseline, dsl_softmax_avx2, dsl_softmax_avx512;
dsl_softmax_backward_kernel dsl_softmax_backward_baseline, dsl_softmax_backward_avx2, dsl_softmax_backward_avx512;
dsl_sum_parts_kernel dsl_sum_parts_baseline, dsl_sum_parts_avx2, dsl_sum_parts_avx512;

// All of it on a GPU, the sums of parts included; 0, or the error code of the runtime.
int dsl_gpu_drop_norm(const dsl_drop_norm* how, void* stream);
int dsl_gpu_drop_norm_backward(const dsl_drop_norm_backward* how, void* stream);
int dsl_gpu_bias_gelu(const dsl_bias_gelu* how, void* stream);
int dsl_gpu_bias_gelu_backward(const dsl_bias_gelu_backward* how, void* stream);
int dsl_gpu_softmax(const dsl_softmax* how, void* stream);
int dsl_gpu_softmax_backward(const dsl_softmax_backward* how, void* stream);
}
