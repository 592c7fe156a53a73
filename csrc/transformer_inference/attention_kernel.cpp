// Attention of a few query tokens over a cache of keys and values, which are read once for all query heads they serve.
//
// Positions are taken by blocks that stay in the first-level cache, with a softmax that is scaled anew when a larger score
// turns up (Milakov and Gimelshein 2018, arXiv:1805.02867). Long caches are cut into chunks, which threads share and
// whose sums are put together afterwards; sizes alone say how, so the number of threads changes no result.
#include <cmath>

#include "common/isa.h"
#include "common/vector.h"
#include "transformer_inference/between.h"

namespace {

constexpr int64_t BLOCK = 64;  // positions

// What one kv head of one sequence has to do with one chunk; a row is a query head's token.
struct Item {
    Item(const dsl_attention& how, int64_t batch, int64_t kv, int64_t chunk)
        : rows(how.heads / how.kv_heads * how.tokens),
          first_head(kv * (how.heads / how.kv_heads)),
          q(how.q + (batch * how.heads + first_head) * how.tokens * how.dim),
          parts(how.parts + ((batch * how.kv_heads + kv) * how.chunks + chunk) * rows * (how.dim + 2)),
          in_cache(batch * how.kv_batch + kv * how.kv_head),
          mask(how.mask == nullptr ? nullptr : how.mask + batch * how.mask_batch) {}

    const int64_t rows, first_head;
    const float* const q;
    float* const parts;
    const int64_t in_cache;
    const uint8_t* const mask;
};

template <int ROWS, class Element>
void score(const float* q, const Element* keys, int64_t step, int64_t n, int64_t dim, float (*scores)[BLOCK]) {
    for (int64_t position = 0; position < n; ++position, keys += step) {
        Vector sums[ROWS] = {};
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            const Vector key = load(keys + d);
            for (int r = 0; r < ROWS; ++r) sums[r] += key * load(q + r * dim + d);
        }
        for (int r = 0; r < ROWS; ++r) {
            float last = sum(sums[r]);
            for (int64_t i = d; i < dim; ++i) last += one(keys + i) * q[r * dim + i];
            scores[r][position] = last;
        }
    }
}

// VECTORS vectors of each row's sums, from `values` on.
template <int ROWS, int VECTORS, class Element>
void mix(const float (*weights)[BLOCK], const Element* values, int64_t step, int64_t n, float* sums, int64_t row_step) {
    Vector mixed[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) mixed[r][v] = load(sums + r * row_step + v * LANES);
    }
    for (int64_t position = 0; position < n; ++position, values += step) {
        for (int v = 0; v < VECTORS; ++v) {
            const Vector value = load(values + v * LANES);
            for (int r = 0; r < ROWS; ++r) mixed[r][v] += value * spread(weights[r][position]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(sums + r * row_step + v * LANES, mixed[r][v]);
    }
}

// One row's scores become weights; what it had so far is scaled to the new maximum. False where none is seen.
bool weigh(const dsl_attention& how, const Item& item, int64_t row, int64_t first, int64_t n, float* scores) {
    const int64_t at = how.length - how.tokens + row % how.tokens;  // the query's position
    if (how.softcap != 0) {
        for (int64_t i = n; i % LANES != 0; ++i) scores[i] = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            store(scores + i, hyperbolic_tangent(load(scores + i) / how.softcap) * how.softcap);
        }
    }
    if (how.slopes != nullptr) {
        const float slope = how.slopes[item.first_head + row / how.tokens];
        for (int64_t i = 0; i < n; ++i) scores[i] += slope * static_cast<float>(first + i - at);
    }
    const int64_t seen_end = at + 1 - first, seen_begin = how.window != 0 ? at + 1 - how.window - first : 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool seen = i < seen_end && i >= seen_begin && (item.mask == nullptr || item.mask[first + i] != 0);
        scores[i] = seen ? scores[i] : -INFINITY;
    }
    for (int64_t i = n; i < BLOCK; ++i) scores[i] = -INFINITY;
    Vector most = load(scores);
    for (int64_t i = LANES; i < BLOCK; i += LANES) most = larger(most, load(scores + i));
    alignas(64) float lanes[LANES];
    store(lanes, most);
    float* const part = item.parts + row * (how.dim + 2);
    float maximum = part[how.dim];
    for (const float lane : lanes) maximum = lane > maximum || lane != lane ? lane : maximum;
    if (maximum == -INFINITY) return false;
    if (maximum != part[how.dim]) {
        const float factor = std::exp(part[how.dim] - maximum);
        for (int64_t d = 0; d < how.dim; ++d) part[d] *= factor;
        part[how.dim + 1] *= factor;
        part[how.dim] = maximum;
    }
    Vector total{};
    for (int64_t i = 0; i < BLOCK; i += LANES) {
        const Vector weight = exponential(load(scores + i) - maximum);
        store(scores + i, weight);
        total += weight;
    }
    part[how.dim + 1] += sum(total);
    return true;
}

template <int ROWS, class Element>
void rows_of_block(const dsl_attention& how, const Item& item, int64_t row, int64_t first, int64_t n,
                   const Element* keys, const Element* values) {
    alignas(64) float scores[ROWS][BLOCK];
    score<ROWS>(item.q + row * how.dim, keys, how.kv_token, n, how.dim, scores);
    for (int r = 0; r < ROWS; ++r) {
        if (!weigh(how, item, row + r, first, n, scores[r])) std::memset(scores[r], 0, sizeof scores[r]);
    }
    const int64_t row_step = how.dim + 2;
    float* const sums = item.parts + row * row_step;
    int64_t d = 0;
    for (; d + 4 * LANES <= how.dim; d += 4 * LANES) {
        mix<ROWS, 4>(scores, values + d, how.kv_token, n, sums + d, row_step);
    }
    for (; d + LANES <= how.dim; d += LANES) mix<ROWS, 1>(scores, values + d, how.kv_token, n, sums + d, row_step);
    for (; d < how.dim; ++d) {
        for (int r = 0; r < ROWS; ++r) {
            for (int64_t i = 0; i < n; ++i) sums[r * row_step + d] += scores[r][i] * one(values + i * how.kv_token + d);
        }
    }
}

template <class Element>
void attend(const dsl_attention& how, const Item& item, int64_t chunk, const Element* keys, const Element* values) {
    for (int64_t row = 0; row < item.rows; ++row) {
        float* const part = item.parts + row * (how.dim + 2);
        std::memset(part, 0, (how.dim + 2) * sizeof(float));
        part[how.dim] = -INFINITY;
    }
    const int64_t end = how.length < (chunk + 1) * DSL_CHUNK ? how.length : (chunk + 1) * DSL_CHUNK;
    int64_t first = chunk * DSL_CHUNK;
    const int64_t seen = how.window != 0 ? how.length - how.tokens + 1 - how.window : 0;  // by any row
    if (seen > first) first += (seen - first) / BLOCK * BLOCK;
    for (; first < end; first += BLOCK) {
        const int64_t n = end - first < BLOCK ? end - first : BLOCK, at = item.in_cache + first * how.kv_token;
        int64_t row = 0;
        for (; row + 4 <= item.rows; row += 4) rows_of_block<4>(how, item, row, first, n, keys + at, values + at);
        for (; row + 2 <= item.rows; row += 2) rows_of_block<2>(how, item, row, first, n, keys + at, values + at);
        for (; row < item.rows; ++row) rows_of_block<1>(how, item, row, first, n, keys + at, values + at);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_attend)(const dsl_attention* attention, int64_t begin, int64_t end) {
    const dsl_attention& how = *attention;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i % how.chunks, head = i / how.chunks;
        const Item item(how, head / how.kv_heads, head % how.kv_heads, chunk);
        with_elements(how.keys, [&](const auto* keys) {
            attend(how, item, chunk, keys, static_cast<decltype(keys)>(how.values.data));
        });
    }
}

// The chunks' sums, each by its own maximum, into the result; 0 where a row saw no position.
extern "C" void DSL_NAMED(dsl_mix_parts)(const dsl_attention* attention, int64_t begin, int64_t end) {
    const dsl_attention& how = *attention;
    const int64_t step = how.dim + 2;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / how.kv_heads;
        const Item first(how, batch, i % how.kv_heads, 0);
        for (int64_t row = 0; row < first.rows; ++row) {
            float* const mixed = first.parts + row * step;
            for (int64_t chunk = 1; chunk < how.chunks; ++chunk) {
                const float* const other = mixed + chunk * first.rows * step;
                const float a = mixed[how.dim], b = other[how.dim], most = a > b || a != a ? a : b;
                if (most == -INFINITY) continue;
                const float mine = std::exp(a - most), its = std::exp(b - most);
                for (int64_t d = 0; d < how.dim; ++d) mixed[d] = mixed[d] * mine + other[d] * its;
                mixed[how.dim] = most;
                mixed[how.dim + 1] = mixed[how.dim + 1] * mine + other[how.dim + 1] * its;
            }
            const float weight = mixed[how.dim + 1], inverse = weight == 0 ? 0 : 1 / weight;
            for (int64_t d = 0; d < how.dim; ++d) mixed[d] *= inverse;
            const int64_t head = first.first_head + row / how.tokens, token = row % how.tokens;
            write(mixed, how.out, ((batch * how.tokens + token) * how.heads + head) * how.dim, how.dim);
        }
    }
}

extern "C" void DSL_NAMED(dsl_scaled)(const dsl_tensor* x, int64_t numel, float scale, float* to) {
    for (int64_t i = 0; i < numel; i += TILE) {
        const int64_t n = numel - i < TILE ? numel - i : TILE;
        const Tile some(*x, i, n);
        for (int64_t k = 0; k < n; ++k) to[i + k] = some.floats[k] * scale;
    }
}
