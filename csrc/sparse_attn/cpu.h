// Block-sparse attention on the CPU: what a thread does at a time, and the memory that it does it in.
//
// A strip is the queries of a block, at most 64 of them; a tile is a strip against some of the keys that its blocks keep.
// Tiles are held as columns: scores (keys, queries), so that vectors run along queries, a softmax needs no sums across
// lanes, and keys and values are read as they lie.
#pragma once

#include <algorithm>

#include "sparse_attn/sparse_attn.h"

// Some strips of one head's queries, against the keys in a range. Forward takes one strip and all keys.
struct dsl_sparse_work {
    int64_t batch, head;
    int64_t first_strip, end_strip;
    int64_t first_key, end_key;   // whole blocks
    int32_t wants_dq, wants_dkv;  // backward: gradients of the strips, of the keys
    int32_t pairs;                // products of pairs of bfloat16; the kernel says whether it can (dsl_sparse_pairs)
};

namespace dsl {

constexpr int64_t MOST_QUERIES = 64;   // of a strip: four vectors of 16
constexpr int64_t MOST_KEYS = 256;     // of a tile
constexpr int64_t MOST_SCORES = 8192;  // of a tile: 32 KB, so that it stays in the first levels of the cache

inline int64_t strip_of(const dsl_sparse_attention& how) { return std::min(how.block, MOST_QUERIES); }

// Of a vector at least, of any instruction set.
inline int64_t padded(int64_t numbers) { return (numbers + 15) / 16 * 16; }

// Where everything lies in a thread's memory; with null, `floats` is what it must have. Columns are (numbers of a head,
// queries), rows (queries or keys, padded numbers of a head); pairs of bfloat16 take the place of floats in them.
struct SparseRoom {
    SparseRoom(const dsl_sparse_attention& how, const dsl_sparse_work& work, bool backward, float* start)
        : queries(strip_of(how)),
          keys(std::min(MOST_KEYS, MOST_SCORES / (backward ? 2 : 1) / queries)),
          width(padded(how.dim)),
          at_(start) {
        scores = take(keys * queries);
        kept = take(keys * queries);
        pairs = take(keys * queries / 2);
        sums = take(how.dim * queries);
        q_columns = take(how.dim * queries);
        rows = take(std::max(keys, queries) * width);
        more_rows = take(std::max(keys, queries) * width);
        line = take(std::max(keys + 256, 2 * DSL_MOST_HEAD));
        for (float*& one : each_query) one = take(queries);
        if (backward) {
            products = take(keys * queries);
            weights = take(keys * queries / 2);
            changes = take(keys * queries / 2);
            dout_columns = take(how.dim * queries);
            q_rows = take(queries * width);
            dout_rows = take(queries * width);
        }
        if (work.wants_dkv) {
            dk = take((work.end_key - work.first_key) * width);
            dv = take((work.end_key - work.first_key) * width);
        }
    }

    const int64_t queries, keys, width;
    float *scores, *kept, *pairs;  // of a tile: S and then P; what dropout multiplies by; P or dS in pairs along keys
    float *sums, *q_columns;       // O or dQ; Q
    float *rows, *more_rows;       // of keys or values as numbers or in pairs, where they cannot be read as they lie
    float* line;                   // a row on its way somewhere, with room for dropout's
    float* each_query[4];          // forward: maximum, sum, factor; backward: lse, delta
    float* products = nullptr;     // dP and then dS
    float *weights = nullptr, *changes = nullptr;  // P and dS as bfloat16
    float *dout_columns = nullptr, *q_rows = nullptr, *dout_rows = nullptr;
    float *dk = nullptr, *dv = nullptr;  // of the range
    int64_t floats = 0;

 private:
    float* take(int64_t numbers) {
        float* const found = at_ == nullptr ? nullptr : at_ + floats;
        floats += padded(numbers);
        return found;
    }

    float* const at_;  // at a multiple of 64 bytes
};

}  // namespace dsl

typedef void dsl_sparse_kernel(const dsl_sparse_attention* how, const dsl_sparse_work* work, float* scratch);
typedef int32_t dsl_sparse_pairs_kernel(const dsl_sparse_attention* how);

extern "C" {
dsl_sparse_kernel dsl_sparse_forward_baseline, dsl_sparse_forward_avx2, dsl_sparse_forward_avx512;
dsl_sparse_kernel dsl_sparse_backward_baseline, dsl_sparse_backward_avx2, dsl_sparse_backward_avx512;
dsl_sparse_pairs_kernel dsl_sparse_pairs_baseline, dsl_sparse_pairs_avx2, dsl_sparse_pairs_avx512;
}
