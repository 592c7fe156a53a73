// A strip of queries and its tiles: which keys they have, how those become operands, and how products become scores.
#pragma once

#include <cmath>

#include "common/philox_vector.h"
#include "sparse_attn/cpu.h"
#include "sparse_attn/products.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// 2^x for x of at most about 1, to an ulp or two; 0 below 2^-126. The polynomial is the one of degree 5 whose largest
// relative error over [-1/2, 1/2] is smallest, 7.5e-8.
inline Vector power_of_two(Vector x) {
#if defined(__AVX512F__)
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-160.0f), reinterpret_cast<__m512>(x));  // NaN stays
    const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector f = reinterpret_cast<Vector>(_mm512_sub_ps(bounded, whole));
#else
    const Vector bounded = choose(reinterpret_cast<Ints>(x < -126.0f), to_all(-126.0f), x);
    const Vector magic = to_all(12582912.0f);  // adding and taking away 1.5 * 2^23 rounds to a whole number
    const Vector whole = (bounded + magic) - magic, f = bounded - whole;
#endif
    Vector p = to_all(0.001327647129073739f);
    p = p * f + to_all(0.009675540961325169f);
    p = p * f + to_all(0.05550713092088699f);
    p = p * f + to_all(0.24022120237350464f);
    p = p * f + to_all(0.6931469440460205f);
    p = p * f + to_all(1.0f);
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), whole));
#else
    const Vector power = reinterpret_cast<Vector>((__builtin_convertvector(whole, Ints) + 127) << 23);
    return choose(reinterpret_cast<Ints>(x < -126.0f), Vector{}, p * power);
#endif
}

// A run of keys of a tile.
struct Segment {
    int64_t key;          // the first
    int64_t at, count;    // its place in the tile; keys
    const uint8_t* mask;  // the first key's and query's byte of a partial block, or null
};

// A strip of a head: its rows of every tensor, and its tiles one after the other.
class Strip {
 public:
    Strip(const dsl_sparse_attention& how, const dsl_sparse_work& work, int64_t index, int64_t queries)
        : how(how), batch(work.batch), head(work.head), first(index * queries), queries(queries) {
        const int64_t list = batch * how.list_batch + head * how.list_head, row = first / how.block;
        const int32_t* const starts = how.by_row.starts + list * (how.queries / how.block) + row;
        const int32_t* const blocks = how.by_row.blocks;
        entry_ = std::lower_bound(blocks + starts[0], blocks + starts[1], work.first_key / how.block) - blocks;
        const int64_t seen =
            how.causal ? std::min(work.end_key, first + queries) : work.end_key;  // no key from there on
        end_ = std::lower_bound(blocks + entry_, blocks + starts[1], (seen + how.block - 1) / how.block) - blocks;
        scaled = !(how.scale > 0);  // the largest product would not be the largest score
        for (const dsl_bias& bias : how.biases) {
            scaled |= bias.kind == DSL_ADDED;
            hides_ |= bias.kind != DSL_NO_BIAS;
        }
    }

    // The next tile's segments, of at most `most` keys together; false where there are none.
    bool next(int64_t most) {
        count = 0;
        keys = 0;
        hides = hides_;
        while (entry_ < end_ && keys < most) {
            const int64_t key = how.by_row.blocks[entry_] * how.block + offset_;
            const int64_t partial = how.by_row.partial == nullptr ? -1 : how.by_row.partial[entry_];
            const int64_t some = std::min(how.block - offset_, most - keys);
            if (!how.causal || key < first + queries) add(key, some, partial);
            offset_ += some;
            if (offset_ == how.block) offset_ = 0, ++entry_;
        }
        return keys > 0;
    }

    // A head's numbers from a token on.
    char* from(const dsl_heads& heads, int64_t token) const {
        const int64_t place = batch * heads.batch + head * heads.head + token * heads.token;
        return static_cast<char*>(heads.x.data) + place * (heads.x.dtype == DSL_FP32 ? 4 : 2);
    }

    int64_t row_index() const { return (batch * how.heads + head) * how.queries + first; }

    const dsl_sparse_attention& how;
    const int64_t batch, head, first, queries;
    Segment segments[dsl::MOST_KEYS / 16];
    int64_t count = 0, keys = 0;  // of the tile
    bool hides = false;           // something says which of its positions are seen, or is added
    bool scaled = false;          // scores are made before they are weighed; else their scale is part of that

 private:
    void add(int64_t key, int64_t some, int64_t partial) {
        const bool edge = how.causal && key + some > first + 1;
        const uint8_t* mask = nullptr;
        if (partial >= 0) {
            mask = how.partial_masks + (partial * how.block + first % how.block) * how.block + key % how.block;
        }
        hides |= edge || mask != nullptr;
        Segment& last = segments[count - (count > 0)];
        if (count > 0 && last.key + last.count == key && last.mask == nullptr && mask == nullptr) {
            last.count += some;
        } else {
            segments[count++] = {key, keys, some, mask};
        }
        keys += some;
    }

    int64_t entry_, end_, offset_ = 0;
    bool hides_ = false;
};

// --- operands ----------------------------------------------------------------------------------------------------------

inline void as_floats(float* to, const char* from, dsl_dtype dtype, int64_t n) {
    dtype == DSL_FP32 ? static_cast<void>(std::memcpy(to, from, n * 4))
                      : widen(to, reinterpret_cast<const uint16_t*>(from), dtype, n);
}

inline int64_t bytes_of(dsl_dtype dtype) { return dtype == DSL_FP32 ? 4 : 2; }

// to[i][j] = from[j][i], of 4 bytes each; steps in floats.
inline void transpose(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < rows; ++i) to[j * to_step + i] = from[i * from_step + j];
    }
}

// Rows of 16 bits in pairs of one and the next: to[i / 2][j] = from[i][j] | from[i + 1][j] << 16. `rows` is even.
inline void pair_rows(const char* from, int64_t from_bytes, float* to, int64_t to_step, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += 2, from += 2 * from_bytes, to += to_step) {
        const auto* const one = reinterpret_cast<const uint16_t*>(from);
        const auto* const other = reinterpret_cast<const uint16_t*>(from + from_bytes);
        auto* const pairs = reinterpret_cast<uint32_t*>(to);
        for (int64_t j = 0; j < columns; ++j) pairs[j] = one[j] | static_cast<uint32_t>(other[j]) << 16;
    }
}

// The tile's rows of keys or values as A of a product: by rows for scores, along the depth for sums.
struct Operand {
    const char* data;  // of the tile's first key; null: as it lies, segment by segment
    int64_t step;      // bytes from a key, or a pair of keys, to the next
};

// As it lies if that is floats, or bfloat16 in pairs; else as floats, in `room`.
inline Operand rows_operand(const Strip& strip, const dsl_heads& heads, bool pairs, float* room) {
    if (pairs || heads.x.dtype == DSL_FP32) return {nullptr, heads.token * bytes_of(heads.x.dtype)};
    const int64_t dim = strip.how.dim;
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        for (int64_t i = 0; i < segment.count; ++i) {
            as_floats(room + (segment.at + i) * dim, strip.from(heads, segment.key + i), heads.x.dtype, dim);
        }
    }
    return {reinterpret_cast<const char*>(room), dim * 4};
}

// Neighbouring keys in pairs.
inline Operand pairs_operand(const Strip& strip, const dsl_heads& heads, float* room) {
    const int64_t dim = strip.how.dim;
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        pair_rows(strip.from(heads, segment.key), heads.token * 2, room + segment.at / 2 * dim, dim, segment.count,
                  dim);
    }
    return {reinterpret_cast<const char*>(room), dim * 4};
}

// The strip's rows of a tensor: floats, padded with zeros, or pairs of neighbouring queries; and as columns.
inline void strip_rows(const Strip& strip, const dsl_heads& heads, bool pairs, float* to, int64_t width) {
    const int64_t dim = strip.how.dim, step = heads.token * bytes_of(heads.x.dtype), each = pairs ? 2 : 1;
    const char* const from = strip.from(heads, strip.first);
    if (pairs) pair_rows(from, step, to, width, strip.queries, dim);
    for (int64_t i = 0; i < strip.queries / each; ++i) {
        if (!pairs) as_floats(to + i * width, from + i * step, heads.x.dtype, dim);
        std::memset(to + i * width + dim, 0, (width - dim) * 4);
    }
}

inline void strip_columns(const Strip& strip, const dsl_heads& heads, bool pairs, float* to, float* line) {
    const int64_t dim = strip.how.dim, step = heads.token * bytes_of(heads.x.dtype);
    for (int64_t i = 0; i < strip.queries; ++i) {
        const char* const from = strip.from(heads, strip.first) + i * step;
        pairs ? static_cast<void>(std::memcpy(line, from, dim * 2)) : as_floats(line, from, heads.x.dtype, dim);
        transpose(line, 0, to + i, strip.queries, 1, pairs ? dim / 2 : dim);
    }
}

// --- products ------------------------------------------------------------------------------------------------------------

// (keys, queries) = rows of keys or values, times columns of the strip.
template <class Kind>
void scores_of(const Strip& strip, const dsl_heads& heads, const Operand& rows, const float* columns, int64_t depth,
               float* to) {
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        const char* const a =
            rows.data != nullptr ? rows.data + segment.at * rows.step : strip.from(heads, segment.key);
        multiply<Kind>({a, rows.step, 4, columns, strip.queries * 4, to + segment.at * strip.queries, strip.queries,
                        segment.count, strip.queries / LANES, depth, false});
    }
}

// (numbers, queries) += rows of keys or values, along the keys, times a tile's columns; of both each is one key or a pair.
template <class Kind>
void sums_of(const Strip& strip, const dsl_heads& heads, const Operand& rows, const float* columns, int64_t each,
             float* to) {
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        const char* const a =
            rows.data != nullptr ? rows.data + segment.at / each * rows.step : strip.from(heads, segment.key);
        multiply<Kind>({a, 4, rows.step, columns + segment.at / each * strip.queries, strip.queries * 4, to,
                        strip.queries, strip.how.dim, strip.queries / LANES, segment.count / each, true});
    }
}

// --- scores --------------------------------------------------------------------------------------------------------------

// A score, with what a bias says of it.
template <class Element>
inline float with_bias(float score, const Element* at, dsl_bias_kind kind) {
    const float number = one(at);
    return kind == DSL_ADDED ? score + number : number == 0 ? -INFINITY : score;
}

inline float with_bias(float score, const uint8_t* at, dsl_bias_kind) { return *at == 0 ? -INFINITY : score; }

template <class Element>
void add_bias(const Strip& strip, const dsl_bias& bias, const Segment& segment, const Element* all, float* scores) {
    const Element* const from =
        all + strip.batch * bias.batch + strip.head * bias.head + strip.first * bias.row + segment.key * bias.column;
    const int64_t queries = strip.queries;
    if (bias.row == 0) {  // the same for all queries
        for (int64_t j = 0; j < segment.count; ++j) {
            for (int64_t i = 0; i < queries; ++i) {
                scores[j * queries + i] = with_bias(scores[j * queries + i], from + j * bias.column, bias.kind);
            }
        }
        return;
    }
    for (int64_t i = 0; i < queries; ++i) {
        for (int64_t j = 0; j < segment.count; ++j) {
            float& score = scores[j * queries + i];
            score = with_bias(score, from + i * bias.row + j * bias.column, bias.kind);
        }
    }
}

inline void hide(const Strip& strip, const Segment& segment, float* scores) {
    const int64_t queries = strip.queries;
    if (segment.mask != nullptr) {
        for (int64_t i = 0; i < queries; ++i) {
            for (int64_t j = 0; j < segment.count; ++j) {
                if (segment.mask[i * strip.how.block + j] == 0) scores[j * queries + i] = -INFINITY;
            }
        }
    }
    if (!strip.how.causal) return;
    for (int64_t j = std::max<int64_t>(strip.first + 1 - segment.key, 0); j < segment.count; ++j) {
        const int64_t hidden = std::min(segment.key + j - strip.first, queries);  // queries before the key
        for (int64_t i = 0; i < hidden; ++i) scores[j * queries + i] = -INFINITY;
    }
}

// Whether scores are scaled here is the same for all tiles: a position's arithmetic depends on no other's.
inline void alter(const Strip& strip, float* scores) {
    const int64_t all = strip.scaled ? strip.keys * strip.queries : 0;
    for (int64_t i = 0; i < all; i += LANES) store(scores + i, load(scores + i) * to_all(strip.how.scale));
    for (int64_t s = 0; strip.hides && s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        float* const some = scores + segment.at * strip.queries;
        for (const dsl_bias& bias : strip.how.biases) {
            if (bias.kind == DSL_NO_BIAS) continue;
            if (bias.kind == DSL_SEEN) {
                add_bias(strip, bias, segment, static_cast<const uint8_t*>(bias.x.data), some);
            } else {
                with_elements(bias.x, [&](const auto* all) { add_bias(strip, bias, segment, all, some); });
            }
        }
        hide(strip, segment, some);
    }
    for (int64_t i = 0; i < all; i += LANES) store(scores + i, load(scores + i) * to_all(LOG2_E));
}

// What a score is multiplied by on its way into an exponent of 2.
inline float factor_of(const Strip& strip) { return strip.scaled ? 1 : strip.how.scale * LOG2_E; }

// What dropout multiplies the tile by.
inline void dropped(const Strip& strip, float* to, float* line) {
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        for (int64_t i = 0; i < strip.queries; ++i) {
            const uint64_t element = (strip.row_index() + i) * strip.how.keys + segment.key;
            const float* const row = kept(strip.how.dropout, element, segment.count, line);
            transpose(row, 0, to + segment.at * strip.queries + i, strip.queries, 1, segment.count);
        }
    }
}

}  // namespace
