// Products of matrices that are in the cache, as attention needs them: C = A B or C += A B, of rows of vectors.
//
// An element of A meets all lanes, a row of B lies in vectors. Of bfloat16, on processors that have the instruction, both
// go in pairs of neighbours along the depth: 4 bytes as a float's, and subnormal numbers count as 0. Every element of C is
// one chain of sums in the order of the depth, so it does not matter how a product is cut up.
#pragma once

#include "common/isa.h"
#include "common/vector.h"

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
#define DSL_PAIRS
#if defined(__clang__)
#define DSL_PAIRS_ON _Pragma("clang attribute push(__attribute__((target(\"avx512bf16\"))), apply_to = function)")
#define DSL_PAIRS_OFF _Pragma("clang attribute pop")
#else
#define DSL_PAIRS_ON _Pragma("GCC push_options") _Pragma("GCC target(\"avx512bf16\")")
#define DSL_PAIRS_OFF _Pragma("GCC pop_options")
#endif
#else
#define DSL_PAIRS_ON
#define DSL_PAIRS_OFF
#endif

namespace {

// Steps of A and B are in bytes, that of C in floats; depth counts pairs where they are.
struct Product {
    const void* a;
    int64_t a_row, a_step;  // to the next row, and along the depth
    const void* b;
    int64_t b_step;
    float* c;
    int64_t c_row;
    int64_t rows, vectors, depth;
    bool add;
};

inline Vector to_all(float value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_set1_ps(value));  // which may be part of the sum's instruction
#else
    return value - Vector{};
#endif
}

inline bool has_pairs() {
#if defined(DSL_PAIRS)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

DSL_PAIRS_ON

// How an element of A and one of B make part of a sum.
struct Numbers {
    static constexpr int EACH = 1;
    static inline Vector plus(Vector sum, float a, Vector b) { return sum + to_all(a) * b; }
};

#if defined(DSL_PAIRS)
struct Pairs {
    static constexpr int EACH = 2;
    static inline Vector plus(Vector sum, float a, Vector b) {
        const auto pairs = (__m512bh)_mm512_set1_ps(a);
        return reinterpret_cast<Vector>(_mm512_dpbf16_ps((__m512)sum, pairs, (__m512bh)(__m512)b));
    }

    // To the nearest, ties to even.
    static inline __m256i narrow(Vector value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }

    // A pair in each lane.
    static inline Vector join(__m256i low, __m256i high) {
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        return reinterpret_cast<Vector>(_mm512_or_si512(_mm512_cvtepu16_epi32(low), wide));
    }
};
#endif

// Addresses are made of few registers: one for four rows, and one and three steps between them.
template <class Kind, int ROWS, int VECTORS>
void corner(const Product& p, int64_t row, int64_t vector) {
    constexpr int FOURS = (ROWS + 3) / 4;
    const char* a[FOURS];
    for (int i = 0; i < FOURS; ++i) a[i] = static_cast<const char*>(p.a) + (row + 4 * i) * p.a_row;
    const char* b = static_cast<const char*>(p.b) + vector * LANES * 4;
    float* const c = p.c + row * p.c_row + vector * LANES;
    const int64_t a_row = p.a_row, a_row3 = 3 * p.a_row, a_step = p.a_step, b_step = p.b_step;
    Vector sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = p.add ? load(c + r * p.c_row + v * LANES) : Vector{};
    }
    for (int64_t k = p.depth; k > 0; --k) {
        Vector wide[VECTORS];
        for (int v = 0; v < VECTORS; ++v) wide[v] = load_as<Vector>(b + v * LANES * 4);
        for (int r = 0; r < ROWS; ++r) {
            const float one = load_as<float>(a[r / 4] + (r % 4 == 3 ? a_row3 : r % 4 * a_row));
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = Kind::plus(sums[r][v], one, wide[v]);
        }
        for (int i = 0; i < FOURS; ++i) a[i] += a_step;
        b += b_step;
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(c + r * p.c_row + v * LANES, sums[r][v]);
    }
}

template <class Kind, int ROWS, int VECTORS>
int64_t rows_of(const Product& p, int64_t row, int64_t vector) {
    for (; row + ROWS <= p.rows; row += ROWS) corner<Kind, ROWS, VECTORS>(p, row, vector);
    if constexpr (ROWS > 1) row = rows_of<Kind, ROWS / 2, VECTORS>(p, row, vector);
    return row;
}

// As many sums as registers hold beside a row of B.
constexpr int SUMS = LANES == 16 ? 16 : 8;

template <class Kind, int VECTORS>
int64_t vectors_of(const Product& p, int64_t vector) {
    for (; vector + VECTORS <= p.vectors; vector += VECTORS) rows_of<Kind, SUMS / VECTORS, VECTORS>(p, 0, vector);
    if constexpr (VECTORS > 1) vector = vectors_of<Kind, VECTORS / 2>(p, vector);
    return vector;
}

template <class Kind>
void multiply(const Product& p) {
    vectors_of<Kind, LANES == 16 ? 4 : 2>(p, 0);
}

DSL_PAIRS_OFF

}  // namespace
