// A sum and its norm, row by row: RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016,
// arXiv:1607.06450). Rotary positions (Su et al. 2021, arXiv:2104.09864), on the way into the cache.
#include <cmath>

#include "common/isa.h"
#include "common/tile.h"
#include "transformer_inference/between.h"

namespace {

// Sixteen sums side by side are what vectors need.
template <class Value>
float sum_over(int64_t n, const Value& value) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int k = 0; k < 16; ++k) sums[k] += value(i + k);
    }
    for (; i < n; ++i) sums[0] += value(i);
    float sum = 0;
    for (const float one : sums) sum += one;
    return sum;
}

template <class Work>
void for_tiles(int64_t n, const Work& work) {
    for (int64_t i = 0; i < n; i += TILE) work(i, n - i < TILE ? n - i : TILE);
}

void norm_row(const dsl_norm& how, int64_t row) {
    const int64_t start = row * how.hidden;
    const dsl_tensor& summed = how.residual.data == nullptr ? how.x : how.summed;
    float total = 0, squares = 0, mean = 0;
    for_tiles(how.hidden, [&](int64_t i, int64_t n) {
        const Tile x(how.x, start + i, n);
        if (how.residual.data != nullptr) {
            const Tile residual(how.residual, start + i, n);
            alignas(64) float sums[TILE];
            for (int64_t k = 0; k < n; ++k) sums[k] = x.floats[k] + residual.floats[k];
            write(sums, how.summed, start + i, n);
        }
        const Tile kept(summed, start + i, n);  // as it was rounded
        if (how.layer) total += sum_over(n, [&](int64_t k) { return kept.floats[k]; });
        if (!how.layer) squares += sum_of_squares(kept.floats, n);
    });
    if (how.layer) {
        mean = total / how.hidden;
        for_tiles(how.hidden, [&](int64_t i, int64_t n) {
            const Tile kept(summed, start + i, n);
            squares += sum_over(n, [&](int64_t k) { return (kept.floats[k] - mean) * (kept.floats[k] - mean); });
        });
    }
    const float factor = 1 / std::sqrt(squares / how.hidden + how.eps), offset = how.unit_offset ? 1 : 0;
    for_tiles(how.hidden, [&](int64_t i, int64_t n) {
        const Tile kept(summed, start + i, n), weight(how.weight, i, n), bias(how.bias, i, n);
        alignas(64) float normed[TILE];
        for (int64_t k = 0; k < n; ++k) normed[k] = (kept.floats[k] - mean) * factor;
        if (how.weight.data != nullptr) {
            for (int64_t k = 0; k < n; ++k) normed[k] *= weight.floats[k] + offset;
        }
        if (how.bias.data != nullptr) {
            for (int64_t k = 0; k < n; ++k) normed[k] += bias.floats[k];
        }
        write(normed, how.normed, start + i, n);
    });
}

// One head's numbers `x` into `to`.
void turn(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, const dsl_rotary& how,
          float* __restrict to) {
    const int64_t half = how.rotary_dim / 2;
    if (how.interleaved) {
        for (int64_t i = 0; i < how.rotary_dim; i += 2) {
            to[i] = x[i] * cos[i] - x[i + 1] * sin[i];
            to[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
        }
    } else {
        for (int64_t i = 0; i < half; ++i) to[i] = x[i] * cos[i] - x[i + half] * sin[i];
        for (int64_t i = half; i < how.rotary_dim; ++i) to[i] = x[i] * cos[i] + x[i - half] * sin[i];
    }
    for (int64_t i = how.rotary_dim; i < how.dim; ++i) to[i] = x[i];
}

void rotary_token(const dsl_rotary& how, int64_t batch, int64_t token) {
    const int64_t all = how.heads + 2 * how.kv_heads, first = (batch * how.tokens + token) * all;
    const bool turned = how.cos.data != nullptr;
    const int64_t at = batch * how.cos_batch + token * how.cos_token;
    const Tile cos(how.cos, at, turned ? how.rotary_dim : 0), sin(how.sin, at, turned ? how.rotary_dim : 0);
    for (int64_t head = 0; head < all; ++head) {
        const Tile x(how.qkv, (first + head) * how.dim, how.dim);
        const int64_t kv = (head - how.heads) % how.kv_heads;
        const int64_t in_cache = batch * how.kv_batch + kv * how.kv_head + token * how.kv_token;
        const int64_t in_q = ((batch * how.heads + head) * how.tokens + token) * how.dim;
        const bool is_query = head < how.heads, is_value = head >= how.heads + how.kv_heads;
        alignas(64) float to[TILE];
        if (turned && !is_value) turn(x.floats, cos.floats, sin.floats, how, to);
        const float* const from = turned && !is_value ? to : x.floats;
        write(from, is_query ? how.q : is_value ? how.values : how.keys, is_query ? in_q : in_cache, how.dim);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_norm)(const dsl_norm* norm, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) norm_row(*norm, row);
}

extern "C" void DSL_NAMED(dsl_rotary)(const dsl_rotary* rotary, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rotary_token(*rotary, i / rotary->tokens, i % rotary->tokens);
}
