// Block-sparse attention, forward: a strip of queries meets the keys that its blocks keep, tile by tile, with a softmax
// that is scaled anew when a larger score turns up (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// A strip's arithmetic depends on nothing but its own blocks, so neither the number of threads nor who takes it changes a
// result.
#include "sparse_attn/strip.h"

namespace {

inline Vector larger_number(Vector a, Vector b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return choose(reinterpret_cast<Ints>(b > a), b, a);
#endif
}

DSL_PAIRS_ON

// The new maximum of a vector of queries, times `factor`; a NaN may be passed over: it comes back with the sum.
inline Vector maximum(const float* scores, int64_t keys, int64_t step, float factor, Vector before) {
    Vector most[4];
    for (Vector& one : most) one = to_all(-INFINITY);
    for (int64_t j = 0; j < keys; j += 4) {  // keys are a multiple of 16
        for (int k = 0; k < 4; ++k) most[k] = larger_number(most[k], load(scores + (j + k) * step));
    }
    const Vector found = larger_number(larger_number(most[0], most[1]), larger_number(most[2], most[3]));
    return larger_number(found * to_all(factor), before);
}

// Scores of a vector of queries become weights, whose sum is returned; dropped ones count in it.
template <class Kind>
Vector exponentials(float* scores, float* pairs, const float* kept, int64_t keys, int64_t step, Vector factor,
                    Vector most) {
    Vector total[Kind::EACH] = {};
    for (int64_t j = 0; j < keys; j += Kind::EACH) {
        Vector weight[Kind::EACH];
        for (int k = 0; k < Kind::EACH; ++k) {
            weight[k] = power_of_two(load(scores + (j + k) * step) * factor - most);
            total[k] += weight[k];
            if (kept != nullptr) weight[k] *= load(kept + (j + k) * step);
        }
        if constexpr (Kind::EACH == 2) {
            store(pairs + j / 2 * step, Kind::join(Kind::narrow(weight[0]), Kind::narrow(weight[1])));
        } else {
            store(scores + j * step, weight[0]);
        }
    }
    if constexpr (Kind::EACH == 2) total[0] += total[1];
    return total[0];
}

// A tile's scores become weights in view of the new maximum, and what the strip had so far is scaled to it.
template <class Kind>
void weigh(const Strip& strip, const dsl::SparseRoom& room, const float* kept) {
    const float factor = factor_of(strip);
    const int64_t queries = strip.queries;
    for (int64_t i = 0; i < queries; i += LANES) {
        const Vector before = load(room.each_query[0] + i);
        const Vector most = maximum(room.scores + i, strip.keys, queries, factor, before);
        const Vector seen = choose(reinterpret_cast<Ints>(most == -INFINITY), Vector{}, most);
        const Vector change = power_of_two(before - seen);
        const Vector total = exponentials<Kind>(room.scores + i, room.pairs + i, kept == nullptr ? nullptr : kept + i,
                                                strip.keys, queries, to_all(factor), seen);
        store(room.each_query[0] + i, most);
        store(room.each_query[1] + i, load(room.each_query[1] + i) * change + total);
        const Ints same = reinterpret_cast<Ints>(most == before);
        int32_t all = -1;
        for (int lane = 0; lane < LANES; ++lane) all &= same[lane];
        if (all == -1) continue;
        for (int64_t d = 0; d < strip.how.dim; ++d) {
            float* const sum = room.sums + d * queries + i;
            store(sum, load(sum) * change);
        }
    }
}

void finish(const Strip& strip, const dsl::SparseRoom& room) {
    const dsl_sparse_attention& how = strip.how;
    const int64_t start = strip.batch * how.out.batch + strip.head * how.out.head + strip.first * how.out.token;
    for (int64_t i = 0; i < strip.queries; ++i) {
        const float total = room.each_query[1][i], inverse = total == 0 ? 0 : 1 / total;
        for (int64_t d = 0; d < how.dim; ++d) room.line[d] = room.sums[d * strip.queries + i] * inverse;
        write(room.line, how.out.x, start + i * how.out.token, how.dim);
        how.lse[strip.row_index() + i] =
            total == 0 ? INFINITY : (room.each_query[0][i] + std::log2(total)) * 0.693147181f;
    }
}

template <class Kind>
void forward(const dsl_sparse_attention& how, const dsl_sparse_work& work, const dsl::SparseRoom& room) {
    constexpr bool PAIRS = Kind::EACH == 2;
    Strip strip(how, work, work.first_strip, room.queries);
    strip_columns(strip, how.q, PAIRS, room.q_columns, room.line);
    std::memset(room.sums, 0, how.dim * strip.queries * sizeof(float));
    for (int64_t i = 0; i < strip.queries; ++i) room.each_query[0][i] = -INFINITY, room.each_query[1][i] = 0;
    while (strip.next(room.keys)) {
        const Operand keys = rows_operand(strip, how.k, PAIRS, room.rows);
        scores_of<Kind>(strip, how.k, keys, room.q_columns, how.dim / Kind::EACH, room.scores);
        alter(strip, room.scores);
        const bool drops = how.dropout.threshold != 0;
        if (drops) dropped(strip, room.kept, room.line);
        weigh<Kind>(strip, room, drops ? room.kept : nullptr);
        const Operand values =
            PAIRS ? pairs_operand(strip, how.v, room.rows) : rows_operand(strip, how.v, false, room.rows);
        sums_of<Kind>(strip, how.v, values, PAIRS ? room.pairs : room.scores, Kind::EACH, room.sums);
    }
    finish(strip, room);
}

DSL_PAIRS_OFF

}  // namespace

extern "C" void DSL_NAMED(dsl_sparse_forward)(const dsl_sparse_attention* how, const dsl_sparse_work* work,
                                              float* scratch) {
    const dsl::SparseRoom room(*how, *work, false, scratch);
#if defined(DSL_PAIRS)
    if (work->pairs) return forward<Pairs>(*how, *work, room);
#endif
    forward<Numbers>(*how, *work, room);
}

extern "C" int32_t DSL_NAMED(dsl_sparse_pairs)(const dsl_sparse_attention* how) {
    return has_pairs() && how->q.x.dtype == DSL_BF16 && how->dim % 2 == 0;
}
