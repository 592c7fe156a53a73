// Block-sparse attention, backward: P comes back from the scores and the rows' lse, tile by tile, and
//
//   dV += P^T dO     dP = dO V^T     dS = P (dP - delta)     dQ += scale dS K     dK += scale dS^T Q
//
// with delta the sums of O dO (Dao et al. 2022, arXiv:2205.14135). One thread may do all of a head, keeping the sums of all
// its keys; or some take its strips and others parts of its keys. Every number is the same chain of sums either way.
#include "sparse_attn/strip.h"

namespace {

DSL_PAIRS_ON

// A tile's scores and dP become P, with what was dropped, and dS.
template <class Kind>
void change(const Strip& strip, const dsl::SparseRoom& room, const float* kept) {
    const int64_t queries = strip.queries;
    const Vector factor = to_all(factor_of(strip));
    for (int64_t j = 0; j < strip.keys; j += Kind::EACH) {
        for (int64_t i = 0; i < queries; i += LANES) {
            const Vector lse = load(room.each_query[0] + i), delta = load(room.each_query[1] + i);
            Vector weight[Kind::EACH], changed[Kind::EACH];
            for (int k = 0; k < Kind::EACH; ++k) {
                const int64_t at = (j + k) * queries + i;
                Vector product = load(room.products + at);
                weight[k] = power_of_two(load(room.scores + at) * factor - lse);
                if (kept != nullptr) product *= load(kept + at);
                changed[k] = weight[k] * (product - delta);
                if (kept != nullptr) weight[k] *= load(kept + at);
                store(room.products + at, changed[k]);
            }
            if constexpr (Kind::EACH == 2) {
                decltype(Kind::narrow(weight[0])) narrow[2];
                for (int k = 0; k < 2; ++k) {
                    const int64_t at = ((j + k) * queries + i) / 2;
                    narrow[k] = Kind::narrow(changed[k]);
                    const auto halves = Kind::narrow(weight[k]);
                    std::memcpy(room.weights + at, &halves, sizeof halves);
                    std::memcpy(room.changes + at, &narrow[k], sizeof halves);
                }
                store(room.pairs + j / 2 * queries + i, Kind::join(narrow[0], narrow[1]));
            } else {
                store(room.scores + j * queries + i, weight[0]);
            }
        }
    }
}

// dK or dV += a tile's columns, along the queries, times rows of the strip.
template <class Kind>
void key_sums(const Strip& strip, const dsl::SparseRoom& room, const float* columns, const float* rows, float* to,
              int64_t first_key) {
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        multiply<Kind>({columns + segment.at * strip.queries / Kind::EACH, strip.queries * 4 / Kind::EACH, 4, rows,
                        room.width * 4, to + (segment.key - first_key) * room.width, room.width, segment.count,
                        room.width / LANES, strip.queries / Kind::EACH, true});
    }
}

// The gradient of relative positions; whoever calls sees to it that nobody else writes these rows.
void add_positions(const Strip& strip, const float* changes) {
    const dsl_sparse_attention& how = strip.how;
    float* const all = how.dpositions + strip.batch * how.dpositions_batch + strip.head * how.dpositions_head;
    for (int64_t s = 0; s < strip.count; ++s) {
        const Segment& segment = strip.segments[s];
        for (int64_t i = 0; i < strip.queries; ++i) {
            float* const to = all + (strip.first + i) * how.keys + segment.key;
            for (int64_t j = 0; j < segment.count; ++j) to[j] += changes[(segment.at + j) * strip.queries + i];
        }
    }
}

// What a strip needs beside its tiles.
template <class Kind>
void prepare(const Strip& strip, const dsl_sparse_work& work, const dsl::SparseRoom& room) {
    constexpr bool PAIRS = Kind::EACH == 2;
    const dsl_sparse_attention& how = strip.how;
    strip_columns(strip, how.q, PAIRS, room.q_columns, room.line);
    strip_columns(strip, how.dout, PAIRS, room.dout_columns, room.line);
    if (work.wants_dkv) {
        strip_rows(strip, how.q, PAIRS, room.q_rows, room.width);
        strip_rows(strip, how.dout, PAIRS, room.dout_rows, room.width);
    }
    if (work.wants_dq) std::memset(room.sums, 0, how.dim * strip.queries * sizeof(float));
    float *const out = room.line, *const dout = room.line + DSL_MOST_HEAD;
    for (int64_t i = 0; i < strip.queries; ++i) {
        as_floats(out, strip.from(how.out, strip.first + i), how.q.x.dtype, how.dim);
        as_floats(dout, strip.from(how.dout, strip.first + i), how.q.x.dtype, how.dim);
        float delta = 0;
        for (int64_t d = 0; d < how.dim; ++d) delta += out[d] * dout[d];
        room.each_query[0][i] = how.lse[strip.row_index() + i] * LOG2_E;
        room.each_query[1][i] = delta;
    }
}

template <class Kind>
void tile(const Strip& strip, const dsl_sparse_work& work, const dsl::SparseRoom& room) {
    constexpr bool PAIRS = Kind::EACH == 2;
    const dsl_sparse_attention& how = strip.how;
    const Operand keys = rows_operand(strip, how.k, PAIRS, room.rows);
    scores_of<Kind>(strip, how.k, keys, room.q_columns, how.dim / Kind::EACH, room.scores);
    alter(strip, room.scores);
    const Operand values = rows_operand(strip, how.v, PAIRS, room.more_rows);
    scores_of<Kind>(strip, how.v, values, room.dout_columns, how.dim / Kind::EACH, room.products);
    const bool drops = how.dropout.threshold != 0;
    if (drops) dropped(strip, room.kept, room.line);
    change<Kind>(strip, room, drops ? room.kept : nullptr);
    if (work.wants_dq) {
        const Operand along = PAIRS ? pairs_operand(strip, how.k, room.rows) : keys;
        sums_of<Kind>(strip, how.k, along, PAIRS ? room.pairs : room.products, Kind::EACH, room.sums);
        if (how.dpositions != nullptr) add_positions(strip, room.products);
    }
    if (work.wants_dkv) {
        key_sums<Kind>(strip, room, PAIRS ? room.weights : room.scores, room.dout_rows, room.dv, work.first_key);
        key_sums<Kind>(strip, room, PAIRS ? room.changes : room.products, room.q_rows, room.dk, work.first_key);
    }
}

void write_keys(const dsl_heads& to, const dsl_sparse_work& work, const float* rows, int64_t width, int64_t dim,
                float scale, float* line) {
    for (int64_t j = work.first_key; j < work.end_key; ++j, rows += width) {
        for (int64_t d = 0; d < dim; ++d) line[d] = rows[d] * scale;
        write(line, to.x, work.batch * to.batch + work.head * to.head + j * to.token, dim);
    }
}

template <class Kind>
void backward(const dsl_sparse_attention& how, const dsl_sparse_work& work, const dsl::SparseRoom& room) {
    if (work.wants_dkv) {
        const int64_t bytes = (work.end_key - work.first_key) * room.width * sizeof(float);
        std::memset(room.dk, 0, bytes);
        std::memset(room.dv, 0, bytes);
    }
    for (int64_t index = work.first_strip; index < work.end_strip; ++index) {
        Strip strip(how, work, index, room.queries);
        bool more = strip.next(room.keys);
        if (!more && !work.wants_dq) continue;
        prepare<Kind>(strip, work, room);
        for (; more; more = strip.next(room.keys)) tile<Kind>(strip, work, room);
        if (!work.wants_dq) continue;
        const int64_t start = strip.batch * how.dq.batch + strip.head * how.dq.head + strip.first * how.dq.token;
        for (int64_t i = 0; i < strip.queries; ++i) {
            for (int64_t d = 0; d < how.dim; ++d) room.line[d] = room.sums[d * strip.queries + i] * how.scale;
            write(room.line, how.dq.x, start + i * how.dq.token, how.dim);
        }
    }
    if (work.wants_dkv) {
        write_keys(how.dk, work, room.dk, room.width, how.dim, how.scale, room.line);
        write_keys(how.dv, work, room.dv, room.width, how.dim, 1, room.line);
    }
}

DSL_PAIRS_OFF

}  // namespace

extern "C" void DSL_NAMED(dsl_sparse_backward)(const dsl_sparse_attention* how, const dsl_sparse_work* work,
                                               float* scratch) {
    const dsl::SparseRoom room(*how, *work, true, scratch);
#if defined(DSL_PAIRS)
    if (work->pairs) return backward<Pairs>(*how, *work, room);
#endif
    backward<Numbers>(*how, *work, room);
}
