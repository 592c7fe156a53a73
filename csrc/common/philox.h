// Random bits by counting: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11).
//
// A block of four words depends on nothing but the seed (the key), the stream, and the block's number, so whoever needs
// a word makes it: the CPU, a GPU and the backward pass get the same bits, and nothing is kept. Element i of a tensor has
// word i % 4 of block i / 4. philox_vector.h makes the same bits by vectors, for the CPU's kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIP__) || defined(__HIPCC__)
#define DSL_HOST_DEVICE __host__ __device__
#else
#define DSL_HOST_DEVICE
#endif

// A number is dropped where its word is below the threshold, and else multiplied by the scale.
struct dsl_dropout {
    uint64_t seed, stream;
    uint32_t threshold;  // 2^32 times the ratio; 0: nothing is dropped
    float scale;         // 1 / (1 - ratio); 0 where everything is dropped
};

namespace dsl {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // what the counter is multiplied by
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // what is added to the key after each round
constexpr int PHILOX_ROUNDS = 10;

struct Words {
    uint32_t at[4];
};

// The four words of a counter {block, stream}, low words first.
DSL_HOST_DEVICE inline Words philox(uint64_t seed, uint64_t stream, uint64_t block) {
    uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32);
    uint32_t c = static_cast<uint32_t>(stream), d = static_cast<uint32_t>(stream >> 32);
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t p = static_cast<uint64_t>(PHILOX_M0) * a, q = static_cast<uint64_t>(PHILOX_M1) * c;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
        b = static_cast<uint32_t>(q);
        c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
        d = static_cast<uint32_t>(p);
        low += PHILOX_W0;
        high += PHILOX_W1;
    }
    return {{a, b, c, d}};
}

// What element i is multiplied by: 0 or the scale. One that takes four elements in a row calls philox once for them.
DSL_HOST_DEVICE inline float keep(const dsl_dropout& dropout, uint64_t i) {
    if (dropout.threshold == 0) return dropout.scale;
    return philox(dropout.seed, dropout.stream, i / 4).at[i % 4] < dropout.threshold ? 0.0f : dropout.scale;
}

}  // namespace dsl
