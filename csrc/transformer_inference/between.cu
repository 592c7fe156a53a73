// Norms, rotary positions and gates on GPUs; see between.h and the CPU's kernels for what they do.
#include "common/gpu_block.h"
#include "transformer_inference/between.h"

namespace dsl {

// A row is a block's. What a thread writes it reads again itself: the sum as it was rounded.
__global__ void __launch_bounds__(BLOCK_THREADS) norm_kernel(const dsl_norm how) {
    const int64_t start = blockIdx.x * how.hidden;
    const bool summing = how.residual.data != nullptr;
    const dsl_tensor& kept = summing ? how.summed : how.x;
    float total = 0, squares = 0, mean = 0;
    for (int64_t i = threadIdx.x; i < how.hidden; i += BLOCK_THREADS) {
        if (summing) put(how.summed, start + i, read(how.x, start + i) + read(how.residual, start + i));
        const float value = read(kept, start + i);
        total += value;
        squares += value * value;
    }
    if (how.layer) {
        mean = sum_over_block(total) / how.hidden;
        squares = 0;
        for (int64_t i = threadIdx.x; i < how.hidden; i += BLOCK_THREADS) {
            const float value = read(kept, start + i) - mean;
            squares += value * value;
        }
    }
    const float factor = 1 / sqrtf(sum_over_block(squares) / how.hidden + how.eps), offset = how.unit_offset ? 1 : 0;
    for (int64_t i = threadIdx.x; i < how.hidden; i += BLOCK_THREADS) {
        float value = (read(kept, start + i) - mean) * factor;
        if (how.weight.data != nullptr) value *= read(how.weight, i) + offset;
        if (how.bias.data != nullptr) value += read(how.bias, i);
        put(how.normed, start + i, value);
    }
}

// A number of qkv is a thread's.
__global__ void __launch_bounds__(BLOCK_THREADS) rotary_kernel(const dsl_rotary how, int64_t numel) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= numel) return;
    const int64_t d = i % how.dim, all = how.heads + 2 * how.kv_heads, head = i / how.dim % all;
    const int64_t token = i / how.dim / all % how.tokens, batch = i / how.dim / all / how.tokens;
    const bool is_query = head < how.heads, is_value = head >= how.heads + how.kv_heads;
    float value = read(how.qkv, i);
    if (how.cos.data != nullptr && !is_value && d < how.rotary_dim) {
        const int64_t half = how.rotary_dim / 2, at = batch * how.cos_batch + token * how.cos_token + d;
        const bool first = how.interleaved ? d % 2 == 0 : d < half;
        const float other = read(how.qkv, i + (first ? 1 : -1) * (how.interleaved ? 1 : half));
        value = value * read(how.cos, at) + (first ? -other : other) * read(how.sin, at);
    }
    if (is_query) return put(how.q, ((batch * how.heads + head) * how.tokens + token) * how.dim + d, value);
    const int64_t kv = (head - how.heads) % how.kv_heads;
    put(is_value ? how.values : how.keys, batch * how.kv_batch + kv * how.kv_head + token * how.kv_token + d, value);
}

__device__ inline float swish(float x, float y) { return x / (1 + expf(-y)); }

__device__ inline float activate(float x, int activation) {
    const float positive = x < 0 ? 0.0f : x;
    switch (activation) {
        case DSL_SILU:
            return swish(x, x);
        case DSL_GELU:
            return 0.5f * x * erfcf(-0.70710678f * x);
        case DSL_GELU_TANH:  // (1 + tanh y) / 2 is the logistic function of 2 y
            return swish(x, 1.59576912f * (x + 0.044715f * x * x * x));
        case DSL_QUICK_GELU:
            return swish(x, 1.702f * x);
        case DSL_RELU_SQUARED:
            return positive * positive;
        default:
            return positive;
    }
}

__global__ void __launch_bounds__(BLOCK_THREADS) gate_kernel(const dsl_gate how, int64_t numel) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= numel) return;
    if (!how.gated) return put(how.out, i, activate(read(how.x, i), how.activation));
    const int64_t at = i / how.width * 2 * how.width + i % how.width;
    put(how.out, i, activate(read(how.x, at), how.activation) * read(how.x, at + how.width));
}

}  // namespace dsl

extern "C" int dsl_gpu_norm(const dsl_norm* norm, int64_t rows, void* stream) {
    if (rows > 0) DSL_LAUNCH(dsl::norm_kernel, static_cast<uint32_t>(rows), dsl::BLOCK_THREADS, stream, *norm);
    return dsl::launch_error();
}

extern "C" int dsl_gpu_rotary(const dsl_rotary* rotary, int64_t batch, void* stream) {
    using namespace dsl;
    const int64_t numel = batch * rotary->tokens * (rotary->heads + 2 * rotary->kv_heads) * rotary->dim;
    const uint32_t blocks = blocks_for(numel, BLOCK_THREADS);
    if (blocks > 0) DSL_LAUNCH(rotary_kernel, blocks, BLOCK_THREADS, stream, *rotary, numel);
    return launch_error();
}

extern "C" int dsl_gpu_gate(const dsl_gate* gate, int64_t numel, void* stream) {
    using namespace dsl;
    const uint32_t blocks = blocks_for(numel, BLOCK_THREADS);
    if (blocks > 0) DSL_LAUNCH(gate_kernel, blocks, BLOCK_THREADS, stream, *gate, numel);
    return launch_error();
}
