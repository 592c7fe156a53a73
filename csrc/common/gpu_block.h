// What GPU kernels share that do not work on lists of tensors: single numbers of any dtype, and reductions.
#pragma once

#include "common/gpu_compat.h"
#include "common/tensor.h"

namespace dsl {

constexpr int BLOCK_THREADS = 128;

__device__ inline float read(const dsl_tensor& from, int64_t i) {
    if (from.dtype == DSL_FP32) return static_cast<const float*>(from.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(from.data)[i];
    return from.dtype == DSL_BF16 ? from_bf16(bits) : from_fp16(bits);
}

__device__ inline void put(const dsl_tensor& to, int64_t i, float value) {
    if (to.dtype == DSL_FP32) {
        static_cast<float*>(to.data)[i] = value;
    } else {
        static_cast<uint16_t*>(to.data)[i] = to.dtype == DSL_BF16 ? to_bf16(value) : to_fp16(value);
    }
}

__device__ inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// Over the lanes of a wave, or so many beside each other, in every lane. All lanes must call it.
__device__ inline float sum_over(float value, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// NaN where any is.
__device__ inline float most_over(float value, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    return value;
}

// The sum over the threads of a block, in every thread. All threads must call it.
__device__ inline float sum_over_block(float value) {
    __shared__ float of_waves[BLOCK_THREADS / 32];
    const int wave = wave_size();
    value = sum_over(value, wave);
    __syncthreads();  // the last call's sums have been read
    if (threadIdx.x % wave == 0) of_waves[threadIdx.x / wave] = value;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < BLOCK_THREADS / wave; ++i) sum += of_waves[i];
    return sum;
}

static inline uint32_t blocks_for(int64_t numel, int64_t each) {
    return static_cast<uint32_t>((numel + each - 1) / each);
}

}  // namespace dsl
