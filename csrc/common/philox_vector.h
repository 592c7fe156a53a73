// philox.h's bits by vectors, for kernels on the CPU: what a row of numbers is multiplied by under dropout.
//
// A lane of 64 bits has one word of one block in its lower half, which is what the processor's 32 x 32 -> 64 bit products
// read; what is in the upper half does not matter.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/vector.h"

#if defined(__x86_64__)
// All of immintrin.h is read in half a second, which is most of what such a file takes.
#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <emmintrin.h>
#endif
#endif

namespace {

constexpr int BLOCKS = LANES / 2;              // of four words, beside each other in a vector
constexpr int64_t DROP_SLACK = 8 * LANES + 4;  // how many numbers `kept` may write beyond those that it is asked for

typedef uint64_t Wide __attribute__((vector_size(8 * BLOCKS)));

inline Wide product(Wide a, uint32_t m) {
#if defined(__AVX512F__)
    return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
    return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__x86_64__)
    return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
    return (a & 0xffffffffu) * m;
#endif
}

// [w0 w1] and [w2 w3] of each block into 4 * BLOCKS words in order, of blocks in lanes as BLOCK_OF_LANE says.
inline void interleave(Wide first, Wide second, uint32_t* to) {
#if defined(__AVX512F__)
    const __m512i a = reinterpret_cast<__m512i>(first), b = reinterpret_cast<__m512i>(second);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(a, b));
#elif defined(__AVX2__)
    const __m256i a = reinterpret_cast<__m256i>(first), b = reinterpret_cast<__m256i>(second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_unpackhi_epi64(a, b));
#else
    for (int lane = 0; lane < BLOCKS; ++lane) {
        const uint64_t both[2] = {first[lane], second[lane]};
        std::memcpy(to + 4 * lane, both, sizeof both);
    }
#endif
}

// The blocks of the lanes, such that unpacking puts their words in order.
alignas(64) constexpr uint64_t BLOCK_OF_LANE[] = {0, BLOCKS / 2,     1, BLOCKS / 2 + 1,
                                                  2, BLOCKS / 2 + 2, 3, BLOCKS / 2 + 3};

// Two vectors of blocks, 8 * BLOCKS words in order, from the first block on.
inline void words(const dsl_dropout& dropout, uint64_t first_block, uint32_t* to) {
    Wide a[2], b[2], c[2], d[2];
    for (int i = 0; i < 2; ++i) {
        a[i] = load_as<Wide>(BLOCK_OF_LANE) + (first_block + i * BLOCKS);
        b[i] = a[i] >> 32;
        c[i] = Wide{} + dropout.stream;
        d[i] = c[i] >> 32;
    }
    uint32_t low = static_cast<uint32_t>(dropout.seed), high = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < dsl::PHILOX_ROUNDS; ++round) {
        for (int i = 0; i < 2; ++i) {
            const Wide p = product(a[i], dsl::PHILOX_M0), q = product(c[i], dsl::PHILOX_M1);
            a[i] = (q >> 32) ^ b[i] ^ low;
            b[i] = q;
            c[i] = (p >> 32) ^ d[i] ^ high;
            d[i] = p;
        }
        low += dsl::PHILOX_W0;
        high += dsl::PHILOX_W1;
    }
    for (int i = 0; i < 2; ++i) {
        interleave((a[i] & 0xffffffffu) | (b[i] << 32), (c[i] & 0xffffffffu) | (d[i] << 32), to + i * 4 * BLOCKS);
    }
}

// What elements [first, first + n) are multiplied by: 0 or the scale. `buffer` has room for n + DROP_SLACK numbers, and
// what is returned lies in it. As dsl::keep for each.
inline const float* kept(const dsl_dropout& dropout, uint64_t first, int64_t n, float* buffer) {
    if (dropout.threshold == 0) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = dropout.scale;
        return buffer;
    }
    const int64_t skipped = first % 4;
    for (int64_t done = 0; done < skipped + n; done += 8 * BLOCKS) {
        alignas(64) uint32_t bits[8 * BLOCKS];
        words(dropout, (first - skipped + done) / 4, bits);
        for (int i = 0; i < 8 * BLOCKS; i += LANES) {
            const Ints dropped = reinterpret_cast<Ints>(load_as<Bits>(bits + i) < dropout.threshold);
            store(buffer + done + i, choose(dropped, spread(0.0f), spread(dropout.scale)));
        }
    }
    return buffer + skipped;
}

}  // namespace
