// Bias, GELU and dropout, and their gradients. Columns are taken by tiles whose sums over rows stay in the first cache.
#include "common/isa.h"
#include "transformer/rows.h"
#include "transformer/transformer.h"

namespace {

struct Gelu {
    Vector value, slope;
};

// x Phi(x) and Phi(x) + x phi(x). erfc to 1.5e-7, by 7.1.26 of Abramowitz and Stegun: one exponential serves phi too.
Gelu by_erf(Vector x) {
    const Ints negative = reinterpret_cast<Ints>(x < 0);
    const Vector z = choose(negative, -x, x) * 0.70710678f, bell = exponential(-z * z), t = 1 / (1 + 0.3275911f * z);
    Vector p = spread(1.061405429f);
    for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + factor;
    const Vector beyond = 0.5f * p * t * bell, phi = choose(negative, beyond, 1 - beyond);
    return {x * phi, phi + x * bell * 0.39894228f};
}

// (1 + tanh u) / 2 is the logistic function of 2 u. Beyond 10^8 it is 0 or 1, and x's square may be infinite.
Gelu by_tanh(Vector x) {
    const Vector product = x * x, most = spread(1e8f);
    const Vector squared = choose(reinterpret_cast<Ints>(product > most), most, product);
    const Vector logistic = 1 / (1 + exponential(-1.59576912f * x * (1 + 0.044715f * squared)));
    // logistic (1 - logistic) is 0 where either is, also where the exponential is infinite.
    const Vector steep = logistic * (1 - logistic) * (1.59576912f + 0.21406445f * squared);
    return {x * logistic, logistic + x * steep};
}

Gelu gelu(Vector x, bool tanh_form) { return tanh_form ? by_tanh(x) : by_erf(x); }

template <bool TANH>
void forward_tile(const dsl_bias_gelu& how, int64_t row, int64_t column, int64_t n, const float* bias,
                  const Buffers& buffers) {
    const int64_t start = row * how.width + column;
    const float* const x = read_row(how.x, start, n, buffers[0]);
    const float* const factors = how.dropout.threshold ? kept(how.dropout, start, n, buffers[1]) : nullptr;
    float* const out = buffers[2];
    for_vectors(n, [&](int64_t i) {
        Vector value = load(x + i);
        if (bias != nullptr) value += load(bias + i);
        value = gelu(value, TANH).value;
        store(out + i, factors != nullptr ? value * load(factors + i) : value);
    });
    write_row(out, how.out, start, n);
}

template <bool TANH>
void backward_tile(const dsl_bias_gelu_backward& how, int64_t row, int64_t column, int64_t n, const float* bias,
                   float* sums, const Buffers& buffers) {
    const int64_t start = row * how.width + column;
    const float* const x = read_row(how.x, start, n, buffers[0]);
    const float* const given = read_row(how.grad_out, start, n, buffers[1]);
    const float* const factors = how.dropout.threshold ? kept(how.dropout, start, n, buffers[2]) : nullptr;
    float *const grad = buffers[3], *const out = buffers[4];
    for_vectors(n, [&](int64_t i) {
        Vector value = load(x + i);
        if (bias != nullptr) value += load(bias + i);
        Gelu found = gelu(value, TANH);
        Vector g = load(given + i);
        if (factors != nullptr) {
            g *= load(factors + i);
            found.value *= load(factors + i);
        }
        g *= found.slope;
        store(grad + i, g);
        store(out + i, found.value);
        store(sums + i, load(sums + i) + g);
    });
    write_row(grad, how.grad_x, start, n);
    write_row(out, how.out, start, n);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls `work(row, column, n, bias)` for every tile of a part, and `after(column, n)` when all rows of its columns are done.
template <class How, class Work, class After>
void for_tiles(const How& how, int64_t part, float* bias_buffer, const Work& work, const After& after) {
    for (int64_t column = 0; column < how.width; column += TILE) {
        const int64_t n = least(TILE, how.width - column);
        const float* const bias = read_row(how.bias, column, n, bias_buffer);
        for (int64_t row = part * DSL_PART; row < least((part + 1) * DSL_PART, how.rows); ++row) {
            work(row, column, n, bias);
        }
        after(column, n);
    }
}

// Sums over a part's rows to where they belong: a part of their own, or, where the order does not matter, the first one of
// the call, to which they are added.
void put_sums(const dsl_bias_gelu_backward& how, const float* sums, int64_t part, int64_t begin, int64_t column,
              int64_t n) {
    if (how.parts == nullptr) return;
    float* const to = how.parts + (how.stochastic ? begin : part) * how.width + column;
    if (how.stochastic && part != begin) {
        for (int64_t i = 0; i < n; ++i) to[i] += sums[i];
    } else {
        std::memcpy(to, sums, n * sizeof(float));
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_bias_gelu)(const dsl_bias_gelu* how, int64_t begin, int64_t end) {
    const Buffers buffers(4, TILE);
    for (int64_t part = begin; part < end; ++part) {
        for_tiles(
            *how, part, buffers[3],
            [&](int64_t row, int64_t column, int64_t n, const float* bias) {
                how->tanh_form ? forward_tile<true>(*how, row, column, n, bias, buffers)
                               : forward_tile<false>(*how, row, column, n, bias, buffers);
            },
            [](int64_t, int64_t) {});
    }
}

extern "C" void DSL_NAMED(dsl_bias_gelu_backward)(const dsl_bias_gelu_backward* how, int64_t begin, int64_t end) {
    const Buffers buffers(7, TILE);
    float* const sums = buffers[6];
    std::memset(sums, 0, TILE * sizeof(float));
    for (int64_t part = begin; part < end; ++part) {
        for_tiles(
            *how, part, buffers[5],
            [&](int64_t row, int64_t column, int64_t n, const float* bias) {
                how->tanh_form ? backward_tile<true>(*how, row, column, n, bias, sums, buffers)
                               : backward_tile<false>(*how, row, column, n, bias, sums, buffers);
            },
            [&](int64_t column, int64_t n) {
                put_sums(*how, sums, part, begin, column, n);
                std::memset(sums, 0, TILE * sizeof(float));
            });
    }
}
