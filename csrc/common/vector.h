// A vector of floats as wide as the instruction set has it: kernels are written over it once.
//
// It is the compilers' own vector type (GCC's and clang's), so +, *, < and products that become FMAs need no names here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "common/tensor.h"
#include "common/tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

inline Vector spread(float value) { return Vector{} + value; }

template <class To>
inline To load_as(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector load(const float* from) { return load_as<Vector>(from); }

// The same for 16-bit floats, which are widened.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Vector load(const BFloat16* from) {
    return reinterpret_cast<Vector>(__builtin_convertvector(load_as<Halves>(from), Bits) << 16);
}

inline Vector load(const Float16* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(load_as<__m256i>(from)));
#elif defined(__F16C__)
    return __builtin_ia32_vcvtph2ps256(load_as<EightHalves>(from));
#else
    float wide[LANES];
    for (int i = 0; i < LANES; ++i) wide[i] = widen_fp16(from[i].bits);
    return load(wide);
#endif
}

inline float one(const float* from) { return *from; }
inline float one(const BFloat16* from) { return from_bits(static_cast<uint32_t>(from->bits) << 16); }
inline float one(const Float16* from) { return widen_fp16(from->bits); }

inline float sum(Vector value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#else
    float lanes[LANES], total = 0;
    store(lanes, value);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    total = lanes[0];
    return total;
#endif
}

inline Vector choose(Ints condition, Vector yes, Vector no) {
    return reinterpret_cast<Vector>((condition & reinterpret_cast<Ints>(yes)) |
                                    (~condition & reinterpret_cast<Ints>(no)));
}

// NaN where either is.
inline Vector larger(Vector a, Vector b) { return choose(reinterpret_cast<Ints>((a > b) | (a != a)), a, b); }

// e^x to about 2 units in the last place; results below the smallest normal number are 0.
inline Vector exponential(Vector x) {
    const Vector magic = spread(12582912.0f);  // adding and taking away 1.5 * 2^23 rounds to a whole number
    const Vector n = (x * 1.44269504f + magic) - magic;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: x - n ln 2 is in +-0.35
    Vector p = spread(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + factor;
    // 2^n in two factors, since e^88.7 is 2^128 times a number below 1.
    const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
    const Vector one = reinterpret_cast<Vector>((half + 127) << 23);
    const Vector other = reinterpret_cast<Vector>((whole - half + 127) << 23);
    const Vector found = choose(reinterpret_cast<Ints>(x > 88.8f), spread(INFINITY), p * one * other);
    return choose(reinterpret_cast<Ints>(x < -87.3f), spread(0.0f), found);
}

// tanh x: by its series where 1 - 2 / (e^2x + 1) would lose digits.
inline Vector hyperbolic_tangent(Vector x) {
    const Vector y = x * x;
    const Vector series = x * (1 + y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315 + y * (62.0f / 2835)))));
    return choose(reinterpret_cast<Ints>(y < 0.09f), series, 1 - 2 / (exponential(2 * x) + 1));
}

// Calls `work(pointer)` with the tensor's elements as what they are.
template <class Work>
inline void with_elements(const dsl_tensor& tensor, const Work& work) {
    switch (tensor.dtype) {
        case DSL_FP32:
            return work(static_cast<const float*>(tensor.data));
        case DSL_BF16:
            return work(static_cast<const BFloat16*>(tensor.data));
        case DSL_FP16:
            return work(static_cast<const Float16*>(tensor.data));
    }
}

}  // namespace
