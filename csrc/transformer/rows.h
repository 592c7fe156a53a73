// Rows of any length as whole vectors of floats, for the kernels of this folder.
#pragma once

#include <cstdlib>

#include "common/philox_vector.h"
#include "common/vector.h"

namespace {

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Rows of floats, each aligned and with room for `kept` and whole vectors, for one call of a kernel.
class Buffers {
 public:
    Buffers(int count, int64_t n) : step_((n + DROP_SLACK + 31) / 16 * 16) {
        memory_ = static_cast<float*>(std::malloc((count * step_ + 16) * sizeof(float)));
        if (memory_ == nullptr) std::abort();
    }
    ~Buffers() { std::free(memory_); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;

    float* operator[](int i) const {
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63}) + i * step_;
    }

 private:
    const int64_t step_;
    float* memory_;
};

inline void pad(float* row, int64_t n, float value) {
    for (int64_t i = n; i < padded(n); ++i) row[i] = value;
}

// n numbers of a tensor as floats, zeros up to whole vectors: where they lie, or in `buffer`. Null of an absent tensor.
inline const float* read_row(const dsl_tensor& tensor, int64_t start, int64_t n, float* buffer) {
    if (tensor.data == nullptr) return nullptr;
    if (tensor.dtype == DSL_FP32) {
        const float* const from = static_cast<const float*>(tensor.data) + start;
        if (n % LANES == 0) return from;
        std::memcpy(buffer, from, n * sizeof(float));
    } else {
        widen(buffer, static_cast<const uint16_t*>(tensor.data) + start, tensor.dtype, n);
    }
    pad(buffer, n, 0);
    return buffer;
}

inline void write_row(const float* from, const dsl_tensor& to, int64_t start, int64_t n) {
    if (to.data != nullptr) write(from, to, start, n);
}

// The numbers as they are once written with this dtype.
inline void round_row(float* row, dsl_dtype dtype, int64_t n) {
    if (dtype == DSL_FP32) return;
    uint16_t narrowed[TILE];
    for (int64_t i = 0; i < n; i += TILE) {
        const int64_t some = n - i < TILE ? n - i : TILE;
        narrow(narrowed, row + i, dtype, some);
        widen(row + i, narrowed, dtype, some);
    }
}

// The sum of value(i) over vectors from i on, in an order that n alone decides.
template <class Value>
inline float sum_vectors(int64_t n, const Value& value) {
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        for (int k = 0; k < 4; ++k) sums[k] += value(i + k * LANES);
    }
    for (; i < n; i += LANES) sums[0] += value(i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Work>
inline void for_vectors(int64_t n, const Work& work) {
    for (int64_t i = 0; i < n; i += LANES) work(i);
}

// e^x of what is at most 0, where it need not be exact to the last bits: less than 2^-17 of it.
inline Vector rough_exponential(Vector x) {
    const Vector magic = spread(12582912.0f);
    const Vector n = (x * 1.44269504f + magic) - magic;
    const Vector r = x * 1.44269504f - n;  // 2^r by its series, |r| <= 1/2
    Vector p = spread(1.33335581e-3f);
    for (const float factor : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = p * r + factor;
    const Ints whole = __builtin_convertvector(choose(reinterpret_cast<Ints>(n < -126.0f), spread(-126.0f), n), Ints);
    const Vector found = p * reinterpret_cast<Vector>((whole + 127) << 23);
    return choose(reinterpret_cast<Ints>(x < -87.3f), spread(0.0f), found);
}

}  // namespace
