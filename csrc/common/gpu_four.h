// Four neighbours at a time: what GPU kernels over rows read, write and drop, as a block of random bits has four words.
#pragma once

#include "common/gpu_block.h"
#include "common/philox.h"

namespace dsl {

struct Four {
    float at[4];
};
struct alignas(16) FourWords {
    float at[4];
};
struct alignas(8) FourHalfwords {
    uint16_t at[4];
};

__device__ inline bool in_one(const dsl_tensor& tensor, int64_t i, int n) {
    const int bytes = tensor.dtype == DSL_FP32 ? 4 : 2;
    return n == 4 && (reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uint64_t>(i) * bytes) % (4 * bytes) == 0;
}

// Numbers [i, i + n), n up to 4; zeros beyond.
__device__ inline Four read_four(const dsl_tensor& from, int64_t i, int n) {
    Four found{};
    if (!in_one(from, i, n)) {
        for (int k = 0; k < 4; ++k) found.at[k] = k < n ? read(from, i + k) : 0;
    } else if (from.dtype == DSL_FP32) {
        const auto four = *reinterpret_cast<const FourWords*>(static_cast<const float*>(from.data) + i);
        for (int k = 0; k < 4; ++k) found.at[k] = four.at[k];
    } else {
        const auto four = *reinterpret_cast<const FourHalfwords*>(static_cast<const uint16_t*>(from.data) + i);
        for (int k = 0; k < 4; ++k) {
            found.at[k] = from.dtype == DSL_BF16 ? from_bf16(four.at[k]) : from_fp16(four.at[k]);
        }
    }
    return found;
}

// To a tensor that may be absent.
__device__ inline void put_four(const dsl_tensor& to, int64_t i, int n, const Four& values) {
    if (to.data == nullptr) return;
    if (!in_one(to, i, n)) {
        for (int k = 0; k < 4; ++k) {
            if (k < n) put(to, i + k, values.at[k]);
        }
    } else if (to.dtype == DSL_FP32) {
        FourWords four;
        for (int k = 0; k < 4; ++k) four.at[k] = values.at[k];
        *reinterpret_cast<FourWords*>(static_cast<float*>(to.data) + i) = four;
    } else {
        FourHalfwords four;
        for (int k = 0; k < 4; ++k) {
            four.at[k] = to.dtype == DSL_BF16 ? to_bf16(values.at[k]) : to_fp16(values.at[k]);
        }
        *reinterpret_cast<FourHalfwords*>(static_cast<uint16_t*>(to.data) + i) = four;
    }
}

// Times what dropout keeps of elements i to i + 3.
__device__ inline void drop_four(const dsl_dropout& dropout, uint64_t i, Four& values) {
    if (dropout.threshold == 0) return;
    const int past = static_cast<int>(i % 4);
    const Words words = philox(dropout.seed, dropout.stream, i / 4);
    Words next{};
    if (past != 0) next = philox(dropout.seed, dropout.stream, i / 4 + 1);
    for (int k = 0; k < 4; ++k) {
        uint32_t word = 0;  // at[k + past] of both, without an index that is not known when compiling
        for (int j = 0; j < 8; ++j) {
            if (j == k + past) word = j < 4 ? words.at[j] : next.at[j - 4];
        }
        values.at[k] *= word < dropout.threshold ? 0.0f : dropout.scale;
    }
}

}  // namespace dsl
