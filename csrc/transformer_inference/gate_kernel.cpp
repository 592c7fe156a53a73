// Activations, of everything or of a gate that the other half is multiplied by.
#include "common/isa.h"
#include "common/vector.h"
#include "transformer_inference/between.h"

namespace {

// x times the normal distribution's probability of what is below x: x erfc(-x / sqrt 2) / 2. erfc to 1.2e-7 of itself, by
// the approximation of Press et al., Numerical Recipes, 6.2.2 (erfcc).
Vector gelu(Vector x) {
    const Vector z = choose(reinterpret_cast<Ints>(x < 0), -x, x) * 0.70710678f;
    const Vector t = 1 / (1 + 0.5f * z);
    Vector p = spread(0.17087277f);
    for (const float factor : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
                               0.37409196f, 1.00002368f, -1.26551223f}) {
        p = p * t + factor;
    }
    const Vector beyond = t * exponential(p - z * z);  // erfc(z)
    return x * choose(reinterpret_cast<Ints>(x < 0), 0.5f * beyond, 1 - 0.5f * beyond);
}

// x times the logistic function of y. Where e^-y is infinite the result is -0, as x / infinity.
Vector swish(Vector x, Vector y) { return x / (1 + exponential(-y)); }

template <int ACTIVATION>
Vector activation(Vector x) {
    const Vector positive = choose(reinterpret_cast<Ints>(x < 0), spread(0.0f), x);
    if constexpr (ACTIVATION == DSL_SILU) return swish(x, x);
    if constexpr (ACTIVATION == DSL_GELU) return gelu(x);
    // (1 + tanh y) / 2 is the logistic function of 2 y.
    if constexpr (ACTIVATION == DSL_GELU_TANH) return swish(x, 1.59576912f * (x + 0.044715f * x * x * x));
    if constexpr (ACTIVATION == DSL_QUICK_GELU) return swish(x, 1.702f * x);
    if constexpr (ACTIVATION == DSL_RELU_SQUARED) return positive * positive;
    return positive;
}

template <int ACTIVATION>
void tile(const dsl_gate& how, int64_t row, int64_t i) {
    const int64_t n = how.width - i < TILE ? how.width - i : TILE;
    const int64_t start = row * how.width * (how.gated ? 2 : 1) + i;
    const Tile gate(how.x, start, n);
    alignas(64) float done[TILE];
    std::memcpy(done, gate.floats, n * sizeof(float));
    for (int64_t k = n; k % LANES != 0; ++k) done[k] = 0;
    for (int64_t k = 0; k < n; k += LANES) store(done + k, activation<ACTIVATION>(load(done + k)));
    if (how.gated) {
        const Tile up(how.x, start + how.width, n);
        for (int64_t k = 0; k < n; ++k) done[k] *= up.floats[k];
    }
    write(done, how.out, row * how.width + i, n);
}

template <int ACTIVATION>
void tiles(const dsl_gate& how, int64_t begin, int64_t end) {
    const int64_t each = (how.width + TILE - 1) / TILE;
    for (int64_t i = begin; i < end; ++i) tile<ACTIVATION>(how, i / each, i % each * TILE);
}

}  // namespace

extern "C" void DSL_NAMED(dsl_gate)(const dsl_gate* gate, int64_t begin, int64_t end) {
    switch (gate->activation) {
        case DSL_SILU:
            return tiles<DSL_SILU>(*gate, begin, end);
        case DSL_GELU:
            return tiles<DSL_GELU>(*gate, begin, end);
        case DSL_GELU_TANH:
            return tiles<DSL_GELU_TANH>(*gate, begin, end);
        case DSL_QUICK_GELU:
            return tiles<DSL_QUICK_GELU>(*gate, begin, end);
        case DSL_RELU_SQUARED:
            return tiles<DSL_RELU_SQUARED>(*gate, begin, end);
        default:
            return tiles<DSL_RELU>(*gate, begin, end);
    }
}
