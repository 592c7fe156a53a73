// Tiles: a few kilobytes of a tensor as floats, whatever its dtype, so that a kernel is written once, in float.
//
// An fp32 tensor's tile is its own memory. A 16-bit one is widened into a buffer that stays in the first-level cache,
// and narrowed from there, to the nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/tensor.h"

namespace {

constexpr int64_t TILE = 1024;

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline uint16_t narrow_bf16(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Multiplying by 2^112 moves fp16's exponents where fp32 has them, and makes its subnormals normal.
inline float widen_fp16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    const float value =
        magnitude >= 0x7c00 ? from_bits(0x7f800000 | (magnitude & 0x3ff) << 13) : from_bits(magnitude << 13) * 0x1p112f;
    return from_bits(to_bits(value) | sign);
}

inline uint16_t narrow_fp16(float value) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                       // subnormal: adding 0.5 leaves units of 2^-24
                                                        // in the last bits
        return sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

#if defined(__F16C__)
// The instructions as GCC and clang know them without immintrin.h, which takes longer to read than kernels to compile.
typedef short EightHalves __attribute__((vector_size(16)));
typedef float EightFloats __attribute__((vector_size(32)));
#endif

void widen(float* __restrict to, const uint16_t* __restrict from, dsl_dtype dtype, int64_t n) {
    if (dtype == DSL_BF16) {
        for (int64_t i = 0; i < n; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
        return;
    }
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        EightHalves halves;
        std::memcpy(&halves, from + i, sizeof halves);
        const EightFloats floats = __builtin_ia32_vcvtph2ps256(halves);
        std::memcpy(to + i, &floats, sizeof floats);
    }
#endif
    for (; i < n; ++i) to[i] = widen_fp16(from[i]);
}

void narrow(uint16_t* __restrict to, const float* __restrict from, dsl_dtype dtype, int64_t n) {
    if (dtype == DSL_BF16) {
        for (int64_t i = 0; i < n; ++i) to[i] = narrow_bf16(from[i]);
        return;
    }
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        EightFloats floats;
        std::memcpy(&floats, from + i, sizeof floats);
        const EightHalves halves = __builtin_ia32_vcvtps2ph256(floats, 8);  // to the nearest, and no exception
        std::memcpy(to + i, &halves, sizeof halves);
    }
#endif
    for (; i < n; ++i) to[i] = narrow_fp16(from[i]);
}

inline void write(const float* from, const dsl_tensor& to, int64_t start, int64_t n) {
    if (to.dtype != DSL_FP32) {
        narrow(static_cast<uint16_t*>(to.data) + start, from, to.dtype, n);
    } else if (static_cast<float*>(to.data) + start != from) {
        std::memcpy(static_cast<float*>(to.data) + start, from, n * sizeof(float));
    }
}

// One tile of a tensor. `floats` may be read and written; `put_back` makes the tensor hold what was written.
class Tile {
 public:
    Tile(const dsl_tensor& tensor, int64_t start, int64_t n) : tensor_(tensor), start_(start), n_(n) {
        if (tensor.dtype == DSL_FP32 || tensor.data == nullptr) {
            floats = static_cast<float*>(tensor.data) + (tensor.data == nullptr ? 0 : start);
        } else {
            floats = buffer_;
            widen(buffer_, static_cast<const uint16_t*>(tensor.data) + start, tensor.dtype, n);
        }
    }

    void put_back() const { write(floats, tensor_, start_, n_); }

    // The same numbers in another tensor, at the same place.
    void copy_to(const dsl_tensor& other) const {
        if (other.data != nullptr) write(floats, other, start_, n_);
    }

    float* floats;

 private:
    const dsl_tensor tensor_;
    const int64_t start_, n_;
    alignas(64) float buffer_[TILE];
};

// The sum of the squares of at most a tile's numbers. Sixteen sums side by side are what vectors need, and are the same
// for every instruction set.
inline float sum_of_squares(const float* from, int64_t n) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int k = 0; k < 16; ++k) sums[k] += from[i + k] * from[i + k];
    }
    for (; i < n; ++i) sums[0] += from[i] * from[i];
    float sum = 0;
    for (const float one : sums) sum += one;
    return sum;
}

}  // namespace
