// What stands between a transformer's products: the C ABI between the kernels, on the CPU and on GPUs, and bindings.
#pragma once

#include "common/tensor.h"

enum dsl_activation : int32_t { DSL_SILU, DSL_GELU, DSL_GELU_TANH, DSL_RELU, DSL_QUICK_GELU, DSL_RELU_SQUARED };

struct dsl_norm {
    dsl_tensor x, residual, weight, bias;  // (rows, hidden) twice, (hidden) twice; all but x may be absent
    dsl_tensor normed, summed;             // (rows, hidden); summed may be absent where residual is
    int64_t hidden;
    float eps;
    int32_t layer, unit_offset;
};

struct dsl_rotary {
    dsl_tensor qkv;                       // (batch, tokens, heads + 2 kv_heads, dim)
    dsl_tensor cos, sin;                  // (batch, tokens, rotary_dim), or absent
    int64_t cos_batch, cos_token;         // steps from one to the next; sin's too
    dsl_tensor q;                         // (batch, heads, tokens, dim)
    dsl_tensor keys, values;              // from the first position to write on
    int64_t kv_batch, kv_head, kv_token;  // steps in both
    int64_t tokens, heads, kv_heads, dim, rotary_dim;
    int32_t interleaved;
};

struct dsl_attention {
    const float* q;      // (batch, heads, tokens, dim), times the scale; the CPU's alone
    dsl_tensor queries;  // the same as they were given, and the scale: GPUs'
    float scale;
    dsl_tensor keys, values;  // (batch, kv_heads, length, dim)
    int64_t kv_batch, kv_head, kv_token;
    dsl_tensor out;       // (batch, tokens, heads, dim)
    const uint8_t* mask;  // (batch, length), mask_batch apart, or null
    int64_t mask_batch;
    const float* slopes;  // (heads), or null
    int64_t heads, kv_heads, tokens, dim, length, window;
    float softcap;
    int64_t chunks;  // parts of the positions, of DSL_CHUNK each
    float* parts;    // (batch, kv_heads, chunks, heads / kv_heads * tokens, dim + 2): sums, maximum, weight
};

constexpr int64_t DSL_CHUNK = 512;
constexpr int64_t DSL_MOST_DIM = 1024;  // of a head

struct dsl_gate {
    dsl_tensor x, out;  // (rows, width) or, gated, (rows, 2 width); (rows, width)
    int64_t width;
    int32_t activation, gated;
};

typedef void dsl_norm_kernel(const dsl_norm* norm, int64_t begin, int64_t end);        // rows
typedef void dsl_rotary_kernel(const dsl_rotary* rotary, int64_t begin, int64_t end);  // of batch * tokens
typedef void dsl_attend_kernel(const dsl_attention* attention, int64_t begin,
                               int64_t end);  // batch * kv_heads * chunks
typedef void dsl_mix_parts_kernel(const dsl_attention* attention, int64_t begin, int64_t end);  // batch * kv_heads
typedef void dsl_scaled_kernel(const dsl_tensor* x, int64_t numel, float scale, float* to);
typedef void dsl_gate_kernel(const dsl_gate* gate, int64_t begin, int64_t end);  // tiles of all rows

extern "C" {
dsl_norm_kernel dsl_norm_baseline, dsl_norm_avx2, dsl_norm_avx512;
dsl_rotary_kernel dsl_rotary_baseline, dsl_rotary_avx2, dsl_rotary_avx512;
dsl_attend_kernel dsl_attend_baseline, dsl_attend_avx2, dsl_attend_avx512;
dsl_mix_parts_kernel dsl_mix_parts_baseline, dsl_mix_parts_avx2, dsl_mix_parts_avx512;
dsl_scaled_kernel dsl_scaled_baseline, dsl_scaled_avx2, dsl_scaled_avx512;
dsl_gate_kernel dsl_gate_baseline, dsl_gate_avx2, dsl_gate_avx512;

// On a GPU; 0, or the error code of the runtime.
int dsl_gpu_norm(const dsl_norm* norm, int64_t rows, void* stream);
int dsl_gpu_rotary(const dsl_rotary* rotary, int64_t batch, void* stream);
int dsl_gpu_attention(const dsl_attention* attention, int64_t batch, void* stream);
int dsl_gpu_gate(const dsl_gate* gate, int64_t numel, void* stream);  // numel: of out
}
